"""Areas of images, the grid of tiles, and where images and tiles are on disk.

Slicing, testing, joining, training crops and inference windows all take their geometry from this
module. It needs no torch. Images are `(H, W, 3)` uint8, RGB; LR is the image to enlarge, HR the
one `SCALE` times its size.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np

import images
from console import ImageError

SCALE = 4
TRAINING, TEST = "TrainingSet", "TestSet"
LR, HR, TILES, OUTPUT, JOINED = "600px", "2400px", "croppedoverl", "output", "final"
SLICE_AGAIN = "run `python slice_images_w_overlapping.py` again"

Area = tuple[slice, slice]  # rows and columns of an image
Position = tuple[int, int]  # row and column of a tile, from 1


# Areas ----------------------------------------------------------------------------------------


def full_area(shape: tuple[int, ...]) -> Area:
    """Returns the area of a whole array of shape `(H, W, ...)`."""
    return slice(0, shape[0]), slice(0, shape[1])


def shape_of(area: Area) -> tuple[int, int]:
    """Returns the height and width of an area."""
    return tuple(side.stop - side.start for side in area)


def windows(
    area: Area, size: int, halo: int, shape: tuple[int, ...]
) -> Iterator[tuple[Area, Area]]:
    """Yields (core, seen): cores partition an area; `seen` is a core with at least `halo` around.

    All `seen` windows have the same shape, so that memory and tuned kernels are reused; at the
    border of the image they reach further inwards instead of beyond it.

    Args:
        area: of the image; the cores cover it.
        size: largest side of a core, plus the halo on sides where the image ends.
        halo: pixels around a core, as far as an image of `shape` extends.
    """
    outer = grow(area, halo, shape)
    sides = (_windows_along(*each, size, halo) for each in zip(area, outer, strict=True))
    for (row, seen_rows), (col, seen_cols) in product(*sides):
        yield (row, col), (seen_rows, seen_cols)


def _windows_along(
    side: slice, outer: slice, size: int, halo: int
) -> Iterator[tuple[slice, slice]]:
    """Yields (core, seen) along one side; neighbours meet in the middle of their overlap.

    It is `outer` that is divided into windows, as nothing is computed beyond it.
    """
    length = outer.stop - outer.start
    count = max(1, -(-(length - 2 * halo) // size))
    seen = min(length, -(-(length - 2 * halo) // count) + 2 * halo)
    starts = [outer.start + i * (length - seen) // max(1, count - 1) for i in range(count)]
    meets = [(a + seen + b) // 2 for a, b in pairwise(starts)]
    for start, (low, high) in zip(starts, pairwise([side.start, *meets, side.stop]), strict=True):
        yield slice(low, high), slice(start, start + seen)


def grow(area: Area, halo: int, shape: tuple[int, ...]) -> Area:
    """Returns the area plus `halo` pixels around it, clipped to an image of `shape`."""
    return tuple(
        slice(max(side.start - halo, 0), min(side.stop + halo, length))
        for side, length in zip(area, shape[:2], strict=True)
    )


def within(area: Area, outer: Area) -> Area:
    """Returns an area relative to `outer`, for an array that holds only the latter."""
    return tuple(
        slice(side.start - around.start, side.stop - around.start)
        for side, around in zip(area, outer, strict=True)
    )


def scaled(area: Area, scale: int = SCALE) -> Area:
    """Returns the area that an LR area covers in an image `scale` times as large."""
    return tuple(slice(scale * side.start, scale * side.stop) for side in area)


# The grid of tiles ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The division of an image of `height` x `width` LR pixels into `tiles` x `tiles` tiles.

    The cut lines divide the image evenly. A tile is its cell between the cut lines plus
    `pad // 2` LR pixels on every side, so neighbours share `pad` LR pixels.
    """

    height: int
    width: int
    tiles: int = 6
    pad: int = 8

    @classmethod
    def of_tiles(cls, lr: Path, found: dict[Position, Path], remedy: str, scale: int = 1) -> "Grid":
        """Returns the grid of an image's tiles, inferred from their rows, columns and sizes.

        Args:
            found: the tiles, at `scale` times the size of the image `lr`.
            remedy: what to do if a tile is missing or has the wrong size.
        """
        if not found:
            raise ImageError(f"{lr}: has no tiles; {remedy}")
        size, first, count = images.image_size(lr), min(found), max(map(max, found))
        shapes = {at: images.image_size(path) for at, path in found.items()}
        pad = shapes[first][0] // scale - shape_of(cls(*size, count).cell(*first))[0]
        grid = cls(*size, count, max(pad, 0))
        if shapes != {at: grid.tile_shape(*at, scale) for at in grid}:
            raise ImageError(f"{lr}: some of its tiles are missing or of the wrong size; {remedy}")
        return grid

    def __str__(self) -> str:
        return f"{self.tiles}x{self.tiles}+{self.pad}"

    def __iter__(self) -> Iterator[Position]:
        """Yields every (row, col), both counted from 1."""
        return product(range(1, self.tiles + 1), repeat=2)

    def cell(self, row: int, col: int, scale: int = 1) -> Area:
        """Returns the area of tile (row, col) without overlap, at `scale` times the LR size."""
        area = (
            slice(length * (number - 1) // self.tiles, length * number // self.tiles)
            for length, number in ((self.height, row), (self.width, col))
        )
        return scaled(area, scale)

    def tile_shape(self, row: int, col: int, scale: int = 1) -> tuple[int, int]:
        """Returns the height and width of tile (row, col), overlap included."""
        height, width = shape_of(self.cell(row, col, scale))
        return height + self.pad * scale, width + self.pad * scale


def cut_tile(image: np.ndarray, grid: Grid, row: int, col: int, scale: int = 1) -> np.ndarray:
    """Returns one tile; beyond the image's border it is reflected.

    The mirror is the border itself, not the outermost pixel, so that LR and HR agree.

    Args:
        image: `(scale * grid.height, scale * grid.width, 3)`.

    Returns:
        Of shape `grid.tile_shape(row, col, scale)`.
    """
    margin = grid.pad // 2 * scale
    cell = grid.cell(row, col, scale)
    inside = grow(cell, margin, image.shape)
    beyond = [
        (margin - wanted.start + there.start, margin + wanted.stop - there.stop)
        for wanted, there in zip(cell, inside, strict=True)
    ]
    return np.pad(image[inside], (*beyond, (0, 0)), mode="symmetric")


def join(tiles: dict[Position, np.ndarray], grid: Grid, scale: int = 1) -> np.ndarray:
    """Returns the image covered by `tiles`, with neighbours cross-faded where they overlap.

    The exact inverse of `cut_tile`.
    """
    overlap, numbers = grid.pad * scale, range(1, grid.tiles + 1)
    columns = (_crossfade([tiles[row, col] for row in numbers], overlap) for col in numbers)
    padded = _crossfade([column.swapaxes(0, 1) for column in columns], overlap).swapaxes(0, 1)
    margin = overlap // 2
    return padded[margin : padded.shape[0] - margin, margin : padded.shape[1] - margin]


def _crossfade(parts: list[np.ndarray], overlap: int) -> np.ndarray:
    """Joins parts vertically; each shares its first `overlap` rows with the part above it."""
    weight = ((np.arange(overlap) + 0.5) / overlap).astype(np.float32)[:, None, None]
    done, last = [], parts[0]
    for part in parts[1:]:
        settled, tail = np.split(last, [len(last) - overlap])
        head, rest = np.split(part, [overlap])
        faded = np.rint(tail + (head.astype(np.float32) - tail) * weight).astype(part.dtype)
        done.append(settled)
        last = np.concatenate([faded, rest])
    return np.concatenate([*done, last])


# Names and folders ----------------------------------------------------------------------------


def image_id(path: Path) -> str:
    """Returns `0006` for `image_600px_0006.png`, and any other file's name without suffix."""
    match = re.fullmatch(r"image_\d+px_(.+)", path.stem, re.DOTALL)
    return match[1] if match else path.stem


def find_images(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns the images of a folder by id, sorted by id, and a line for each that is left out.

    In an LR folder, `0001x4.png`, as named in benchmark sets, gets the id of `0001.png` in the HR
    folder beside it, unless another image in either folder has that id or that name.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    listed, problems = select_images(path for path in paths if not path.name.startswith("."))
    found: dict[str, Path] = {}
    for path in listed:
        if (twin := found.setdefault(image_id(path), path)) != path:
            problems.append(f"{path}: has the same id as {twin.name}; rename one of them")
    hr = find_images(folder.with_name(HR))[0] if folder.name == LR else {}
    for name in list(found):
        plain = name.removesuffix(f"x{SCALE}")
        if plain in hr and plain not in found and name not in hr:
            found[plain] = found.pop(name)
    return dict(sorted(found.items())), problems


def walk(folder: Path, recursive: bool = False) -> Iterator[Path]:
    """Yields a folder's files, with `recursive` its sub-folders' too; hidden ones are left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def select_images(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Returns the images among files, and a line for each in an unsupported format."""
    found, problems = [], []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in images.SUFFIXES:
            found.append(path)
        elif suffix in images.FOREIGN:
            problems.append(f"{path}: {suffix} is not supported; convert it to PNG")
    return found, problems


def tile_name(name: str, row: int, col: int) -> str:
    """Returns the file name of tile (row, col) of the image with the id `name`."""
    return f"{name}_{row:02d}_{col:02d}.png"


def find_tiles(folder: Path) -> dict[str, dict[Position, Path]]:
    """Returns {id: {(row, col): path}} of all files in a folder that are named like tiles."""
    found: dict[str, dict[Position, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)_(\d+)_(\d+)", path.stem, re.DOTALL)  # original: 0006_1_6
        if match and not path.name.startswith("."):
            found.setdefault(match[1], {}).setdefault((int(match[2]), int(match[3])), path)
    return found
