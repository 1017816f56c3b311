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
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn

import console
import device
import images
import inference
import join_slice_images
import losses
import models
import slice_images_w_overlapping
import tiles
from tiles import HR, LR, OUTPUT, SCALE, TEST, TILES, TRAINING

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
    if options.measure:
        measure(options)
        return

    rounds = [(stage, plain) for stage in STAGES for plain in (True, False)] * options.repeats
    found: dict[tuple[str, bool], list[list[float]]] = {}
    for stage, plain in console.progress(rounds, "Measuring"):
        command = [sys.executable, __file__, "--measure", stage, "--device", options.device]
        command += ["--precision", options.precision, *["--plain"] * plain]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.setdefault((stage, plain), []).append(json.loads(done.stdout.splitlines()[-1]))
    line = "{:16} {:>10} {:>10} {:>8} {:>11}".format
    console.info(line("", "plain", "ours", "ratio", "memory"))
    for stage in STAGES:
        plain, ours = (median(each[0] for each in found[stage, way]) for way in (True, False))
        used = median(each[1] for each in found[stage, False]) / 2**20
        times = f"{plain:.3g} s", f"{ours:.3g} s", f"{plain / ours:.1f}x"
        console.info(line(stage, *times, f"{used:.0f} MiB"))


def measure(options: argparse.Namespace) -> None:
    """Prints the seconds of one measurement and the most bytes that this process has used."""
    kind = device.choose_kind(options.device)
    if options.plain:
        on = device.Device(torch.device(kind))  # without what is done for speed
    else:
        training = options.measure == "training step"
        on = device.open_device(options.device, options.precision, training)
    seconds = STAGES[options.measure](on, options.plain)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(json.dumps([seconds, torch.cuda.max_memory_allocated() if kind == "cuda" else used]))


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
    with tempfile.TemporaryDirectory() as root:
        folders = [write_images(Path(root, TRAINING, LR)), write_images(Path(root, TRAINING, HR))]

        def slice_plainly() -> None:
            for folder, scale in zip(folders, (1, SCALE), strict=True):
                for path in folder.glob("*.png"):
                    image, grid = np.asarray(Image.open(path)), tiles.Grid(SIDE, SIDE)
                    for at in grid:
                        tile = Image.fromarray(tiles.cut_tile(image, grid, *at, scale))
                        tile.save(folder / TILES / tiles.tile_name(path.stem, *at))

        ours = partial(slice_images_w_overlapping.main, ["--root", root])
        return timed(slice_plainly if plain else ours) / IMAGES


def joining(_: device.Device, plain: bool) -> float:
    """Measures joining 2400 x 2400 pixels; plainly, the tiles' insides side by side."""
    with tempfile.TemporaryDirectory() as root:
        folder, grid = write_images(Path(root, TEST, LR)), tiles.Grid(SIDE, SIDE)
        slice_images_w_overlapping.main(["--root", root])
        for path in (folder / TILES).iterdir():
            tile = images.bicubic(images.read_image(path), SCALE)
            images.write_png(folder / OUTPUT / path.name, tile, images.read_stamp(path))

        def join_plainly() -> None:
            margin = SCALE * grid.pad // 2
            for path in folder.glob("*.png"):
                image = np.empty((SCALE * SIDE, SCALE * SIDE, 3), np.uint8)
                for at in grid:
                    tile = Image.open(folder / OUTPUT / tiles.tile_name(path.stem, *at))
                    image[grid.cell(*at, SCALE)] = np.asarray(tile)[margin:-margin, margin:-margin]
                Image.fromarray(image).save(folder / OUTPUT / f"joined_{path.name}")

        ours = partial(join_slice_images.main, ["--root", root])
        return timed(join_plainly if plain else ours) / IMAGES


def write_images(folder: Path) -> Path:
    """Writes the images that a folder of this name holds, and returns it."""
    (folder / TILES).mkdir(parents=True)
    side = SIDE if folder.name == LR else SCALE * SIDE
    for number in range(IMAGES):
        images.write_png(folder / f"{number}.png", photograph(side, number))
    return folder


def photograph(side: int, number: int = 0) -> np.ndarray:
    """Returns `(side, side, 3)` uint8: a photograph of scikit-image's, enlarged to fill."""
    data = skimage.data
    image = (data.astronaut, data.chelsea, data.coffee, data.rocket)[number % 4]()
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


STAGES: dict[str, Callable[[device.Device, bool], float]] = {
    "test": test,
    "test, no edges": partial(test, with_edges=False),
    "training step": train,
    "slicing": slicing,
    "joining": joining,
}

if __name__ == "__main__":
    with console.plain_errors():
        main()
