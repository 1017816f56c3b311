"""Measures how fast every stage is, beside the plain way of doing it.

    python bench.py [--repeats 3] [--device auto] [--precision auto]

For Linux. Takes some minutes; let nothing else run. The plain way is the original's: float32,
PyTorch's default memory layout and layers, batch and spectral norm computed anew, one tile of
68 x 68 pixels for every 60 x 60 at a time; pictures one after the other at Pillow's default PNG
compression. Every measurement is a process of its own, plain and ours by turns; the figures are
medians.
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
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import join_slice_images
import slice_images_w_overlapping
import training
from inference import enlarge, for_inference
from models import EdgeGenerator, FewChannelConv, Generator, InstanceNorm, PReLU, SRResNet
from tiles import HR, LR, OUTPUT, SCALE, TEST, TILES, TRAINING, Grid, cut, tile_name, write_png
from training import Runtime, runtime

SIDE = 600  # LR pixels of the picture to enlarge
TILE, CELL = 68, 60  # LR pixels the original computes at a time, and what of them is new
BATCH, CROP = 8, 24  # of a training step
PICTURES = 4  # to slice and to join


NUMBERS = ("seconds", "amount", "flops", "peak", "memory")


def main() -> None:
    """Measures all stages and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--measure", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.plain:
            training.keep_freed_memory = lambda: None
        with runtime(options.device, options.precision) as run:
            print(json.dumps(STAGES[options.measure](run, options.plain)))
        return

    rounds = [(stage, plain) for stage in STAGES for plain in (True, False)] * options.repeats
    found: dict[tuple[str, bool], list[dict]] = {}
    for stage, plain in tqdm(rounds, "Measuring"):
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
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# The stages -----------------------------------------------------------------------------------


def result(run: Runtime, seconds: float, amount: float, unit: str, flops: float = 0) -> dict:
    """A measurement, with the peaks of matrix product and memory added."""
    if run.device.type == "cuda":
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
        "peak": matrix_product(run) if flops else 0,
    }


def matrix_product(run: Runtime) -> float:
    """FLOP/s of a large matrix product in the precision the networks run in."""
    size = 2048 if run.device.type == "cpu" else 8192
    a, b = torch.rand(2, size, size, device=run.device, dtype=run.dtype)
    a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, run) for _ in range(9))


def timed(work: Callable[[], object], run: Runtime | None = None) -> float:
    """Seconds that `work` takes, on the device too."""
    on_gpu = run is not None and run.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_plain(network: nn.Module) -> nn.Module:
    """Takes back what this repository's own layers do for speed."""
    for module in network.modules():
        if isinstance(module, FewChannelConv):
            module.__class__ = nn.Conv2d
        elif isinstance(module, InstanceNorm):
            module.__class__ = nn.InstanceNorm2d
        elif isinstance(module, PReLU):
            module.__class__ = nn.PReLU
    return network


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions in `work`, a multiply-add being two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test(run: Runtime, plain: bool, with_edges: bool = True) -> dict:
    """A whole picture; the plain way is measured on some tiles and extrapolated."""
    generator = make_plain(Generator() if with_edges else SRResNet()).to(run.device).eval()
    edge_generator = make_plain(EdgeGenerator()).to(run.device).eval()
    lr = torch.rand(1, 3, TILE, TILE, device=run.device)

    @torch.no_grad()
    def tile() -> None:
        inputs = [edge_generator(lr, lr[:, :1])] if with_edges else []
        generator(lr, *inputs).cpu()

    flops = count_flops(tile) * (SIDE / TILE) ** 2
    if plain:
        seconds = statistics.median(timed(tile, run) for _ in range(5)) * (SIDE / CELL) ** 2
    else:
        generator = for_inference(type(generator)(), run)
        edge_generator = for_inference(EdgeGenerator(), run)
        enlarge(photograph(TILE), generator, edge_generator, run)
        picture = photograph(SIDE)
        seconds = timed(lambda: enlarge(picture, generator, edge_generator, run), run)
    return result(run, seconds, SIDE**2 / 1e6, "LR megapixels", flops)


def train(run: Runtime, plain: bool) -> dict:
    """A step of the generator: forward, backward, update."""
    generator = Generator().to(run.device)
    run = Runtime(run.device, torch.float32) if plain else run
    generator = make_plain(generator) if plain else run.place(generator)
    optimizer = torch.optim.Adam(generator.parameters(), fused=not plain)
    lr, hr_edges, hr = (
        torch.rand(BATCH, channels, size, size, device=run.device)
        for channels, size in ((3, CROP), (1, SCALE * CROP), (3, SCALE * CROP))
    )
    lr, hr_edges, hr = (each if plain else run.send(each) for each in (lr, hr_edges, hr))

    def step() -> None:
        with run.autocast():
            sr = generator(lr, hr_edges)
        F.mse_loss(sr, hr).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = statistics.median(timed(step, run) for _ in range(5))
    plain_generator = make_plain(Generator()).to(run.device)
    flops = count_flops(lambda: plain_generator(lr, hr_edges).mean().backward())
    return result(run, seconds, BATCH, "HR patches", flops)


def slicing(run: Runtime, plain: bool) -> dict:
    """Pairs of 600 x 600 and 2400 x 2400 pixels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / TRAINING
        for number in range(PICTURES):
            hr = photograph(SCALE * SIDE, number)
            lr = np.asarray(Image.fromarray(hr).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for size, picture in ((LR, lr), (HR, hr)):
                (folder / size / TILES).mkdir(parents=True, exist_ok=True)
                write_png(folder / size / f"{number}.png", picture)

        def slice_plainly() -> None:
            for size, scale in ((LR, 1), (HR, SCALE)):
                for path in (folder / size).glob("*.png"):
                    picture = np.asarray(Image.open(path))
                    for at, tile in cut(picture, Grid(SIDE, SIDE), scale).items():
                        file = folder / size / TILES / tile_name(path.stem, *at)
                        Image.fromarray(tile).save(file)

        def slice_ours() -> None:
            slice_images_w_overlapping.main(["--root", name])

        seconds = timed(slice_plainly if plain else slice_ours)
    return result(run, seconds / PICTURES, (SIDE / 1e3) ** 2, "LR megapixels")


def joining(run: Runtime, plain: bool) -> dict:
    """Pictures of 2400 x 2400 pixels; the plain way puts the tiles' insides side by side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / TEST / LR
        (folder / OUTPUT).mkdir(parents=True)
        grid = Grid(SIDE, SIDE)
        for number in range(PICTURES):
            write_png(folder / f"{number}.png", photograph(SIDE, number))
            for at, tile in cut(photograph(SCALE * SIDE, number), grid, SCALE).items():
                write_png(folder / OUTPUT / tile_name(str(number), *at), tile)

        def join_plainly() -> None:
            margin = SCALE * grid.pad // 2
            for number in range(PICTURES):
                picture = np.empty((SCALE * SIDE, SCALE * SIDE, 3), np.uint8)
                for at in grid:
                    tile = np.asarray(Image.open(folder / OUTPUT / tile_name(str(number), *at)))
                    picture[grid.cell(*at, SCALE)] = tile[margin:-margin, margin:-margin]
                Image.fromarray(picture).save(folder / OUTPUT / f"joined_{number}.png")

        def join_ours() -> None:
            join_slice_images.main(["--root", name])

        seconds = timed(join_plainly if plain else join_ours)
    return result(run, seconds / PICTURES, (SIDE / 1e3) ** 2, "LR megapixels")


def photograph(side: int, number: int = 0) -> np.ndarray:
    """`(side, side, 3)` uint8: one of scikit-image's photographs, mirrored as often as it takes."""
    names = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)
    picture = names[number % len(names)]()
    missing = [(0, max(0, side - length)) for length in picture.shape[:2]]
    return np.pad(picture, (*missing, (0, 0)), mode="symmetric")[:side, :side]


STAGES: dict[str, Callable[[Runtime, bool], dict]] = {
    "test": test,
    "test, no edges": lambda run, plain: test(run, plain, with_edges=False),
    "training step": train,
    "slicing": slicing,
    "joining": joining,
}

if __name__ == "__main__":
    main()
