"""Measures the speed of testing and training, compared with plain PyTorch code.

    python bench.py [--repeats 3] [--device auto] [--precision auto]

For Linux. Takes some minutes; run nothing else meanwhile. The plain way is the original's: float32,
PyTorch's default memory layout and layers, batch and spectral norm not folded, one tile of
68 x 68 pixels for every 60 x 60 at a time. Every measurement runs in its own process, plain and
ours alternating; medians are printed.
"""

import resource
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import nn

import console
import device
import inference
import losses
import models
from tiles import SCALE

SIDE = 600  # LR pixels of the image to enlarge
TILE, CELL = 68, 60  # side of the original's tiles in LR pixels, with and without overlap
BATCH, CROP = 8, 24  # of a training step
GENERATOR, EDGE_GENERATOR = (64, 20), (64, 8)  # width and residual blocks


def main() -> None:
    """Runs all measurements and prints the table, row by row."""
    parser = console.Parser(__doc__)
    add = parser.add_argument
    add("--repeats", type=console.count, default=3, help="runs of each measurement")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of our code")
    options = parser.parse_args()
    line = "{:16} {:>10} {:>10} {:>8} {:>11}".format
    console.info(line("", "plain", "ours", "ratio", "memory"))
    for name in MEASURES:
        runs = [
            [run(measure, name, plain, options) for plain in (True, False)]
            for _ in range(options.repeats)
        ]
        plain, ours = (median(each[way][0] for each in runs) for way in (0, 1))
        used = median(each[1][1] for each in runs) / 2**20
        times = f"{plain:.3g} s", f"{ours:.3g} s", f"{plain / ours:.1f}x"
        console.info(line(name, *times, f"{used:.0f} MiB"))


def run(function: Callable[..., tuple], *arguments: object) -> tuple:
    """Returns the result of a function that runs in its own process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, plain: bool, options: Namespace) -> tuple[float, int]:
    """Returns the seconds of one measurement and this process's peak memory in bytes."""
    kind = device.choose_kind(options.device)
    if plain:
        on = device.Device(torch.device(kind), layout=torch.contiguous_format)
    else:
        on = device.open_device(options.device, options.precision, name == "training step")
    seconds = MEASURES[name](on, plain)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return seconds, torch.cuda.max_memory_allocated() if kind == "cuda" else used


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that `work` takes, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def make_plain(network: nn.Module) -> nn.Module:
    """Turns this repository's faster layers into PyTorch's own, their base classes."""
    for module in network.modules():
        if isinstance(module, models.FewChannelConv | models.InstanceNorm | models.PReLU):
            module.__class__ = type(module).__base__
    return network


# What is measured, each in seconds ------------------------------------------------------------


def test(on: device.Device, plain: bool, with_edges: bool = True) -> float:
    """Measures a whole image; the plain way is extrapolated from a few tiles."""
    generator = (models.Generator if with_edges else models.SRResNet)(*GENERATOR)
    edge_generator = models.EdgeGenerator(*EDGE_GENERATOR)
    if not plain:
        enlarger = inference.Enlarger(generator, edge_generator if with_edges else None, on)
        lr = np.array(Image.fromarray(skimage.data.astronaut()).resize((SIDE, SIDE)))
        # Warm-up, at the same size where kernels are tuned to it
        enlarger(lr if on.torch_device.type == "cuda" else lr[:TILE, :TILE])
        return timed(lambda: enlarger(lr))
    for network in (generator, edge_generator):
        on.place(make_plain(network)).eval()
    lr = on.send(torch.rand(1, 3, TILE, TILE))

    @torch.no_grad()
    def tile() -> None:
        generator(lr, *([edge_generator(lr, lr[:, :1])] if with_edges else [])).cpu()

    tile()
    return median(timed(tile) for _ in range(5)) * (SIDE / CELL) ** 2


def train(on: device.Device, plain: bool) -> float:
    """Measures a step of the generator: forward, backward, update."""
    generator = models.Generator(*GENERATOR)
    generator = on.place(make_plain(generator) if plain else generator)
    optimizer = torch.optim.Adam(generator.parameters(), fused=not plain)
    shapes = (3, CROP), (1, SCALE * CROP), (3, SCALE * CROP)
    lr, hr_edges, hr = (on.send(torch.rand(BATCH, n, side, side)) for n, side in shapes)

    def step() -> None:
        with on.autocast():
            sr = generator(lr, hr_edges)
        losses.squared_error(sr, hr).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return median(timed(step) for _ in range(5))


MEASURES: dict[str, Callable[[device.Device, bool], float]] = {
    "test": test,
    "test, no edges": partial(test, with_edges=False),
    "training step": train,
}

if __name__ == "__main__":
    with console.plain_errors():
        main()
