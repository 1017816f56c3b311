"""The loop over images that all commands share, and stamps of what results were made from."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

import console
import files
import images
import tiles
from console import ImageError, UserError

if TYPE_CHECKING:
    from device import Device

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"

OnProgress = Callable[[float], object]
Finish = Callable[[], list[str] | None]


@dataclass(frozen=True)
class Job:
    """One image to work on: its id, its file, and the file or folder to write to."""

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
) -> None:
    """Processes images one after the other; an image that fails is skipped.

    Under torchrun, the images are divided among the processes.

    Args:
        work: makes a result and returns a function that finishes it, such as by writing it, and
            returns notes to print; a thread calls it while the next image is being processed.
            None if the result exists already. The second argument of `work` is a function to
            call with the fraction of the work that was done.
        done: the verb of the report, such as "Upscaled".
        where: the output to name in the report.
        problems: a line for each file that was skipped earlier.
        threads: how many threads finish results.

    Raises:
        StorageError: results cannot be written.
    """
    rank, world = (device.rank, device.world) if device else (0, 1)
    start, counts, waiting = time.monotonic(), Counter(), deque[tuple[Job, Future]]()
    for problem in problems if rank == 0 else ():
        skip(problem, counts)
    mine, title = jobs[rank::world], f"{done.partition(' ')[0].removesuffix('ed')}ing"
    bar = console.progress(total=len(mine), desc=title, bar_format=BAR, disable=not mine)
    with bar, ThreadPoolExecutor(threads) as pool:
        for number, job in enumerate(mine, start=1):
            with one_image(job, counts):
                if finish := work(job, bar.update):
                    waiting.append((job, pool.submit(finish)))
                else:
                    counts["up to date"] += 1
            while len(waiting) > (threads if number < len(mine) else 0):  # at the end: all
                finished, future = waiting.popleft()
                with one_image(finished, counts):
                    for note in future.result() or ():
                        console.warn(f"{finished.source}: {note}")
                    counts["made"] += 1
            bar.update(number - bar.n)
    total = sum(device.gather([counts]) if device else [counts], Counter())
    parts = [f"{done} {total['made']} image{'s' * (total['made'] != 1)}"]
    parts += [f"{total[key]} {key}" for key in ("up to date", "skipped") if total[key]]
    seconds = time.monotonic() - start
    parts.append(f"in {seconds:.1f} s" if seconds < 60 else f"in {tqdm.format_interval(seconds)}")
    report = ", ".join(parts) + f": {where}" * (total["made"] + total["up to date"] > 0)
    if rank == 0:
        (console.warn_incomplete if total["skipped"] else console.info)(report)


@contextmanager
def one_image(job: Job, counts: Counter) -> Iterator[None]:
    """Skips the image if the block fails, as the next one may succeed."""
    try:
        yield
    except (ImageError, OSError, MemoryError) as error:
        text = console.one_line(error)
        named = isinstance(error, ImageError) or getattr(error, "filename", None)
        skip(text if named else f"{job.source}: {text}", counts)


def skip(problem: str, counts: Counter) -> None:
    """Counts and reports an image that is skipped."""
    counts["skipped"] += 1
    console.warn(f"Skipped {problem}")


# What results were made from ------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """What a file was made from, by content: written into the file, whatever its format.

    Attributes:
        source: digest of the image file, or of HR if slicing made LR from it; "" if unknown.
        grid: how it was cut into tiles.
        weights: digest of the weight files, their shares, and the precision.
        edges: digest of the file of edges used instead of predicted ones.
    """

    source: str = ""
    grid: str = ""
    weights: str = ""
    edges: str = ""

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items() if value)

    @classmethod
    def read(cls, path: Path) -> "Stamp":
        """Returns the stamp in a file; an empty one if there is none or the file is unreadable."""
        parts = [part.partition("=") for part in images.read_stamp(path).split()]
        try:
            return cls(**{key: value for key, _, value in parts})
        except TypeError:  # from another version
            return cls()

    @property
    def is_downscaled(self) -> bool:
        """Whether the file is an LR image that slicing made from HR."""
        return bool(self.source) and not (self.grid or self.weights)


def check_source(path: Path, source: Path, remedy: str) -> None:
    """Raises ImageError if a file's stamp shows that `source` has changed since; says `remedy`."""
    if Stamp.read(path).source not in ("", files.digest(source)):
        raise ImageError(f"{path}: made from an older {source.name}; {remedy}")


def check_hr_unchanged(lr: Path, hr: Path | None) -> None:
    """Raises ImageError if slicing made an LR image from an HR image that has changed since."""
    if hr and Stamp.read(lr).is_downscaled:
        check_source(lr, hr, tiles.SLICE_AGAIN)


def check_size(hr: Path, lr: Path) -> None:
    """Raises ImageError unless HR is `SCALE` times the size of LR, but for surplus pixels."""
    hr_size, lr_size = images.image_size(hr), images.image_size(lr)
    if tuple(side // tiles.SCALE for side in hr_size) != lr_size:
        raise ImageError(f"{hr}: not {tiles.SCALE} times the size of {lr}; replace one of them")


# What to work on ------------------------------------------------------------------------------

CANDIDATE = f"{tiles.JOINED}/candidate_{{}}.png"  # joined images, in TestSet/600px/output


def test_jobs(root: Path, target: str = "") -> tuple[list[Job], list[str]]:
    """Returns the images in TestSet/600px, and a line for each that has to be skipped.

    Args:
        target: path of each result in TestSet/600px/output, with `{}` for the id.
    """
    folder = root / tiles.TEST / tiles.LR
    found, problems = tiles.find_images(folder)
    if not found and not problems:
        raise UserError(
            f"{folder}: no images; put some there and run `python slice_images_w_overlapping.py`,"
            " or upscale a single image with `python main.py upscale IMAGE`"
        )
    output = folder / tiles.OUTPUT
    return [Job(name, p, output / target.format(name)) for name, p in found.items()], problems


def upscale_jobs(
    given: Sequence[Path], output: Path | None, ending: str, recursive: bool
) -> tuple[list[Job], list[str]]:
    """Returns what to upscale, and a line for each file that has to be skipped.

    Args:
        given: images, patterns with * that the shell has not expanded, and folders, all of whose
            images are used except results of this program.
        output: file or folder of the results; None: beside the images.
        ending: of the results' names, suffix included.
        recursive: include sub-folders, except hidden ones.

    Raises:
        UserError: there is nothing to upscale, or the output format is unknown.
    """
    sources, problems = [], []  # each image with the folder it was found under
    for path in given:
        is_folder, named = path.is_dir(), sorted(map(Path, glob(str(path))))
        if not is_folder and (path.exists() or not named):
            sources.append((path, path.parent))
            continue
        found, foreign = tiles.select_images(tiles.walk(path, recursive) if is_folder else named)
        found = [image for image in found if not Stamp.read(image).weights]  # not our own results
        sources += [(image, path if is_folder else image.parent) for image in found]
        problems += foreign
    if not sources and not problems:
        where = ", ".join(map(str, given))
        raise UserError(f"{where}: no images but earlier results; use --recursive for sub-folders")
    is_file = output and output.suffix and not output.is_dir()
    if is_file and (len(sources) > 1 or output.suffix.lower() not in images.RESULTS):
        raise UserError(
            f"--output {output}: looks like a file; that takes a single image and one of the"
            f" suffixes {', '.join(images.RESULTS)}; if it is a folder, create it first"
        )
    jobs: dict[Path, Job] = {}  # by target
    for path, base in sources:
        folder = output / path.parent.relative_to(base) if output else path.parent
        job = Job("", path, output if is_file else folder / f"{path.stem}{ending}")
        if (first := jobs.setdefault(job.target, job)).source != path:
            problems.append(f"{path}: its result would replace that of {first.source}; rename it")
    return list(jobs.values()), problems
