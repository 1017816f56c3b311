"""Step 1: cuts the training and test pictures into overlapping tiles.

    python slice_images_w_overlapping.py [--root DIR] [--tiles 6] [--pad 8] [--workers N]

TrainingSet/600px, TrainingSet/2400px and TestSet/600px each get a folder `croppedoverl` with
the tiles `{id}_{row}_{col}.png` of their pictures. An HR picture without an LR partner gets
one: bicubic, antialiased, a quarter of its size. What is cut already is left as it is.
"""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from tiles import (
    HR,
    LR,
    ROOT,
    SCALE,
    TEST,
    TILES,
    TRAINING,
    Grid,
    PictureError,
    cut,
    find_pictures,
    find_tiles,
    in_parallel,
    picture_id,
    picture_size,
    read_picture,
    read_stamp,
    tile_name,
    write_png,
)

MADE = "bicubic of"


def main(argv: list[str] | None = None) -> int:
    """Slices all pictures below `--root`; returns 1 if any had to be skipped, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="holds TrainingSet/ and TestSet/")
    parser.add_argument("--tiles", type=int, default=6, help="tiles in a row and in a column")
    parser.add_argument("--pad", type=int, default=8, help="LR pixels that neighbours share, even")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    options = parser.parse_args(argv)
    if not options.root.is_dir():
        parser.error(f"--root: there is no folder {options.root}")

    skipped = []
    for subset in (TRAINING, TEST):
        folder = options.root / subset
        pairs, complaints = find_pairs(folder)
        jobs = [(folder, *pair, options.tiles, options.pad) for pair in pairs]
        skipped += complaints + in_parallel(slice_pair, jobs, options.workers, subset)
        if not pairs:
            print(f"{folder}: no pictures in {LR}/ or {HR}/")
    for complaint in skipped:
        print(f"Skipped {complaint}", file=sys.stderr)
    return 1 if skipped else 0


def find_pairs(folder: Path) -> tuple[list[tuple[Path, Path | None]], list[str]]:
    """The (LR, HR) pictures of a set, and complaints about those that cannot be used.

    An LR picture that is still to be made has its future path here; HR is None for a test
    picture whose truth nobody has.
    """
    lr, complaints = find_pictures(folder / LR)
    hr, twins = find_pictures(folder / HR)
    pairs, made = [], 0
    for name in sorted(lr.keys() | hr.keys()):
        if name in hr and name not in lr:
            named = f"image_{LR}_{name}" if name != hr[name].stem else name
            lr[name] = folder / LR / f"{named}.png"
            made += 1
        if name in lr and name not in hr and folder.name == TRAINING:
            complaints.append(f"{lr[name]}: has no HR partner in {folder / HR}")
        else:
            pairs.append((lr[name], hr.get(name)))
    if made:
        print(f"{folder}: making {made} LR pictures from HR by bicubic, a quarter of the size")
    return pairs, complaints + twins


def slice_pair(
    folder: Path, lr_path: Path, hr_path: Path | None, tiles: int, pad: int
) -> list[str]:
    """Cuts one LR picture and, in the training set, its HR partner; returns complaints."""
    try:
        if hr_path:
            make_lr(lr_path, hr_path)
        grid = Grid.of(lr_path, tiles, pad)
        height, width = picture_size(hr_path) if hr_path else (None, None)
        fits = (height, width) == (SCALE * grid.height, SCALE * grid.width)
        if hr_path and not fits and not was_made(lr_path):
            raise PictureError(
                f"{hr_path}: its size {width}x{height} is not {SCALE} times that of"
                f" {lr_path.name}, {grid.width}x{grid.height}; remove the latter to have it made"
            )
        slice_picture(lr_path, folder / LR / TILES, grid)
        if hr_path and folder.name == TRAINING:
            slice_picture(hr_path, folder / HR / TILES, grid, SCALE)
    except PictureError as error:
        return [str(error)]
    return []


def was_made(lr_path: Path) -> bool:
    """Whether `make_lr` made this LR picture."""
    return (read_stamp(lr_path) or "").startswith(MADE)


def make_lr(lr_path: Path, hr_path: Path) -> None:
    """Makes an LR picture from HR unless there is one that is the user's own or up to date.

    HR rows and columns beyond a multiple of `SCALE` are left out, as the papers do.
    """
    stamp = f"{MADE} {source_stamp(hr_path)}"
    if lr_path.exists() and (not was_made(lr_path) or read_stamp(lr_path) == stamp):
        return
    hr = read_picture(hr_path)
    height, width = hr.shape[0] // SCALE, hr.shape[1] // SCALE
    if not height or not width:
        raise PictureError(f"{hr_path}: smaller than {SCALE}x{SCALE} pixels; remove it")
    image = Image.fromarray(hr[: SCALE * height, : SCALE * width])
    lr = image.resize((width, height), Image.Resampling.BICUBIC)
    lr_path.parent.mkdir(parents=True, exist_ok=True)
    write_png(lr_path, np.asarray(lr), stamp)


def slice_picture(path: Path, folder: Path, grid: Grid, scale: int = 1) -> None:
    """Writes the tiles of one picture into `folder`, unless those there were cut from it as it is.

    Args:
        grid: of the LR picture; `path` is `scale` times its size.
    """
    name = picture_id(path)
    stamp = f"{source_stamp(path)} {grid.tiles}x{grid.tiles} pad {grid.pad}"
    wanted = {position: folder / tile_name(name, *position) for position in grid}
    if all(read_stamp(tile) == stamp for tile in wanted.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    picture = read_picture(path)[: scale * grid.height, : scale * grid.width]
    for position, tile in cut(picture, grid, scale).items():
        write_png(wanted[position], tile, stamp)
    for position, tile in find_tiles(folder).get(name, {}).items():
        if position not in wanted:
            tile.unlink()


def source_stamp(path: Path) -> str:
    """Tells whether a file is still the one something was made from."""
    status = path.stat()
    return f"{quote(path.name)} {status.st_size} {status.st_mtime_ns}"


if __name__ == "__main__":
    sys.exit(main())
