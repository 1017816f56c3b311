"""The one loop over images that every command shares, and what each result was made from."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import console
import files
import images
import tiles
from console import ImageError, StorageError, UserError

if TYPE_CHECKING:
    from device import Device

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
UP_TO_DATE = None  # what `work` returns where there is nothing to make

OnProgress = Callable[[float], object]
Finish = Callable[[], list[str] | None]


@dataclass(frozen=True)
class Job:
    """A result to make: from one image file, with its id, the other file or folder."""

    name: str
    source: Path
    target: Path


def for_each(
    jobs: Sequence[Job],
    work: Callable[[Job, OnProgress], Finish | None],
    done: str,
    where: Path | str,
    *,
    problems: Sequence[str] = (),
    threads: int = 1,
    device: "Device | None" = None,
    finally_do: Callable[[], None] = lambda: None,
) -> None:
    """Works on images one after the other; one that fails costs that image only.

    Under torchrun the processes share the images out.

    Args:
        work: makes a result and returns what is left to do, such as writing it: a function that
            a thread calls while the next image is worked on, and that returns notes to print.
            `UP_TO_DATE` if the result is there already. Its second argument is to be called with
            the fraction of the work that was done.
        done: the verb of the report, such as "Upscaled".
        where: what to look at.
        problems: a line for each file that was skipped before.
        threads: that finish results at the same time.
        finally_do: called in all processes before the report.

    Raises:
        UserError: images were skipped; it says how many.
        StorageError: nothing can be written.
    """
    start, made, current = time.monotonic(), 0, 0
    rank, world = (device.rank, device.world) if device else (0, 1)
    skipped = list(problems) if rank == 0 else []
    for problem in skipped:
        console.warn(f"Skipped {problem}")
    waiting: deque[tuple[Job, Future]] = deque()

    def skip(job: Job, error: Exception) -> None:
        skipped.append(describe_error(job.source, error))
        console.warn(f"Skipped {skipped[-1]}")

    def settle(most: int) -> None:
        nonlocal made
        while len(waiting) > most:
            job, future = waiting.popleft()
            try:
                for note in future.result() or ():
                    console.warn(f"{job.source}: {note}")
                made += 1
            except ONE_IMAGE as error:
                skip(job, error)

    mine, title = jobs[rank::world], f"{done.partition(' ')[0].removesuffix('ed')}ing"
    bar = console.progress(total=len(mine), desc=title, bar_format=BAR, disable=not mine)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            for number, job in enumerate(mine, start=1):
                try:
                    finish = work(job, bar.update)
                    if finish is UP_TO_DATE:
                        current += 1
                    else:
                        waiting.append((job, pool.submit(finish)))
                except ONE_IMAGE as error:
                    skip(job, error)
                settle(threads)
                bar.update(number - bar.n)
            settle(0)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    finally_do()
    if device:
        skipped, totals = device.gather(skipped), device.gather([[made, current]])
        made, current = map(sum, zip(*totals, strict=True))
    counts = [f"{done} {made} image{'s' * (made != 1)}"]
    counts += [f"{current} up to date"] if current else []
    counts += [f"{len(skipped)} skipped"] if skipped else []
    report = f"{', '.join(counts)}, in {console.duration(start)}: {where}"
    if skipped and rank == 0:
        raise UserError(report)
    if rank == 0:
        console.info(report)


ONE_IMAGE = (ImageError, OSError, MemoryError)  # after these the next image may do well


def describe_error(path: Path, error: Exception) -> str:
    """Returns "file: reason" for an error met while working on a file.

    Raises:
        StorageError: the error concerns more than one file.
    """
    if isinstance(error, StorageError):
        raise error
    if isinstance(error, MemoryError):
        return f"{path}: memory is too small for it"
    if isinstance(error, OSError):
        error = files.as_storage_error(error, Path(error.filename or path))
        if isinstance(error, StorageError):
            raise error
    text = console.one_line(error)
    return text if str(path.parent) in text else f"{path}: {text}"


# What results were made from ------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """What a file was made from, by content: written into the file, in whatever format.

    Attributes:
        source: digest of the image file.
        grid: how it was cut into tiles.
        weights: digest of the weight files, and the precision.
        edges: digest of the file of edges that were given instead of predicted ones.
    """

    source: str
    grid: str = ""
    weights: str = ""
    edges: str = ""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items() if value)

    @classmethod
    def read(cls, path: Path) -> "Stamp | None":
        """Returns the stamp in a file; None without one, or without a readable file."""
        parts = [part.partition("=") for part in (images.read_stamp(path) or "").split()]
        try:
            return cls(**{key: value for key, _, value in parts})
        except TypeError:  # none, or of another version
            return None

    @property
    def is_downscaled(self) -> bool:
        """Whether the file is an LR image that slicing made from HR."""
        return not (self.grid or self.weights)


def check_source(path: Path, source: Path, remedy: str) -> Stamp | None:
    """Returns a file's stamp; raises ImageError if it names another content of `source`."""
    stamp = Stamp.read(path)
    if stamp and stamp.source != files.digest(source):
        raise ImageError(f"{path}: made from an older {source.name}; {remedy}")
    return stamp


def check_downscaled(lr: Path, hr: Path | None) -> None:
    """Raises ImageError if slicing made an LR image from an HR image that is another now."""
    stamp = Stamp.read(lr)
    if hr and stamp and stamp.is_downscaled:
        check_source(lr, hr, tiles.SLICE_AGAIN)


def check_size(hr: Path, lr: Path) -> None:
    """Raises ImageError unless an image is `SCALE` times as large as LR, but for a remainder."""
    hr_size, lr_size = images.image_size(hr), images.image_size(lr)
    if tuple(side // tiles.SCALE for side in hr_size) != lr_size:
        raise ImageError(f"{hr}: is not {tiles.SCALE} times the size of {lr}; replace either")


def check_tiles(lr: Path, found: dict[tiles.Position, Path]) -> tuple[tiles.Grid, Stamp]:
    """Returns the grid and the stamp of an LR image's tiles.

    Raises:
        ImageError: they are not complete, or not all of the image as it is now.
    """
    try:
        grid = tiles.Grid.of_tiles(images.image_size(lr), found)
    except ImageError as error:
        raise ImageError(f"{lr}: {error}; {tiles.SLICE_AGAIN}") from error
    stamp = Stamp(files.digest(lr), str(grid))
    for path in found.values():
        if Stamp.read(path) != stamp:
            raise ImageError(f"{path}: not cut from {lr.name} as it is now; {tiles.SLICE_AGAIN}")
    return grid, stamp


# What to work on ------------------------------------------------------------------------------

ENDING, PREVIEW = f"_x{tiles.SCALE}", "_preview"  # of the names of results
CANDIDATE = f"{tiles.JOINED}/candidate_{{}}.png"  # joined images, in TestSet/600px/output


def test_jobs(root: Path, target: str = "") -> tuple[list[Job], list[str]]:
    """Returns the images in TestSet/600px, and a line for each that has to be skipped.

    Args:
        target: of each in TestSet/600px/output, `{}` for its id.
    """
    folder = root / tiles.TEST / tiles.LR
    found, problems = tiles.find_images(folder)
    if not found and not problems:
        raise UserError(
            f"{folder}: no images; put some there and run `python slice_images_w_overlapping.py`,"
            " or upscale one where it lies with `python main.py upscale IMAGE`"
        )
    output = folder / tiles.OUTPUT
    return [Job(name, p, output / target.format(name)) for name, p in found.items()], problems


def upscale_jobs(
    given: Sequence[Path], output: Path | None, ending: str, recursive: bool
) -> tuple[list[Job], list[str]]:
    """Returns what to upscale, and a line for each file that has to be skipped.

    Args:
        given: images, patterns with * that no shell has expanded, and folders, whose images are
            taken except for results of this program.
        output: file or folder of the results; None: beside the images.
        ending: of the results' names, the suffix included.
        recursive: sub-folders too, except hidden ones.

    Raises:
        UserError: there is nothing to upscale, or no such format to write.
    """
    sources, problems = [], []  # each source with the folder that it was found in
    for path in given:
        if path.is_dir():
            found, foreign = select_images(walk(path, recursive))
        elif not path.exists() and "*" in path.name:
            found, foreign = select_images(sorted(path.parent.glob(path.name)))
        else:
            found, foreign = [path], []
        sources += [(image, path if path.is_dir() else path.parent) for image in found]
        problems += foreign
    if not sources and not problems:
        where = ", ".join(map(str, given))
        raise UserError(f"{where}: no images to upscale; give --recursive for sub-folders")
    if output and output.suffix and not output.is_dir() and len(sources) == 1:
        if output.suffix.lower() not in images.RESULTS:
            known = ", ".join(images.RESULTS)
            raise UserError(f"--output {output}: the suffix is not one of {known}")
        return [Job("", sources[0][0], output)], problems
    if output and output.suffix.lower() in images.RESULTS and not output.is_dir():
        raise UserError(f"--output {output}: is one file; give a folder for several images")
    jobs: dict[Path, Job] = {}  # by target
    for path, base in sources:
        folder = output / path.parent.relative_to(base) if output else path.parent
        job = Job("", path, folder / f"{path.stem}{ending}")
        if (first := jobs.setdefault(job.target, job)).source != path:
            problems.append(f"{path}: its result would replace that of {first.source}; rename it")
    return list(jobs.values()), problems


def walk(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yields a folder's files, and its sub-folders' if asked for; hidden ones are left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def select_images(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Returns the images among files, without results, and a line for each of a foreign format."""
    found, foreign = [], []
    for path in paths:
        if path.suffix.lower() in images.FOREIGN:
            foreign.append(f"{path}: {path.suffix} cannot be read here; convert it to PNG")
        elif path.suffix.lower() in images.SUFFIXES:
            stamp = Stamp.read(path)
            if not (stamp and stamp.weights):
                found.append(path)
    return found, foreign
