"""From an LR image of any size to its HR edges and its HR image, window by window.

A window is computed with a halo of its surroundings, which is then cropped, so that windows meet
without seams. Memory depends on the windows; of the image itself only 8-bit copies are kept.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import files
import images
import weights
from device import Device, is_out_of_memory, release_freed_memory, to_image, to_tensor
from models import EdgeGenerator, Generator, SRResNet
from pipeline import OnProgress
from tiles import full_area, grow, scaled, shape_of, windows, within

EDGE_HALO, TRUNK_HALO, RENDER_HALO = 12, 16, 4  # LR pixels around a window
SMALLEST_SIDE = 3  # LR pixels that the edge generator needs, as it reflects two of them
EDGE_SHARE = 0.28  # the edge generator's share of the multiply-adds of both generators
BYTES_PER_PIXEL = 21_000  # per LR pixel of a window, in 16-bit precision; 6.9 GiB at 600 x 600
LARGEST_WINDOW, SMALLEST_WINDOW = 1024, 24


@dataclass(frozen=True)
class Windows:
    """Sides of the windows in LR pixels; `render` windows lie within `trunk` windows.

    The trunk has a large receptive field but costs little; rendering is the reverse. The defaults
    suit a CPU's caches.
    """

    edges: int = 120
    trunk: int = 300
    render: int = 90

    @classmethod
    def of(cls, device: Device) -> "Windows":
        """Returns suitable windows for a device: on a GPU, what fits into half of free memory."""
        if device.torch_device.type != "cuda":
            return cls()
        free, _ = torch.cuda.mem_get_info(device.torch_device)
        side = int((free / 2 / BYTES_PER_PIXEL / (device.dtype.itemsize / 2)) ** 0.5)
        side = max(SMALLEST_WINDOW, min(side, LARGEST_WINDOW))
        return cls(side, side, side)

    def smaller(self) -> "Windows":
        """Returns windows of half the side.

        Raises:
            MemoryError: they are already the smallest.
        """
        if self.render <= SMALLEST_WINDOW:
            raise MemoryError(
                "Not enough memory even for the smallest windows; close other programs or,"
                " on a GPU, use --device cpu"
            )
        return Windows(self.edges // 2, self.trunk // 2, self.render // 2)


class Enlarger:
    """All of Edge.SRGAN: image in, image out.

    Args:
        generator: a `Generator`, or an `SRResNet`, which needs no edges; None: edges only.
        edge_generator: required by a `Generator` unless it is given edges.
        digest: of the weights, their shares and the precision, for the stamps of results.
    """

    def __init__(
        self,
        generator: SRResNet | None,
        edge_generator: EdgeGenerator | None,
        device: Device,
        digest: str = "",
    ) -> None:
        self.device, self.digest, self.windows = device, digest, Windows.of(device)
        self.needs_edges = isinstance(generator, Generator)
        self.generator = generator and for_inference(generator, device)
        self.edge_generator = edge_generator and for_inference(edge_generator, device)

    @classmethod
    def load(cls, shares: dict[Path, float], edge_generator: Path, device: Device) -> "Enlarger":
        """Returns an enlarger with networks from weight files; loads the edge generator if needed.

        Args:
            shares: of the generators, for `weights.interpolate`; empty for edges only.

        Raises:
            UserError: a required file is missing, or holds another network.
        """
        network = weights.interpolate(shares) if shares else None
        edges, paths = None, list(shares)
        if network is None or isinstance(network, Generator):
            edges = weights.load_network(edge_generator, EdgeGenerator)
            paths.append(edge_generator)
        parts = [files.digest(*paths), *(f"{share:g}" for share in shares.values()), device.dtype]
        return cls(network, edges, device, "/".join(map(str, parts)).replace("torch.", ""))

    def __call__(
        self,
        lr: np.ndarray,
        edges: np.ndarray | None = None,
        on_progress: OnProgress = lambda _: None,
    ) -> np.ndarray:
        """Returns the HR image of an LR image, `(4H, 4W, 3)` uint8, RGB; grey stays grey.

        Args:
            lr: `(H, W, 3)` uint8, RGB.
            edges: HR edges to use instead of predicted ones, `(4H, 4W)` or larger, uint8.
            on_progress: called after every window with its fraction of the work.

        Raises:
            MemoryError: there is not enough memory for the smallest windows.
        """
        edge_share = EDGE_SHARE if self.edge_generator and edges is None else 0.0
        if edge_share:
            edges = self.predict_edges(lr, lambda part: on_progress(edge_share * part))
        sr = self._retry_in_smaller_windows(
            self._render, lr, edges, lambda part: on_progress((1 - edge_share) * part)
        )
        if (lr == lr[..., :1]).all():
            sr = np.repeat(sr.mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2)
        return sr

    def predict_edges(self, lr: np.ndarray, on_progress: OnProgress = lambda _: None) -> np.ndarray:
        """Returns the HR edges of an LR image, `(4H, 4W)` uint8: probability times 255."""
        return self._retry_in_smaller_windows(self._predict_edges, lr, on_progress)

    def _retry_in_smaller_windows(
        self, work: Callable[..., np.ndarray], *arguments: object
    ) -> np.ndarray:
        """Returns the result of `work`, retrying in smaller windows if memory runs out."""
        while True:
            try:
                return work(*arguments)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.windows = self.windows.smaller()
            finally:
                release_freed_memory()
            torch.cuda.empty_cache()  # only now that the error has released its tensors

    @torch.inference_mode()
    def _predict_edges(self, lr: np.ndarray, on_progress: OnProgress) -> np.ndarray:
        asked = full_area(lr.shape)
        missing = [(0, max(0, SMALLEST_SIDE - side)) for side in lr.shape[:2]]
        lr = np.pad(lr, (*missing, (0, 0)), mode="edge")
        area = full_area(lr.shape)
        edges = np.empty(shape_of(scaled(area)), np.uint8)
        places = list(windows(area, self.windows.edges, EDGE_HALO, lr.shape))
        torch.backends.cudnn.benchmark = len(places) > 1  # kernels are timed for every new shape
        for core, seen in places:
            around = grow(seen, images.CANNY_REACH, lr.shape)
            lr_edges = images.canny(lr[around])[within(seen, around)]
            inputs = [self.device.send(to_tensor(each)) for each in (lr[seen], lr_edges)]
            with self.device.autocast():
                predicted = self.edge_generator(*inputs)
            edges[scaled(core)] = to_image(predicted)[scaled(within(core, seen))][..., 0]
            on_progress(prod(shape_of(core)) / prod(lr.shape[:2]))
        return edges[scaled(asked)]

    @torch.inference_mode()
    def _render(
        self, lr: np.ndarray, edges: np.ndarray | None, on_progress: OnProgress
    ) -> np.ndarray:
        area = full_area(lr.shape)
        hr = np.empty((*shape_of(scaled(area)), 3), np.uint8)
        places = list(windows(area, self.windows.trunk, TRUNK_HALO, lr.shape))
        torch.backends.cudnn.benchmark = len(places) > 1  # kernels are timed for every new shape
        for block, seen in places:
            with self.device.autocast():
                features = self.generator.trunk(self.device.send(to_tensor(lr[seen])))
            for core, core_seen in windows(block, self.windows.render, RENDER_HALO, lr.shape):
                inputs = [features[:, :, *within(core_seen, seen)]]
                if self.needs_edges:
                    inputs.append(self.device.send(to_tensor(edges[scaled(core_seen)])))
                with self.device.autocast():
                    sr = self.generator.render(*inputs)
                hr[scaled(core)] = to_image(sr[:, :, *scaled(within(core, core_seen))])
                on_progress(prod(shape_of(core)) / prod(lr.shape[:2]))
        return hr


def for_inference(network: nn.Module, device: Device) -> nn.Module:
    """Returns a copy of a network with spectral and batch norms folded into its convolutions.

    A batch norm `bn2` belongs to the convolution `conv2` beside it.
    """
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        if hasattr(module, "weight_orig"):
            remove_spectral_norm(module)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                conv_name = name.replace("bn", "conv")
                setattr(module, conv_name, fuse_conv_bn_eval(getattr(module, conv_name), child))
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.PReLU):
                setattr(module, name, nn.LeakyReLU(child.weight.item(), inplace=True))
    return device.place(folded.requires_grad_(False))
