"""Measures how fast every stage is, beside the plain way of doing it.

    python bench.py [--repeats 3] [--device auto] [--precision auto]

For Linux. Takes some minutes; let nothing else run. The plain way is the original's: float32,
PyTorch's default memory layout and layers, batch and spectral norm computed anew, one tile of
68 x 68 pixels for every 60 x 60 at a time; images one after the other at Pillow's default PNG
compression. Every measurement is a process of its own, plain and ours by turns; medians are
printed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn

import console
import device
import files
import images
import inference
import join_slice_images
import losses
import models
import pipeline
import slice_images_w_overlapping
import tiles
from tiles import HR, LR, SCALE

SIDE = 600  # LR pixels of the image to enlarge
TILE, CELL = 68, 60  # LR pixels the original computes at a time, and what of them is new
BATCH, CROP = 8, 24  # of a training step
IMAGES = 4  # to slice and to join
GENERATOR, EDGE_GENERATOR = (64, 20), (64, 8)  # width and residual blocks


def main() -> None:
    """Measures all stages and prints the table."""
    parser = console.Parser(__doc__)
    add = parser.add_argument
    add("--repeats", type=console.count, default=3, help="runs of each measurement")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of our way")
    add("--measure", choices=STAGES, help=argparse.SUPPRESS)
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind = device.choose_kind(options.device)  # or say at once that there is none
    if options.measure:
        opened = nullcontext(device.Device(torch.device(kind)))  # without what is done for speed
        if not options.plain:
            training = options.measure == "training step"
            opened = device.open_device(options.device, options.precision, training)
        with opened as on:
            print(json.dumps([STAGES[options.measure][0](on, options.plain), memory(kind)]))
        return

    rounds = [(stage, plain) for stage in STAGES for plain in (True, False)] * options.repeats
    found: dict[tuple[str, bool], list[list[float]]] = {}
    for stage, plain in console.progress(rounds, "Measuring"):
        command = [sys.executable, __file__, "--measure", stage, "--device", options.device]
        command += ["--precision", options.precision, *["--plain"] * plain]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.setdefault((stage, plain), []).append(json.loads(done.stdout.splitlines()[-1]))
    line = "{:16} {:>10} {:>10} {:>8} {:>28} {:>11}".format
    console.info(line("", "plain", "ours", "ratio", "throughput", "memory"))
    for stage, (_, amount, unit) in STAGES.items():
        plain, ours = (median(each[0] for each in found[stage, way]) for way in (True, False))
        mebibytes = median(each[1] for each in found[stage, False]) / 2**20
        speed, ratio = f"{amount / ours:.3g} {unit}/s", f"{plain / ours:.1f}x"
        times = f"{plain:.3g} s", f"{ours:.3g} s"
        console.info(line(stage, *times, ratio, speed, f"{mebibytes:.0f} MiB"))


def memory(kind: str) -> int:
    """Returns the most bytes that this process, or one that it started, has used."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return max(resource.getrusage(who).ru_maxrss * 1024 for who in both)  # KiB on Linux


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def make_plain(network: nn.Module) -> nn.Module:
    """Puts PyTorch's layers in place of those that this repository made for speed."""
    target = next(network.parameters()).device
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, models.FewChannelConv):
                sizes = child.in_channels, child.out_channels, child.kernel_size
                setattr(module, name, nn.Conv2d(*sizes, padding=child.padding))
            elif isinstance(child, models.InstanceNorm):
                setattr(module, name, nn.InstanceNorm2d(child.num_features))
            elif isinstance(child, models.PReLU):
                setattr(module, name, nn.PReLU())
    return network.to(target)


# The stages, each of which returns seconds ----------------------------------------------------


def test(on: device.Device, plain: bool, with_edges: bool = True) -> float:
    """Measures a whole image; of the plain way, extrapolated from some tiles."""
    generator = (models.Generator if with_edges else models.SRResNet)(*GENERATOR)
    edge_generator = models.EdgeGenerator(*EDGE_GENERATOR)
    if not plain:
        enlarger = inference.Enlarger(generator, edge_generator if with_edges else None, on)
        # First the same size where kernels are tuned.
        enlarger(photograph(SIDE if on.torch_device.type == "cuda" else TILE))
        return timed(lambda: enlarger(photograph(SIDE)))
    for network in (generator, edge_generator):
        make_plain(network).to(on.torch_device).eval()
    lr = torch.rand(1, 3, TILE, TILE, device=on.torch_device)

    @torch.no_grad()
    def tile() -> None:
        generator(lr, *([edge_generator(lr, lr[:, :1])] if with_edges else [])).cpu()

    tile()
    return median(timed(tile) for _ in range(5)) * (SIDE / CELL) ** 2


def test_without_edges(on: device.Device, plain: bool) -> float:
    """Measures a whole image by the SRResNet alone."""
    return test(on, plain, with_edges=False)


def train(on: device.Device, plain: bool) -> float:
    """Measures a step of the generator: forward, backward, update."""
    generator = models.Generator(*GENERATOR).to(on.torch_device)
    generator = make_plain(generator) if plain else on.place(generator)
    optimizer = torch.optim.Adam(generator.parameters(), fused=not plain)
    shapes = (3, CROP), (1, SCALE * CROP), (3, SCALE * CROP)
    batch = [torch.rand(BATCH, n, side, side, device=on.torch_device) for n, side in shapes]
    lr, hr_edges, hr = batch if plain else map(on.send, batch)

    def step() -> None:
        with on.autocast():
            sr = generator(lr, hr_edges)
        losses.squared_error(sr, hr).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return median(timed(step) for _ in range(5))


def slicing(_: device.Device, plain: bool) -> float:
    """Measures slicing a pair of 600 x 600 and 2400 x 2400 pixels."""
    with tempfile.TemporaryDirectory() as name:
        grid, folders = tiles.Grid(SIDE, SIDE), {}
        for size, scale in ((LR, 1), (HR, SCALE)):
            folders[scale] = Path(name) / tiles.TRAINING / size
            (folders[scale] / tiles.TILES).mkdir(parents=True)
            for number in range(IMAGES):
                images.write_png(folders[scale] / f"{number}.png", photograph(scale * SIDE, number))

        def slice_plainly() -> None:
            for scale, folder in folders.items():
                for path in folder.glob("*.png"):
                    image = np.asarray(Image.open(path))
                    for at in grid:
                        tile = folder / tiles.TILES / tiles.tile_name(path.stem, *at)
                        Image.fromarray(tiles.cut_tile(image, grid, *at, scale)).save(tile)

        def slice_ours() -> None:
            slice_images_w_overlapping.main(["--root", name])

        return timed(slice_plainly if plain else slice_ours) / IMAGES


def joining(_: device.Device, plain: bool) -> float:
    """Measures joining 2400 x 2400 pixels; plainly, the tiles' insides side by side."""
    with tempfile.TemporaryDirectory() as name:
        grid, folder = tiles.Grid(SIDE, SIDE), Path(name) / tiles.TEST / LR
        output = folder / tiles.OUTPUT
        output.mkdir(parents=True)
        for number in range(IMAGES):
            path, sr = folder / f"{number}.png", photograph(SCALE * SIDE, number)
            images.write_png(path, photograph(SIDE, number))
            stamp = str(pipeline.Stamp(files.digest(path), str(grid)))
            for at in grid:
                tile = tiles.cut_tile(sr, grid, *at, SCALE)
                images.write_png(output / tiles.tile_name(path.stem, *at), tile, stamp)

        def join_plainly() -> None:
            margin = SCALE * grid.pad // 2
            for number in range(IMAGES):
                image = np.empty((SCALE * SIDE, SCALE * SIDE, 3), np.uint8)
                for at in grid:
                    tile = np.asarray(Image.open(output / tiles.tile_name(str(number), *at)))
                    image[grid.cell(*at, SCALE)] = tile[margin:-margin, margin:-margin]
                Image.fromarray(image).save(output / f"joined_{number}.png")

        def join_ours() -> None:
            join_slice_images.main(["--root", name])

        return timed(join_plainly if plain else join_ours) / IMAGES


def photograph(side: int, number: int = 0) -> np.ndarray:
    """Returns `(side, side, 3)` uint8: a photograph of scikit-image's, enlarged to fill."""
    data = skimage.data
    image = (data.astronaut, data.chelsea, data.coffee, data.rocket)[number % 4]()
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


# What a stage is measured by, and how much it makes in that time.
STAGES: dict[str, tuple[Callable[[device.Device, bool], float], float, str]] = {
    "test": (test, SIDE**2 / 1e6, "LR megapixels"),
    "test, no edges": (test_without_edges, SIDE**2 / 1e6, "LR megapixels"),
    "training step": (train, BATCH, "HR patches"),
    "slicing": (slicing, SIDE**2 / 1e6, "LR megapixels"),
    "joining": (joining, SIDE**2 / 1e6, "LR megapixels"),
}

if __name__ == "__main__":
    with console.plain_errors():
        main()
