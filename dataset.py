"""Training data: random crops of paired tiles, their Canny edges, and the held-out images.

All randomness follows from (seed, batch number), so that training can go on after a stop, or on
another number of processes with as large a batch in all, with the very crops it would have seen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as transforms

from console import progress
from device import to_tensor
from images import CANNY_REACH, ImageError, canny, image_size, read_image
from tiles import (
    HR,
    LR,
    SCALE,
    SLICE_AGAIN,
    TILES,
    TRAINING,
    Area,
    check_pair,
    find_images,
    find_tiles,
    grow,
    scaled,
    within,
)

JPEG_QUALITIES = 60, 100


def split(root: Path, held_out: int) -> tuple[list[str], dict[str, tuple[Path, Path]]]:
    """Divides the training set by images, never by tiles.

    Args:
        root: folder of `TrainingSet/`.
        held_out: images to keep from training; at most a quarter of them all.

    Returns:
        The ids of the images to train on, and {id: (LR, HR)} of those to validate with, evenly
        spread over the sorted ids.

    Raises:
        ImageError: an image has no tiles, or not all, or not of the image as it is now.
    """
    lr, _ = find_images(root / TRAINING / LR)
    hr, _ = find_images(root / TRAINING / HR)
    lr_tiles = find_tiles(root / TRAINING / LR / TILES)
    whole = [name for name in sorted(lr_tiles) if name in lr and name in hr]
    if whole and (without := sorted((lr.keys() | hr.keys()) - set(whole))):
        path = (lr | hr)[without[0]]
        others = f", as {len(without) - 1} others" if without[1:] else ""
        raise ImageError(f"{path}: not sliced, or without a partner{others}; {SLICE_AGAIN}")
    hr_tiles = find_tiles(root / TRAINING / HR / TILES)
    for name in progress(whole, "Checking tiles", unit="image", leave=False):
        check_pair(name, lr[name], hr[name], lr_tiles[name], hr_tiles.get(name, {}))
    count = min(held_out, len(whole) // 4)
    chosen = {whole[i * len(whole) // count] for i in range(count)}
    training = [name for name in whole if name not in chosen]
    return training, {name: (lr[name], hr[name]) for name in sorted(chosen)}


class CropRequest(NamedTuple):
    """One crop to make: of which tile, of how many LR pixels a side, with which random numbers."""

    tile: int
    size: int
    seed: tuple[int, int]


class CropSampler(Sampler[list[CropRequest]]):
    """Batches of crop requests, without end; every tile once an epoch, one crop size per batch.

    Args:
        tiles: how many there are.
        batch_size: crops per batch in each process.
        sizes: smallest and largest crop in LR pixels a side.
        seed: of everything random.
        start: number of the first batch.
        rank: this process's number of `world`; all take their share of the same larger batch.
    """

    def __init__(
        self,
        tiles: int,
        batch_size: int,
        sizes: tuple[int, int],
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tiles, self.batch_size, self.sizes, self.seed = tiles, batch_size, sizes, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[CropRequest]]:
        epoch, order = -1, None
        number = self.start
        while True:
            smallest, largest = self.sizes
            size = int(
                np.random.default_rng((self.seed, 0, number)).integers(smallest, largest + 1)
            )
            # crops are counted over all batches and processes; `position` is a crop's number
            first = (number * self.world + self.rank) * self.batch_size
            requests = []
            for position in range(first, first + self.batch_size):
                if position // self.tiles != epoch:
                    epoch = position // self.tiles
                    order = np.random.default_rng((self.seed, 1, epoch)).permutation(self.tiles)
                requests.append(
                    CropRequest(int(order[position % self.tiles]), size, (self.seed, position))
                )
            yield requests
            number += 1


class PairedTiles(Dataset):
    """Random crops of LR tiles and of the same place in HR.

    An item is a dict of uint8 tensors: `lr` (3, s, s) and `hr` (3, 4s, 4s) in [0, 255] and, where
    asked for, `lr_edges` (1, s, s) and `hr_edges` (1, 4s, 4s) in {0, 255}; and of `softness` (2,),
    uniform random numbers in [0, 1) for the soft labels.

    Args:
        root: folder of `TrainingSet/`, sliced.
        names: ids of the images whose tiles to use.
        largest: the largest crop that will be drawn, LR pixels a side.
        color: vary brightness, contrast, saturation and hue, besides flips and quarter turns.
        jpeg: probability that the LR crop passes through JPEG, at a quality of 60 to 100.
        edges: which Canny edges to compute: any of "lr", "hr".

    Raises:
        ImageError: there are no tiles, or they are smaller than the crops.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        largest: int,
        color: bool = False,
        jpeg: float = 0,
        edges: tuple[str, ...] = (),
    ) -> None:
        self.color, self.jpeg, self.edges = color, jpeg, edges
        lr_folder, hr_folder = (root / TRAINING / size / TILES for size in (LR, HR))
        lr, hr = find_tiles(lr_folder), find_tiles(hr_folder)
        self.pairs = [
            (lr[name][at], hr[name][at])
            for name in names
            for at in sorted(lr.get(name, {}).keys() & hr.get(name, {}).keys())
        ]
        if not self.pairs:
            raise ImageError(f"{lr_folder}: no tiles; run `python slice_images_w_overlapping.py`")
        for name in names:
            first = lr[name].get((1, 1))  # the smallest of an image's tiles
            if first and min(image_size(first)) < largest:
                height, width = image_size(first)
                raise ImageError(
                    f"{first}: {width}x{height} pixels are too few for crops of"
                    f" {largest}x{largest}; slice these images with fewer --tiles"
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, request: CropRequest) -> dict[str, Tensor]:
        rng = np.random.default_rng((*request.seed, 2))
        lr, hr = map(read_image, self.pairs[request.tile])
        height, width, _ = lr.shape
        if hr.shape[:2] != (SCALE * height, SCALE * width):
            raise ImageError(
                f"{self.pairs[request.tile][1]}: not {SCALE} times its LR tile's size;"
                " run `python slice_images_w_overlapping.py` again"
            )
        top = int(rng.integers(height - request.size + 1))
        left = int(rng.integers(width - request.size + 1))
        changes = draw_colors(rng) if self.color else []
        flip, turns = bool(rng.integers(2)), int(rng.integers(4))
        softness = torch.from_numpy(rng.random(2, dtype=np.float32))
        quality = int(rng.integers(JPEG_QUALITIES[0], JPEG_QUALITIES[1] + 1))
        compressed = rng.random() < self.jpeg

        area = slice(top, top + request.size), slice(left, left + request.size)
        item = crop_pair(lr, hr, area, self.edges, changes, quality if compressed else None)
        item = {key: turn(value, flip, turns).contiguous() for key, value in item.items()}
        return item | {"softness": softness}


def crop_pair(
    lr: np.ndarray,
    hr: np.ndarray,
    area: Area,
    edges: tuple[str, ...],
    changes: list[tuple] = (),
    quality: int | None = None,
) -> dict[str, Tensor]:
    """Returns the crops of an LR and an HR image at one place, as an item of `PairedTiles`.

    Recolouring, JPEG and Canny see a margin around the crop, so that nothing begins at its border.

    Args:
        lr, hr: `(H, W, 3)` and `(4H, 4W, 3)` uint8, RGB.
        area: of the LR image.
        changes: of `draw_colors`, the same for LR and HR.
        quality: of the JPEG that the LR crop passes through; None for none.
    """
    outer = grow(area, CANNY_REACH, lr.shape)
    inner, item = within(area, outer), {}
    for kind, image, scale in (("lr", lr, 1), ("hr", hr, SCALE)):
        crop = to_tensor(image[scaled(outer, scale)])[0]
        for change, amount in changes:
            crop = change(crop, amount)
        if kind == "lr" and quality is not None:
            crop = through_jpeg(crop, quality)
        item[kind] = crop[:, *scaled(inner, scale)]
        if kind in edges:
            found = canny(crop.permute(1, 2, 0).numpy())
            item[f"{kind}_edges"] = torch.from_numpy(found)[None, *scaled(inner, scale)]
    return item


def draw_colors(rng: np.random.Generator) -> list[tuple]:
    """Returns (function, amount) of the colour changes to make, each with probability one half."""
    ranges = [
        (transforms.adjust_brightness, 0.8, 1.2),
        (transforms.adjust_contrast, 0.8, 1.2),
        (transforms.adjust_saturation, 0.5, 1.5),
        (transforms.adjust_hue, -0.5, 0.5),
    ]
    drawn = [(change, float(rng.uniform(low, high))) for change, low, high in ranges]
    return [each for each, keep in zip(drawn, rng.random(len(drawn)) < 0.5, strict=True) if keep]


def through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Returns a (3, H, W) uint8 image as JPEG of a quality of 0 to 100 gives it back."""
    bgr = image.flip(0).permute(1, 2, 0).contiguous().numpy()
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = torch.from_numpy(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return decoded.permute(2, 0, 1).flip(0)


def turn(image: Tensor, flip: bool, turns: int) -> Tensor:
    """Returns a (C, H, W) image, mirrored left to right if asked to, then turned by quarters."""
    return torch.rot90(image.flip(-1) if flip else image, turns, (-2, -1))
