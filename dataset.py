"""Training data: random crops of paired tiles, their Canny edges, and the held-out images.

All randomness is derived from (seed, batch number), so that a resumed training sees exactly the
crops it would have seen, also with another number of processes if the total batch size is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

import console
import device
import images
import pipeline
import tiles
from console import ImageError, UserError
from tiles import HR, LR, SCALE, TILES, TRAINING

JPEG_QUALITIES = 60, 100

Pairs = dict[str, tuple[Path, Path]]  # LR and HR image by id


def split(root: Path, held_out: int) -> tuple[Pairs, Pairs]:
    """Splits the training set by images, never by tiles.

    Args:
        root: folder of `TrainingSet/`.
        held_out: images to hold out; at most a quarter of them all are.

    Returns:
        The images to train on, and those to validate on, evenly spread over the sorted ids.

    Raises:
        ImageError: an image has no partner, its LR and HR tiles do not match, or its first tile
            was cut from an older version of it.
    """
    (lr, _), (hr, _) = (tiles.find_images(root / TRAINING / size) for size in (LR, HR))
    lr_tiles, hr_tiles = (tiles.find_tiles(root / TRAINING / size / TILES) for size in (LR, HR))
    if not (lr_tiles and lr and hr):
        raise ImageError(
            f"{root / TRAINING / HR}: no tiles; put photographs there, then run"
            " `python slice_images_w_overlapping.py`"
        )
    for name in sorted(lr.keys() | hr.keys()):
        whole = name in lr_tiles and lr_tiles[name].keys() == hr_tiles.get(name, {}).keys()
        if not (whole and name in lr and name in hr):
            path = lr.get(name) or hr[name]
            raise ImageError(f"{path}: not sliced, or has no partner; {tiles.SLICE_AGAIN}")
    pairs = {name: (lr[name], hr[name]) for name in sorted(lr)}
    jobs = [
        (min(found[name].items())[1], paths[name], tiles.SLICE_AGAIN)
        for name in pairs
        for found, paths in ((lr_tiles, lr), (hr_tiles, hr))
    ]
    in_threads(pipeline.check_source, jobs, "Checking tiles")
    names, most = list(pairs), min(held_out, len(pairs) // 4)
    chosen = {names[i * len(names) // most] for i in range(most)}
    training = {name: pair for name, pair in pairs.items() if name not in chosen}
    return training, {name: pair for name, pair in pairs.items() if name in chosen}


def in_threads(work: Callable, jobs: Sequence[tuple], title: str) -> list:
    """Returns the results of a function for each job's arguments, in order; shows a bar."""
    with ThreadPoolExecutor(console.processor_share()) as pool:
        found = pool.map(lambda job: work(*job), jobs)
        return list(console.progress(found, title, len(jobs), leave=False, unit="tile"))


class CropRequest(NamedTuple):
    """A crop that the loader requests from `PairedTiles`: tile, side in LR pixels, random seed."""

    tile: int
    size: int
    seed: tuple[int, int]


def draw_batches(
    tile_count: int,
    batch_size: int,
    sizes: tuple[int, int],
    seed: int,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[CropRequest]]:
    """Yields endless batches of crop requests: every tile once per epoch, one size per batch.

    Args:
        batch_size: crops per batch in each process.
        sizes: side of the smallest and the largest crop in LR pixels.
        start: number of the first batch.
        rank: of this process among `world`; each takes its share of one larger batch.
    """
    epoch, order = -1, None
    for number in count(start):
        size = int(np.random.default_rng((seed, 0, number)).integers(*sizes, endpoint=True))
        # `position` numbers the crops over all batches and processes
        first = (number * world + rank) * batch_size
        requests = []
        for position in range(first, first + batch_size):
            if position // tile_count != epoch:
                epoch = position // tile_count
                order = np.random.default_rng((seed, 1, epoch)).permutation(tile_count)
            requests.append(CropRequest(int(order[position % tile_count]), size, (seed, position)))
        yield requests


class PairedTiles(Dataset):
    """Random crops of LR tiles and the matching crops of HR tiles.

    An item is a dict of uint8 tensors, `lr` (3, s, s) and `hr` (3, 4s, 4s) in [0, 255] and, if
    requested, `lr_edges` (1, s, s) and `hr_edges` (1, 4s, 4s) in {0, 255}; and of `softness` (2,),
    random numbers in [0, 1) for soft labels. If a tile cannot be used, the item is the error.

    Args:
        root: folder of `TrainingSet/`, sliced.
        names: ids of the images whose tiles to use; those smaller than the crops are skipped.
        largest: side of the largest crop that will be drawn, in LR pixels.
        color: vary brightness, contrast, saturation and hue, besides flips and quarter turns.
        jpeg: probability that the LR crop is compressed as JPEG, at a quality of 60 to 100.
        edges: which Canny edges to compute: any of "lr", "hr".

    Attributes:
        names, small: ids of the images that are used, and of those too small.
        size: bytes of all tiles, decoded.
        in_memory: the results of `load_pair` for all tiles, after `keep_in_memory`.
    """

    def __init__(
        self,
        root: Path,
        names: Iterable[str],
        largest: int,
        color: bool = False,
        jpeg: float = 0,
        edges: tuple[str, ...] = (),
    ) -> None:
        self.color, self.jpeg, self.edges = color, jpeg, edges
        lr, hr = (tiles.find_tiles(root / TRAINING / size / TILES) for size in (LR, HR))
        # the first tile of an image is its smallest, by a pixel at most
        shapes = {name: images.image_size(lr[name][min(lr[name])]) for name in names}
        self.names = [name for name, shape in shapes.items() if min(shape) >= largest]
        self.small = [name for name, shape in shapes.items() if min(shape) < largest]
        if not self.names:
            side = max(map(min, shapes.values()))
            or_crop = f", or use --crop {side}" if side >= 8 else ""
            raise UserError(
                f"{root / TRAINING / LR / TILES}: all tiles are smaller than the crops of"
                f" {largest}x{largest}; slice with --tiles 1 --pad 0{or_crop}"
            )
        places = [(name, at) for name in self.names for at in sorted(lr[name])]
        self.pairs = [(lr[name][at], hr[name][at]) for name, at in places]
        pixels = sum(shapes[name][0] * shapes[name][1] for name, _ in places)
        self.keeps_edges = "hr" in edges and not color  # recoloured crops have their own
        self.size = pixels * (3 + SCALE**2 * (4 if self.keeps_edges else 3))
        self.in_memory: list[list[np.ndarray]] = []

    def keep_in_memory(self) -> None:
        """Decodes all tiles and computes their HR edges, for this process and its forks, if they
        fit into half of the free memory.

        Raises:
            ImageError: a tile cannot be used.
        """
        device.release_freed_memory()  # of the previous stage
        if self.size < device.free_ram() / 2:
            jobs = [(*pair, self.keeps_edges) for pair in self.pairs]
            self.in_memory = in_threads(load_pair, jobs, "Decoding tiles")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, request: CropRequest) -> dict[str, Tensor] | Exception:
        try:
            return self.crop(request)
        except (UserError, OSError, MemoryError) as error:
            return error

    def crop(self, request: CropRequest) -> dict[str, Tensor]:
        """Returns the item of a request."""
        rng = np.random.default_rng((*request.seed, 2))
        known, tile = self.in_memory, request.tile
        lr, hr, *hr_edges = known[tile] if known else load_pair(*self.pairs[tile])
        height, width, _ = lr.shape
        top = int(rng.integers(height - request.size + 1))
        left = int(rng.integers(width - request.size + 1))
        changes = draw_colors(rng) if self.color else []
        flip, turns = bool(rng.integers(2)), int(rng.integers(4))
        softness = torch.from_numpy(rng.random(2, dtype=np.float32))
        quality = int(rng.integers(*JPEG_QUALITIES, endpoint=True))
        quality = quality if rng.random() < self.jpeg else None

        area = slice(top, top + request.size), slice(left, left + request.size)
        item = crop_pair(lr, hr, area, self.edges, changes, quality, *hr_edges)
        for key, value in item.items():
            mirrored = value.flip(-1) if flip else value
            item[key] = torch.rot90(mirrored, turns, (-2, -1)).contiguous()
        return item | {"softness": softness}


def load_pair(lr_path: Path, hr_path: Path, with_edges: bool = False) -> list[np.ndarray]:
    """Returns an LR tile, its HR tile and, if requested, the latter's edges.

    Raises:
        ImageError: one cannot be read, or their sizes do not match.
    """
    lr, hr = images.read_image(lr_path), images.read_image(hr_path)
    if hr.shape[:2] != (SCALE * lr.shape[0], SCALE * lr.shape[1]):
        raise ImageError(f"{hr_path}: not {SCALE}x the size of its LR tile; {tiles.SLICE_AGAIN}")
    return [lr, hr, images.canny(hr)] if with_edges else [lr, hr]


def crop_pair(
    lr: np.ndarray,
    hr: np.ndarray,
    area: tiles.Area,
    edges: tuple[str, ...],
    changes: Sequence[tuple] = (),
    quality: int | None = None,
    hr_edges: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Returns the crops of an LR and an HR image at one place, as an item of `PairedTiles`.

    Recolouring, JPEG and Canny see a margin around the crop, which avoids border effects.

    Args:
        lr, hr: `(H, W, 3)` and `(4H, 4W, 3)` uint8, RGB.
        area: of the LR image.
        changes: of `draw_colors`, the same for LR and HR.
        quality: of the JPEG compression of the LR crop; None for none.
        hr_edges: of the whole HR image, `(4H, 4W)` uint8, if known; nearly the same as edges
            computed on the crop and its margin.
    """
    item = {}
    outer = tiles.grow(area, images.CANNY_REACH, lr.shape)
    for kind, image, scale, known in (("lr", lr, 1, None), ("hr", hr, SCALE, hr_edges)):
        inner = tiles.scaled(tiles.within(area, outer), scale)
        crop = device.to_tensor(image[tiles.scaled(outer, scale)])[0]
        for change, amount in changes:
            crop = change(crop, amount)
        pixels = crop.permute(1, 2, 0).numpy()
        if kind == "lr" and quality is not None:
            pixels = through_jpeg(pixels, quality)
        item[kind] = torch.from_numpy(pixels[inner]).permute(2, 0, 1)
        if kind in edges:
            found = images.canny(pixels) if known is None else known[tiles.scaled(outer, scale)]
            item[f"{kind}_edges"] = torch.from_numpy(found)[None, *inner]
    return item


def draw_colors(rng: np.random.Generator) -> list[tuple]:
    """Returns (function, amount) of random colour changes, each drawn with probability one half."""
    ranges = [
        (transforms.adjust_brightness, 0.8, 1.2),
        (transforms.adjust_contrast, 0.8, 1.2),
        (transforms.adjust_saturation, 0.5, 1.5),
        (transforms.adjust_hue, -0.5, 0.5),
    ]
    drawn = [(change, float(rng.uniform(low, high))) for change, low, high in ranges]
    return [each for each, keep in zip(drawn, rng.random(len(drawn)) < 0.5, strict=True) if keep]


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Returns an `(H, W, 3)` uint8 RGB image after JPEG compression at a quality of 0 to 100."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
