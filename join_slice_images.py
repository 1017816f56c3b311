"""Step 3: joins the HR tiles that `main.py test` wrote into whole pictures.

    python join_slice_images.py [--root DIR] [--tiles 6] [--pad 8] [--workers N]

The tiles in TestSet/600px/output move into `output/{id}/`, the joined picture is
`output/final/candidate_{id}.png`. Neighbouring tiles are cross-faded where they overlap.
"""

import argparse
import os
import sys
from pathlib import Path

from tiles import (
    JOINED,
    LR,
    OUTPUT,
    ROOT,
    SCALE,
    TEST,
    Grid,
    PictureError,
    find_pictures,
    find_tiles,
    in_parallel,
    join,
    picture_id,
    picture_size,
    read_picture,
    tile_name,
    write_png,
)


def main(argv: list[str] | None = None) -> int:
    """Joins all pictures below `--root`; returns 1 if any had to be left out, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="holds TestSet/")
    parser.add_argument("--tiles", type=int, default=6, help="as the pictures were sliced")
    parser.add_argument("--pad", type=int, default=8, help="as the pictures were sliced")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    options = parser.parse_args(argv)
    if not options.root.is_dir():
        parser.error(f"--root: there is no folder {options.root}")

    folder = options.root / TEST / LR
    pictures, left_out = find_pictures(folder)
    fresh = find_tiles(folder / OUTPUT)
    for name in fresh.keys() - pictures.keys():
        tile = next(iter(fresh[name].values()))
        left_out.append(f"{tile}: belongs to no picture in {folder}; remove it and its like")
    jobs = [
        (path, folder / OUTPUT, fresh.get(name, {}), options.tiles, options.pad)
        for name, path in pictures.items()
    ]
    left_out += in_parallel(join_picture, jobs, options.workers, "Joining")
    if not pictures:
        print(f"{folder}: no pictures")
    for complaint in left_out:
        print(f"Left out {complaint}", file=sys.stderr)
    return 1 if left_out else 0


def join_picture(
    lr_path: Path, output: Path, fresh: dict[tuple[int, int], Path], tiles: int, pad: int
) -> list[str]:
    """Joins one picture from its tiles, the fresh ones first, then those moved earlier.

    Returns:
        Why the picture had to be left out, if it had to be.
    """
    name = picture_id(lr_path)
    moved = output / name
    try:
        grid = Grid.of(lr_path, tiles, pad)
        found = find_tiles(moved).get(name, {}) | fresh
        check_tiles(name, output, found, grid)
        picture = join({at: read_picture(path) for at, path in found.items()}, grid, SCALE)
        (output / JOINED).mkdir(parents=True, exist_ok=True)
        write_png(output / JOINED / f"candidate_{name}.png", picture)
    except PictureError as error:
        return [str(error)]
    moved.mkdir(exist_ok=True)
    for path in fresh.values():
        path.replace(moved / path.name)
    return []


def check_tiles(name: str, output: Path, found: dict[tuple[int, int], Path], grid: Grid) -> None:
    """Raises PictureError unless exactly the tiles of the grid are there, each of its size."""
    wanted = set(grid)
    if not found:
        raise PictureError(f"{name}: has no tiles in {output}; run `python main.py test`")
    if missing := sorted(wanted - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PictureError(
            f"{output / tile_name(name, *missing[0])}: missing{more}; run `python main.py test`"
        )
    if foreign := sorted(found.keys() - wanted):
        raise PictureError(f"{found[foreign[0]]}: not one of {grid.tiles}x{grid.tiles}; remove it")
    for position, path in found.items():
        size, expected = picture_size(path), grid.tile_shape(*position, SCALE)
        if size != expected:
            raise PictureError(
                f"{path}: {size[1]}x{size[0]} pixels instead of {expected[1]}x{expected[0]};"
                " join with the --tiles and --pad of the slicing, or slice and test it again"
            )


if __name__ == "__main__":
    sys.exit(main())
