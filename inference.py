"""From an LR picture to its HR edges and its HR picture, in windows, whatever its size.

A window is computed with a halo of its surroundings, of which the result is then freed, so that
windows meet without seams. Memory depends on the windows; of the picture itself only 8-bit
copies and one edge map are kept.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dataset import CANNY_REACH, canny, to_tensor
from models import EdgeGenerator, Generator, SRResNet
from tiles import SCALE
from training import Runtime

# LR pixels a side, and around it. The trunk looks far but costs little, rendering the reverse.
EDGE_WINDOW, EDGE_HALO = 120, 12
TRUNK_WINDOW, TRUNK_HALO = 300, 16
RENDER_WINDOW, RENDER_HALO = 90, 4

EDGE_SHARE = 0.28  # of the multiply-adds of both generators

Area = tuple[slice, slice]  # rows and columns of a picture


def enlarge(
    lr: np.ndarray,
    generator: SRResNet,
    edge_generator: EdgeGenerator | None,
    run: Runtime,
    progress: Callable[[float], object] = lambda _: None,
) -> np.ndarray:
    """The whole of Edge.SRGAN: picture in, picture out.

    Args:
        lr: `(H, W, 3)` uint8, RGB.
        generator: a `Generator`, or an `SRResNet`, which needs no edges; from `for_inference`.
        edge_generator: from `for_inference`; needed for a `Generator`.
        progress: told, after every window, what part of the work that was.

    Returns:
        `(4H, 4W, 3)` uint8, RGB.
    """
    pixels = lr.shape[0] * lr.shape[1]
    hr_edges, share = None, 0.0
    if isinstance(generator, Generator):
        share = EDGE_SHARE
        hr_edges = predict_edges(lr, edge_generator, run, lambda n: progress(share * n / pixels))
    return render(lr, generator, hr_edges, run, lambda n: progress((1 - share) * n / pixels))


def for_inference(network: nn.Module, run: Runtime) -> nn.Module:
    """A copy of a network with spectral and batch norms folded into its convolutions."""
    copy = type(network)(**network.arguments)
    copy.load_state_dict(network.state_dict())
    copy.eval()
    for module in list(copy.modules()):
        if hasattr(module, "weight_orig"):
            remove_spectral_norm(module)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                conv_name = name.replace("bn", "conv")
                setattr(module, conv_name, fuse_conv_bn_eval(getattr(module, conv_name), child))
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.PReLU):
                setattr(module, name, nn.LeakyReLU(child.weight.item(), inplace=True))
    return run.place(copy.requires_grad_(False))


@torch.inference_mode()
def predict_edges(
    lr: np.ndarray,
    edge_generator: EdgeGenerator,
    run: Runtime,
    progress: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """HR edges `(4H, 4W)` float16 in [0, 1] of an LR picture `(H, W, 3)` uint8.

    Args:
        edge_generator: from `for_inference`.
        progress: told, after every window, how many LR pixels are done.
    """
    height, width, _ = lr.shape
    edges = np.empty((SCALE * height, SCALE * width), np.float16)
    for core in windows((slice(0, height), slice(0, width)), EDGE_WINDOW):
        seen = grow(core, EDGE_HALO, lr)
        around = grow(seen, CANNY_REACH, lr)
        lr_edges = canny(lr[around])[within(seen, around)]
        picture = run.send(to_tensor(lr[seen])) / 255
        with run.autocast():
            predicted = edge_generator(picture, run.send(to_tensor(lr_edges[..., None])))
        inner = scaled(within(core, seen))
        edges[scaled(core)] = predicted[0, 0, *inner].half().cpu().numpy()
        progress(area_of(core))
    return edges


@torch.inference_mode()
def render(
    lr: np.ndarray,
    generator: SRResNet,
    hr_edges: np.ndarray | None,
    run: Runtime,
    progress: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """HR picture `(4H, 4W, 3)` uint8 of an LR picture `(H, W, 3)` uint8 and its HR edges.

    Args:
        generator: from `for_inference`.
        hr_edges: `(4H, 4W)` in [0, 1] for a `Generator`, None for an `SRResNet`.
        progress: told, after every window, how many LR pixels are done.
    """
    height, width, _ = lr.shape
    hr = np.empty((SCALE * height, SCALE * width, 3), np.uint8)
    for block in windows((slice(0, height), slice(0, width)), TRUNK_WINDOW):
        seen = grow(block, TRUNK_HALO, lr)
        with run.autocast():
            features = generator.trunk(run.send(to_tensor(lr[seen])) / 127.5 - 1)
        for core in windows(block, RENDER_WINDOW):
            around = grow(core, RENDER_HALO, lr)
            inputs = [features[:, :, *within(around, seen)]]
            if hr_edges is not None:
                edges = hr_edges[scaled(around)][..., None]
                inputs.append(run.send(to_tensor(edges)) * 2 - 1)
            with run.autocast():
                sr = generator.render(*inputs)
            sr = sr[0, :, *scaled(within(core, around))].permute(1, 2, 0)
            hr[scaled(core)] = ((sr + 1) * 127.5).round().byte().cpu().numpy()
            progress(area_of(core))
    return hr


# Areas ----------------------------------------------------------------------------------------


def windows(area: Area, size: int) -> Iterator[Area]:
    """Divides an area into windows of about the same size, at most `size` pixels a side."""
    rows, cols = (_divide(side, size) for side in area)
    return ((row, col) for row in rows for col in cols)


def _divide(side: slice, size: int) -> list[slice]:
    length = side.stop - side.start
    count = math.ceil(length / size)
    cuts = [side.start + i * length // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(cuts)]


def area_of(area: Area) -> int:
    """Its number of pixels."""
    return math.prod(side.stop - side.start for side in area)


def grow(area: Area, halo: int, picture: np.ndarray) -> Area:
    """The area and `halo` pixels around it, as far as the picture reaches."""
    rows, cols = (
        slice(max(side.start - halo, 0), min(side.stop + halo, length))
        for side, length in zip(area, picture.shape[:2], strict=True)
    )
    return rows, cols


def within(area: Area, outer: Area) -> Area:
    """Where an area lies in an array that holds only `outer`."""
    rows, cols = (
        slice(side.start - around.start, side.stop - around.start)
        for side, around in zip(area, outer, strict=True)
    )
    return rows, cols


def scaled(area: Area) -> Area:
    """The area of the HR picture that belongs to one of the LR picture."""
    rows, cols = (slice(SCALE * side.start, SCALE * side.stop) for side in area)
    return rows, cols
