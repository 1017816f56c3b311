"""Step 1: cuts the training and test images into overlapping tiles.

    python slice_images_w_overlapping.py [--root DIR] [--tiles 6] [--pad 8] [--workers N]

TrainingSet/600px, TrainingSet/2400px and TestSet/600px each get a folder `croppedoverl` with
the tiles `{id}_{row}_{col}.png` of their images. An HR image without an LR partner gets one:
bicubic, antialiased, a quarter of its size. What is cut already is left as it is.
"""

import argparse
import os
import time
from pathlib import Path

from console import UserError, existing_folder, in_parallel, plain_errors, positive_int, report, say
from images import (
    ImageError,
    bicubic,
    image_size,
    read_image,
    read_photo,
    read_stamp,
    write_png,
)
from tiles import (
    HR,
    LR,
    MADE,
    ROOT,
    SCALE,
    TEST,
    TILES,
    TRAINING,
    Grid,
    Position,
    cut_tile,
    find_images,
    find_tiles,
    source_stamp,
    tile_name,
    tile_stamp,
)


def main(argv: list[str] | None = None) -> None:
    """Slices all images below `--root`; exits with 1 if any had to be left out."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=existing_folder, default=ROOT, help="folder of TrainingSet/ and TestSet/")
    add("--tiles", type=positive_int, default=6, help="tiles per row and per column")
    add("--pad", type=even_int, default=8, help="LR pixels that neighbours share, even")
    add("--workers", type=positive_int, default=os.cpu_count(), help="threads")
    options = parser.parse_args(argv)

    with plain_errors():
        start, count, left_out, folders = time.monotonic(), 0, [], []
        for folder in (options.root / TRAINING, options.root / TEST):
            pairs, warnings = find_pairs(folder)
            earlier = {size: find_tiles(folder / size / TILES) for size in (LR, HR)}
            jobs = [
                (*pair, name, earlier, options.tiles, options.pad) for name, pair in pairs.items()
            ]
            done, problems = in_parallel(slice_pair, jobs, options.workers, folder.name)
            count += done
            left_out += warnings + problems
            folders += [str(folder / LR / TILES)] if done else []
            if not pairs and not warnings:
                say(f"{folder}: no images in {LR}/ or {HR}/")
        if not count and not left_out:
            raise UserError(
                f"{options.root}: no images; put those to enlarge into {TEST}/{LR},"
                f" those to train on into {TRAINING}/{HR}"
            )
        report("Sliced", count, left_out, start, " and ".join(folders) or "no tiles")


def even_int(text: str) -> int:
    """Parses an option that is an even number of at least 0."""
    if not text.isdecimal() or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an even number of 0 or more")
    return int(text)


def find_pairs(folder: Path) -> tuple[dict[str, tuple[Path, Path | None]], list[str]]:
    """Returns the (LR, HR) images of a set by id, and warnings about those that cannot be used.

    An LR image that is still to be made has its future path here; HR is None for a test image
    whose ground truth nobody has.
    """
    lr, warnings = find_images(folder / LR)
    hr, twins = find_images(folder / HR)
    pairs, made = {}, 0
    for name in sorted(lr.keys() | hr.keys()):
        if name not in lr:
            named = f"image_{LR}_{name}" if name != hr[name].stem else name
            lr[name] = folder / LR / f"{named}.png"
            made += 1
        if name not in hr and folder.name == TRAINING:
            warnings.append(f"{lr[name]}: has no HR partner in {folder / HR}; add it")
        else:
            pairs[name] = lr[name], hr.get(name)
    if made:
        say(f"{folder}: making {made} LR images from HR by bicubic, a quarter of the size")
    return pairs, warnings + twins


def slice_pair(
    lr_path: Path,
    hr_path: Path | None,
    name: str,
    earlier: dict[str, dict[str, dict[Position, Path]]],
    tiles: int,
    pad: int,
) -> list[str]:
    """Cuts one LR image and, in the training set, its HR partner.

    Args:
        name: their id.
        earlier: the tiles of the set that are there already: {`LR` or `HR`: {id: tiles}}.

    Returns:
        A sentence for everything in the images that tiles cannot hold.

    Raises:
        ImageError: an image cannot be used, or the two do not fit each other.
    """
    if hr_path:
        make_lr(lr_path, hr_path)
    grid = Grid.of(lr_path, tiles, pad)
    if hr_path:
        height, width = image_size(hr_path)
        if (height // SCALE, width // SCALE) != (grid.height, grid.width):
            raise ImageError(
                f"{hr_path}: its size {width}x{height} is not {SCALE} times that of"
                f" {lr_path.name}, {grid.width}x{grid.height}; remove the latter to have it made"
            )
    folder = lr_path.parent.parent
    tiled = earlier[LR].get(name, {})
    notes = slice_image(lr_path, name, folder / LR / TILES, tiled, grid)
    if hr_path and folder.name == TRAINING:
        tiled = earlier[HR].get(name, {})
        notes += slice_image(hr_path, name, folder / HR / TILES, tiled, grid, SCALE)
    return notes


def make_lr(lr_path: Path, hr_path: Path) -> None:
    """Makes an LR image from HR unless there is one that is the user's own or up to date.

    HR rows and columns beyond a multiple of `SCALE` are left out, as the papers do.
    """
    stamp = f"{MADE} {source_stamp(hr_path)}"
    if os.path.lexists(lr_path):
        present = read_stamp(lr_path) or ""
        if present == stamp or not present.startswith(MADE):
            return
    if min(image_size(hr_path)) < SCALE:
        raise ImageError(f"{hr_path}: smaller than {SCALE}x{SCALE} pixels; remove it")
    lr_path.parent.mkdir(parents=True, exist_ok=True)
    write_png(lr_path, bicubic(read_image(hr_path), 1 / SCALE), stamp)


def slice_image(
    path: Path,
    name: str,
    folder: Path,
    earlier: dict[Position, Path],
    grid: Grid,
    scale: int = 1,
) -> list[str]:
    """Writes the tiles of one image into `folder`, unless those there were cut from it as it is.

    Args:
        earlier: the tiles of this image that are in `folder`, of whatever grid.
        grid: of the LR image; `path` is `scale` times its size.

    Returns:
        A sentence for every change that reading the image made.
    """
    stamp, wanted = tile_stamp(path, grid), set(grid)
    if earlier.keys() == wanted and all(read_stamp(tile) == stamp for tile in earlier.values()):
        return []
    photo = read_photo(path)
    image = photo.rgb[: scale * grid.height, : scale * grid.width]
    folder.mkdir(parents=True, exist_ok=True)
    for at in grid:
        write_png(folder / tile_name(name, *at), cut_tile(image, grid, *at, scale), stamp)
    for at in earlier.keys() - wanted:
        earlier[at].unlink(missing_ok=True)
    return [f"{path}: {note}" for note in photo.notes]


if __name__ == "__main__":
    main()
