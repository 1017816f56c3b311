"""Step 3: joins the HR tiles that `main.py test` wrote into whole images.

    python join_slice_images.py [--root DIR] [--threads N]

The tiles in TestSet/600px/output are moved into `output/{id}/`; the joined image is
`output/final/candidate_{id}.png`. Neighbouring tiles are cross-faded where they overlap. What
tiles cannot hold (transparency, colour profile, EXIF data) comes from the LR image.
"""

from functools import partial
from pathlib import Path

import console
import files
import images
import pipeline
import tiles
from console import ImageError
from pipeline import Finish, Job, OnProgress, Stamp

TEST_AGAIN = "run `python main.py test` again"


def main(argv: list[str] | None = None) -> None:
    """Joins all images below `--root`."""
    parser = console.Parser(__doc__)
    add = parser.add_argument
    add("--root", type=console.existing_folder, default=console.ROOT, help="folder of TestSet/")
    threads = console.processor_share()
    add("--threads", type=console.count, default=threads, help="images processed at a time")
    options = parser.parse_args(argv)

    with console.plain_errors():
        jobs, problems = pipeline.test_jobs(options.root, pipeline.CANDIDATE)
        output = options.root / tiles.TEST / tiles.LR / tiles.OUTPUT
        unjoined = tiles.find_tiles(output)
        for name in sorted(unjoined.keys() - {job.name for job in jobs}):
            tile = next(iter(unjoined[name].values()))
            problems.append(f"{tile}: belongs to no image in {output.parent}; remove its tiles")

        def work(job: Job, _: OnProgress) -> Finish:
            return partial(join_image, job, output / job.name, unjoined.get(job.name, {}))

        where = output / tiles.JOINED
        pipeline.for_each(jobs, work, "Joined", where, problems=problems, threads=options.threads)


def join_image(job: Job, joined: Path, unjoined: dict[tiles.Position, Path]) -> list[str]:
    """Joins one image's `unjoined` tiles, which then move to the folder `joined`, and those in it.

    Returns:
        Notes on everything that the result cannot carry, and on tiles from another program.
    """
    found, lr = tiles.find_tiles(joined).get(job.name, {}) | unjoined, job.source
    grid = tiles.Grid.of_tiles(lr, found, TEST_AGAIN, tiles.SCALE)
    stamps = {Stamp.read(path) for path in found.values()}
    known = stamps - {Stamp()}
    if len(known) > 1 or any(stamp.source != files.digest(lr) for stamp in known):
        raise ImageError(f"{lr}: tiles are of several runs, or an older {lr.name}; {TEST_AGAIN}")
    sr = tiles.join({at: images.read_image(path) for at, path in found.items()}, grid, tiles.SCALE)
    stamp = str(known.pop()) if known == stamps else ""
    notes = images.write_image(job.target, sr, images.read_photo(lr), stamp)
    joined.mkdir(exist_ok=True)
    for path in unjoined.values():
        path.replace(joined / path.name)
    return notes + ["has tiles from another program, joined as is"] * (Stamp() in stamps)


if __name__ == "__main__":
    main()
