"""Step 3: joins the HR tiles that `main.py test` wrote into whole images.

    python join_slice_images.py [--root DIR] [--workers N]

The tiles in TestSet/600px/output move into `output/{id}/`, the joined image is
`output/final/candidate_{id}.png`. Neighbouring tiles are cross-faded where they overlap. What
tiles cannot hold (transparency, colour profile, EXIF data) comes from the LR image.
"""

import argparse
import os
import time
from pathlib import Path

from console import UserError, existing_folder, in_parallel, plain_errors, positive_int, report
from images import read_image, read_photo, write_image
from tiles import (
    JOINED,
    LR,
    OUTPUT,
    ROOT,
    SCALE,
    TEST,
    Position,
    check_tiles,
    find_images,
    find_tiles,
    grid_of,
    join,
    tile_stamp,
)


def main(argv: list[str] | None = None) -> None:
    """Joins all images below `--root`; exits with 1 if any had to be left out."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=existing_folder, default=ROOT, help="folder of TestSet/")
    add("--workers", type=positive_int, default=os.cpu_count(), help="threads")
    options = parser.parse_args(argv)

    with plain_errors():
        start, folder = time.monotonic(), options.root / TEST / LR
        images, left_out = find_images(folder)
        fresh = find_tiles(folder / OUTPUT)
        for name in sorted(fresh.keys() - images.keys()):
            tile = next(iter(fresh[name].values()))
            left_out.append(f"{tile}: belongs to no image in {folder}; remove its tiles")
        if not images and not left_out:
            raise UserError(f"{folder}: no images; put some there, then slice and test them")
        jobs = [(path, name, folder / OUTPUT, fresh.get(name, {})) for name, path in images.items()]
        done, problems = in_parallel(join_image, jobs, options.workers, "Joining")
        report("Joined", done, left_out + problems, start, folder / OUTPUT / JOINED)


def join_image(lr_path: Path, name: str, output: Path, fresh: dict[Position, Path]) -> list[str]:
    """Joins one image from its tiles, the fresh ones first, then those moved earlier.

    Returns:
        A sentence for everything that the result cannot carry.

    Raises:
        ImageError: the tiles are incomplete, or not all made from the image as it is now.
    """
    moved = output / name
    found = find_tiles(moved).get(name, {}) | fresh
    grid, remedy = grid_of(lr_path, found), "run `python main.py test` again"
    stamp = check_tiles(name, found, grid, tile_stamp(lr_path, grid), remedy, SCALE)
    sr = join({at: read_image(path) for at, path in found.items()}, grid, SCALE)
    (output / JOINED).mkdir(parents=True, exist_ok=True)
    notes = write_image(output / JOINED / f"candidate_{name}.png", sr, read_photo(lr_path), stamp)
    moved.mkdir(exist_ok=True)
    for path in fresh.values():
        path.replace(moved / path.name)
    return [f"{lr_path}: {note}" for note in notes]


if __name__ == "__main__":
    main()
