"""Step 1: cuts the training and test images into overlapping tiles.

    python slice_images_w_overlapping.py [--root DIR] [--tiles 6] [--pad 8] [--threads N]

TrainingSet/600px, TrainingSet/2400px and TestSet/600px each get a folder `croppedoverl` with
the tiles `{id}_{row}_{col}.png` of their images. An HR image without an LR partner gets one:
bicubic, antialiased, a quarter of its size.
"""

import os
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import console
import files
import images
import pipeline
import tiles
from console import ImageError, UserError
from pipeline import Finish, OnProgress, Stamp
from tiles import HR, LR, SCALE, TEST, TILES, TRAINING

even = console.option(int, "an even number of 0 or more", lambda n: n >= 0 and n % 2 == 0)


def main(argv: list[str] | None = None) -> None:
    """Slices all images below `--root`."""
    parser = console.Parser(__doc__)
    add, folder = parser.add_argument, console.existing_folder
    add("--root", type=folder, default=console.ROOT, help="folder of TrainingSet/ and TestSet/")
    add("--tiles", type=console.count, default=6, help="tiles per row and per column")
    add("--pad", type=even, default=8, help="overlap of neighbouring tiles in LR pixels")
    threads = console.processor_share()
    add("--threads", type=console.count, default=threads, help="images processed at a time")
    options = parser.parse_args(argv)

    with console.plain_errors():
        sets = [find_pairs(options.root / name) for name in (TRAINING, TEST)]
        jobs, problems = (list(chain(*each)) for each in zip(*sets, strict=True))
        if not jobs and not problems:
            raise UserError(
                f"{options.root}: no images; put those to upscale into {TEST}/{LR},"
                f" those to train on into {TRAINING}/{HR}"
            )
        where = " and ".join(sorted({str(job.target) for job in jobs}))

        def work(pair: Pair, _: OnProgress) -> Finish:
            return partial(slice_pair, pair, options.tiles, options.pad)

        pipeline.for_each(jobs, work, "Sliced", where, problems=problems, threads=options.threads)


@dataclass(frozen=True)
class Pair(pipeline.Job):
    """An LR image, the folder for its tiles, its HR image if any, and their old tiles."""

    hr: Path | None
    old: list[Path]


def find_pairs(folder: Path) -> tuple[list[Pair], list[str]]:
    """Returns the pairs of a set, and a line for each image that has to be skipped.

    An LR image that is yet to be made is listed with its future path.
    """
    (lr, problems), (hr, twins) = (tiles.find_images(folder / size) for size in (LR, HR))
    old = [tiles.find_tiles(folder / size / TILES) for size in (LR, HR)]
    pairs, problems = [], problems + twins
    for name in sorted(lr.keys() | hr.keys()):
        if name not in hr and folder.name == TRAINING:
            problems.append(f"{lr[name]}: has no HR partner in {folder / HR}; add it")
            continue
        named = f"image_{LR}_{name}" if name in hr and name != hr[name].stem else name
        path = lr.get(name, folder / LR / f"{named}.png")
        paths = [path for found in old for path in found.get(name, {}).values()]
        pairs.append(Pair(name, path, folder / LR / TILES, hr.get(name), paths))
    if made := len(hr.keys() - lr.keys()):
        console.info(f"{folder}: making {made} LR images by bicubic downscaling of HR to a quarter")
    return pairs, problems


def slice_pair(pair: Pair, count: int, pad: int) -> list[str]:
    """Cuts an LR image and, in the training set, its HR partner.

    Returns:
        Notes on everything in the images that tiles cannot hold.
    """
    if pair.hr:
        make_lr(pair.source, pair.hr)
        pipeline.check_size(pair.hr, pair.source)
    grid = tiles.Grid(*images.image_size(pair.source), count, pad)
    if min(grid.height, grid.width) < count:
        raise ImageError(f"{pair.source}: too small for {count}x{count}; slice with fewer --tiles")
    jobs, root = [(pair.source, pair.target, 1)], pair.source.parent.parent
    if pair.hr and root.name == TRAINING:
        jobs.append((pair.hr, root / HR / TILES, SCALE))
    for path in pair.old:
        path.unlink(missing_ok=True)
    notes = []
    for path, folder, scale in jobs:
        photo, stamp = images.read_photo(path), str(Stamp(files.digest(path), str(grid)))
        image = photo.rgb[: scale * grid.height, : scale * grid.width]
        for at in grid:
            tile = folder / tiles.tile_name(pair.name, *at)
            images.write_png(tile, tiles.cut_tile(image, grid, *at, scale), stamp)
        notes += photo.notes
    return notes


def make_lr(lr: Path, hr: Path) -> None:
    """Makes an LR image from HR, unless it is up to date or the user's own.

    HR rows and columns beyond a multiple of `SCALE` are dropped, as in the papers.
    """
    there, wanted = Stamp.read(lr), Stamp(files.digest(hr))
    if os.path.lexists(lr) and (there == wanted or not there.is_downscaled):
        return
    if min(images.image_size(hr)) < SCALE:
        raise ImageError(f"{hr}: smaller than {SCALE}x{SCALE} pixels; remove it")
    image = images.bicubic(images.read_image(hr), 1 / SCALE)
    images.write_png(lr, image, str(wanted))


if __name__ == "__main__":
    main()
