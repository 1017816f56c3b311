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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import join_slice_images
import slice_images_w_overlapping
from console import plain_errors, positive_int, progress
from device import Device, choose_kind, open_device
from images import bicubic, write_png
from inference import Enlarger
from losses import squared_error
from models import EdgeGenerator, FewChannelConv, Generator, InstanceNorm, PReLU, SRResNet
from tiles import (
    HR,
    LR,
    OUTPUT,
    SCALE,
    TEST,
    TILES,
    TRAINING,
    Grid,
    cut,
    tile_name,
    tile_stamp,
)

SIDE = 600  # LR pixels of the image to enlarge
TILE, CELL = 68, 60  # LR pixels the original computes at a time, and what of them is new
BATCH, CROP = 8, 24  # of a training step
IMAGES = 4  # to slice and to join


NUMBERS = ("seconds", "amount", "flops", "peak", "memory")


def main() -> None:
    """Measures all stages and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--measure", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.plain:  # without what `open_device` does for speed
            plain_device = Device(torch.device(choose_kind(options.device)))
            print(json.dumps(STAGES[options.measure](plain_device, True)))
        else:
            training = options.measure == "training step"
            with open_device(options.device, options.precision, training) as device:
                print(json.dumps(STAGES[options.measure](device, False)))
        return

    choose_kind(options.device)  # or say at once that there is none
    rounds = [(stage, plain) for stage in STAGES for plain in (True, False)] * options.repeats
    found: dict[tuple[str, bool], list[dict]] = {}
    for stage, plain in progress(rounds, "Measuring"):
        found.setdefault((stage, plain), []).append(measure(stage, plain, options))
    print(
        f"{'':18}{'plain':>9}{'ours':>9}{'ratio':>8}{'throughput':>20}{'of peak':>9}{'memory':>10}"
    )
    for stage in STAGES:
        plain, ours = (
            {key: statistics.median(each[key] for each in found[stage, way]) for key in NUMBERS}
            | {"unit": found[stage, way][0]["unit"]}
            for way in (True, False)
        )
        speed = f"{ours['amount'] / ours['seconds']:.3g} {ours['unit']}/s"
        share = ours["flops"] / ours["seconds"] / ours["peak"] if ours["flops"] else 0
        print(
            f"{stage:18}{plain['seconds']:8.2f}s{ours['seconds']:8.2f}s"
            f"{plain['seconds'] / ours['seconds']:7.1f}x{speed:>20}"
            f"{f'{share:.0%}' if share else '':>9}{ours['memory'] / 2**20:6.0f} MiB"
        )


def measure(stage: str, plain: bool, options: argparse.Namespace) -> dict:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", stage, "--device", options.device]
    command += ["--precision", options.precision, *(["--plain"] if plain else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# The stages -----------------------------------------------------------------------------------


def result(device: Device, seconds: float, amount: float, unit: str, flops: float = 0) -> dict:
    """Returns a measurement, with the peaks of matrix product and memory added."""
    if device.torch_device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        own, workers = (
            resource.getrusage(who).ru_maxrss * 1024  # KiB on Linux
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        memory = max(own, workers)
    return {
        "seconds": seconds,
        "amount": amount,
        "unit": unit,
        "flops": flops,
        "memory": memory,
        "peak": matrix_product(device) if flops else 0,
    }


def matrix_product(device: Device) -> float:
    """Returns the FLOP/s of a large matrix product in the precision the networks run in."""
    size = 2048 if device.torch_device.type == "cpu" else 8192
    a, b = torch.rand(2, size, size, device=device.torch_device, dtype=device.dtype)
    a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(9))


def timed(work: Callable[[], object], device: Device | None = None) -> float:
    """Returns the seconds that `work` takes, on the device too."""
    on_gpu = device is not None and device.torch_device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_plain(network: nn.Module) -> nn.Module:
    """Puts PyTorch's layers in place of those that this repository made for speed."""
    device = next(network.parameters()).device
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FewChannelConv):
                sizes = child.in_channels, child.out_channels, child.kernel_size
                setattr(module, name, nn.Conv2d(*sizes, padding=child.padding))
            elif isinstance(child, InstanceNorm):
                setattr(module, name, nn.InstanceNorm2d(child.num_features))
            elif isinstance(child, PReLU):
                setattr(module, name, nn.PReLU())
    return network.to(device)


def count_flops(work: Callable[[], object]) -> int:
    """Returns the floating-point operations of convolutions in `work`, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test(device: Device, plain: bool, with_edges: bool = True) -> dict:
    """Returns the time of a whole image; of the plain way, extrapolated from some tiles."""
    network = Generator if with_edges else SRResNet
    generator = make_plain(network()).to(device.torch_device).eval()
    edge_generator = make_plain(EdgeGenerator()).to(device.torch_device).eval()
    lr = torch.rand(1, 3, TILE, TILE, device=device.torch_device)

    @torch.no_grad()
    def tile() -> None:
        inputs = [edge_generator(lr, lr[:, :1])] if with_edges else []
        generator(lr, *inputs).cpu()

    flops = count_flops(tile) * (SIDE / TILE) ** 2
    if plain:
        seconds = statistics.median(timed(tile, device) for _ in range(5)) * (SIDE / CELL) ** 2
    else:
        enlarger = Enlarger(network(), EdgeGenerator() if with_edges else None, device)
        on_gpu = device.torch_device.type == "cuda"
        enlarger(photograph(SIDE if on_gpu else TILE))  # the same size where kernels are tuned
        image = photograph(SIDE)
        seconds = timed(lambda: enlarger(image), device)
    return result(device, seconds, SIDE**2 / 1e6, "LR megapixels", flops)


def train(device: Device, plain: bool) -> dict:
    """Returns the time of a step of the generator: forward, backward, update."""
    generator = Generator().to(device.torch_device)
    generator = make_plain(generator) if plain else device.place(generator)
    optimizer = torch.optim.Adam(generator.parameters(), fused=not plain)
    lr, hr_edges, hr = (
        torch.rand(BATCH, channels, size, size, device=device.torch_device)
        for channels, size in ((3, CROP), (1, SCALE * CROP), (3, SCALE * CROP))
    )
    lr, hr_edges, hr = (each if plain else device.send(each) for each in (lr, hr_edges, hr))

    def step() -> None:
        with device.autocast():
            sr = generator(lr, hr_edges)
        squared_error(sr, hr).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = statistics.median(timed(step, device) for _ in range(5))
    plain_generator = make_plain(Generator()).to(device.torch_device)
    flops = count_flops(lambda: plain_generator(lr, hr_edges).mean().backward())
    return result(device, seconds, BATCH, "HR patches", flops)


def slicing(device: Device, plain: bool) -> dict:
    """Returns the time of slicing pairs of 600 x 600 and 2400 x 2400 pixels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / TRAINING
        for number in range(IMAGES):
            hr = photograph(SCALE * SIDE, number)
            for size, image in ((LR, bicubic(hr, 1 / SCALE)), (HR, hr)):
                (folder / size / TILES).mkdir(parents=True, exist_ok=True)
                write_png(folder / size / f"{number}.png", image)

        def slice_plainly() -> None:
            for size, scale in ((LR, 1), (HR, SCALE)):
                for path in (folder / size).glob("*.png"):
                    image = np.asarray(Image.open(path))
                    for at, tile in cut(image, Grid(SIDE, SIDE), scale).items():
                        file = folder / size / TILES / tile_name(path.stem, *at)
                        Image.fromarray(tile).save(file)

        def slice_ours() -> None:
            slice_images_w_overlapping.main(["--root", name])

        seconds = timed(slice_plainly if plain else slice_ours)
    return result(device, seconds / IMAGES, (SIDE / 1e3) ** 2, "LR megapixels")


def joining(device: Device, plain: bool) -> dict:
    """Returns the time of joining 2400 x 2400 pixels; plainly, the tiles' insides side by side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / TEST / LR
        (folder / OUTPUT).mkdir(parents=True)
        grid = Grid(SIDE, SIDE)
        for number in range(IMAGES):
            write_png(folder / f"{number}.png", photograph(SIDE, number))
            stamp = tile_stamp(folder / f"{number}.png", grid)
            for at, tile in cut(photograph(SCALE * SIDE, number), grid, SCALE).items():
                write_png(folder / OUTPUT / tile_name(str(number), *at), tile, stamp)

        def join_plainly() -> None:
            margin = SCALE * grid.pad // 2
            for number in range(IMAGES):
                image = np.empty((SCALE * SIDE, SCALE * SIDE, 3), np.uint8)
                for at in grid:
                    tile = np.asarray(Image.open(folder / OUTPUT / tile_name(str(number), *at)))
                    image[grid.cell(*at, SCALE)] = tile[margin:-margin, margin:-margin]
                Image.fromarray(image).save(folder / OUTPUT / f"joined_{number}.png")

        def join_ours() -> None:
            join_slice_images.main(["--root", name])

        seconds = timed(join_plainly if plain else join_ours)
    return result(device, seconds / IMAGES, (SIDE / 1e3) ** 2, "LR megapixels")


def photograph(side: int, number: int = 0) -> np.ndarray:
    """Returns `(side, side, 3)` uint8: a photograph of scikit-image's, mirrored to fill."""
    names = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)
    image = names[number % len(names)]()
    missing = [(0, max(0, side - length)) for length in image.shape[:2]]
    return np.pad(image, (*missing, (0, 0)), mode="symmetric")[:side, :side]


STAGES: dict[str, Callable[[Device, bool], dict]] = {
    "test": test,
    "test, no edges": lambda device, plain: test(device, plain, with_edges=False),
    "training step": train,
    "slicing": slicing,
    "joining": joining,
}

if __name__ == "__main__":
    with plain_errors():
        main()
