"""Training data: random crops of paired tiles, their Canny edges, and the held-out pictures.

All randomness follows from (seed, batch number), so that training can go on after a stop, or on
another number of processes with as large a batch in all, with the very crops it would have seen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage.color import rgb2gray
from skimage.feature import canny as skimage_canny
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as transforms

from tiles import (
    HR,
    LR,
    SCALE,
    TILES,
    TRAINING,
    PictureError,
    find_pictures,
    find_tiles,
    picture_size,
    read_picture,
)

CANNY_SIGMA = 2
CANNY_REACH = 4 * CANNY_SIGMA  # pixels beyond which the smoothing takes nothing in


def canny(picture: np.ndarray) -> np.ndarray:
    """Canny edges of the grey picture, sigma 2, as scikit-image computes them.

    Args:
        picture: `(H, W, 3)` uint8, RGB.

    Returns:
        `(H, W)` uint8 in {0, 1}.
    """
    return skimage_canny(rgb2gray(picture), sigma=CANNY_SIGMA).astype(np.uint8)


def to_tensor(picture: np.ndarray) -> Tensor:
    """(1, C, H, W) float32 of `(H, W, C)`, of the same values."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()


def split(root: Path, held_out: int) -> tuple[list[str], dict[str, tuple[Path, Path]]]:
    """Divides the training set by pictures, never by tiles.

    Args:
        root: holds `TrainingSet/`.
        held_out: pictures to keep from training; at most a quarter of them all.

    Returns:
        The ids of the pictures to train on, and {id: (LR, HR)} of those to validate with, evenly
        spread over the sorted ids.
    """
    lr, _ = find_pictures(root / TRAINING / LR)
    hr, _ = find_pictures(root / TRAINING / HR)
    tiled = sorted(find_tiles(root / TRAINING / LR / TILES))
    whole = [name for name in tiled if name in lr and name in hr]
    count = min(held_out, len(whole) // 4)
    chosen = {whole[i * len(whole) // count] for i in range(count)}
    training = [name for name in whole if name not in chosen]
    return training, {name: (lr[name], hr[name]) for name in sorted(chosen)}


class Draw(NamedTuple):
    """One crop to make: of which tile, of how many LR pixels a side, with which random numbers."""

    tile: int
    size: int
    seed: tuple[int, int]


class CropSampler(Sampler[list[Draw]]):
    """Batches of draws, without end; every tile once an epoch, one crop size a batch.

    Args:
        tiles: how many there are.
        batch_size: draws a batch in each process.
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

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, None
        number = self.start
        while True:
            smallest, largest = self.sizes
            size = int(
                np.random.default_rng((self.seed, 0, number)).integers(smallest, largest + 1)
            )
            first = (number * self.world + self.rank) * self.batch_size
            draws = []
            for position in range(first, first + self.batch_size):
                if position // self.tiles != epoch:
                    epoch = position // self.tiles
                    order = np.random.default_rng((self.seed, 1, epoch)).permutation(self.tiles)
                draws.append(Draw(int(order[position % self.tiles]), size, (self.seed, position)))
            yield draws
            number += 1


class PairedTiles(Dataset):
    """Random crops of LR tiles and of the same place in HR.

    An item is a dict of uint8 tensors: `lr` (3, s, s) and `hr` (3, 4s, 4s) in [0, 255] and, where
    asked for, `lr_edges` (1, s, s) and `hr_edges` (1, 4s, 4s) in {0, 1}; `softness` (2,) are
    uniform random numbers in [0, 1) for the soft labels.

    Args:
        root: holds `TrainingSet/`, sliced.
        names: ids of the pictures whose tiles to use.
        largest: the largest crop that will be drawn, LR pixels a side.
        colour: vary brightness, contrast, saturation and hue, besides flips and quarter turns.
        edges: which Canny edges to compute: any of "lr", "hr".

    Raises:
        PictureError: there are no tiles, or they are smaller than the crops.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        largest: int,
        colour: bool = False,
        edges: tuple[str, ...] = (),
    ) -> None:
        self.colour, self.edges = colour, edges
        lr_folder, hr_folder = (root / TRAINING / size / TILES for size in (LR, HR))
        lr, hr = find_tiles(lr_folder), find_tiles(hr_folder)
        self.pairs = [
            (lr[name][at], hr[name][at])
            for name in names
            for at in sorted(lr.get(name, {}).keys() & hr.get(name, {}).keys())
        ]
        if not self.pairs:
            raise PictureError(f"{lr_folder}: no tiles; run `python slice_images_w_overlapping.py`")
        for name in names:
            first = lr[name].get((1, 1))  # the smallest of a picture's tiles
            if first and min(picture_size(first)) < largest:
                height, width = picture_size(first)
                raise PictureError(
                    f"{first}: {width}x{height} pixels are too few for crops of"
                    f" {largest}x{largest}; slice these pictures with fewer --tiles"
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        rng = np.random.default_rng((*draw.seed, 2))
        tiles = {"lr": read_picture(self.pairs[draw.tile][0])}
        tiles["hr"] = read_picture(self.pairs[draw.tile][1])
        height, width, _ = tiles["lr"].shape
        if tiles["hr"].shape[:2] != (SCALE * height, SCALE * width):
            raise PictureError(f"{self.pairs[draw.tile][1]}: not {SCALE} times its LR tile's size")
        top = int(rng.integers(height - draw.size + 1))
        left = int(rng.integers(width - draw.size + 1))
        recolour = draw_colours(rng) if self.colour else []
        flip, turns = bool(rng.integers(2)), int(rng.integers(4))

        item = {}
        for kind, scale in (("lr", 1), ("hr", SCALE)):
            margin = CANNY_REACH * scale if self.edges else 0  # Canny sees beyond the crop
            t, left_edge = max(top * scale - margin, 0), max(left * scale - margin, 0)
            size = draw.size * scale
            crop = tiles[kind][
                t : top * scale + size + margin, left_edge : left * scale + size + margin
            ]
            picture = torch.from_numpy(crop.copy()).permute(2, 0, 1)
            for change, amount in recolour:
                picture = change(picture, amount)
            inner = (
                slice(top * scale - t, top * scale - t + size),
                slice(left * scale - left_edge, left * scale - left_edge + size),
            )
            item[kind] = picture[:, *inner]
            if kind in self.edges:
                edges = canny(picture.permute(1, 2, 0).numpy())
                item[f"{kind}_edges"] = torch.from_numpy(edges)[None, *inner]
        item = {key: turn(value, flip, turns).contiguous() for key, value in item.items()}
        return item | {"softness": torch.from_numpy(rng.random(2, dtype=np.float32))}


def draw_colours(rng: np.random.Generator) -> list[tuple]:
    """(function, amount) of the colour changes to make, each with probability one half."""
    ranges = [
        (transforms.adjust_brightness, 0.8, 1.2),
        (transforms.adjust_contrast, 0.8, 1.2),
        (transforms.adjust_saturation, 0.5, 1.5),
        (transforms.adjust_hue, -0.5, 0.5),
    ]
    drawn = [(change, float(rng.uniform(low, high))) for change, low, high in ranges]
    return [each for each, keep in zip(drawn, rng.random(len(drawn)) < 0.5, strict=True) if keep]


def turn(picture: Tensor, flip: bool, turns: int) -> Tensor:
    """Mirrors a (C, H, W) picture left to right if asked to, then turns it by quarters."""
    return torch.rot90(picture.flip(-1) if flip else picture, turns, (-2, -1))
