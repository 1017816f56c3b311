"""What all scripts share in a terminal: bars, messages, errors in one line, option types."""

import argparse
import errno
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, TextIO
from weakref import WeakSet

import cv2
from tqdm import tqdm

LOG_INTERVAL = 30  # seconds between two states of a bar in a log file
PARTS_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"

left_out: list[str] = []  # what `report` named since `plain_errors` began

# What Pillow, NumPy, OpenCV and the file system are known to raise over one bad file.
FILE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError),
    *(ArithmeticError, AssertionError, BufferError, MemoryError, RuntimeError, SystemError),
    *(struct.error, zlib.error, cv2.error),
)
REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
}


class UserError(Exception):
    """Something the user can fix; the message is one line with the file and the remedy."""

    in_all_processes = True  # raised in every process of torchrun, so the first one says it


class StorageError(UserError):
    """Nothing can be written to a folder, which stops the whole run."""

    in_all_processes = False

    @classmethod
    def of(cls, error: OSError, folder: Path | str) -> "StorageError | None":
        """Returns the error to raise instead if nothing can be written to `folder`, else None."""
        remedy = REMEDIES.get(error.errno)
        return cls(f"{folder}: {error.strerror}; {remedy}") if remedy else None


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).splitlines()) or type(error).__name__


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line on stderr instead of a traceback.

    Raises:
        SystemExit: 1 after a UserError or OSError, or if something was left out; 130 after Ctrl-C.
    """
    left_out.clear()
    in_all_processes = True
    try:
        yield
    except KeyboardInterrupt as interrupt:
        status, message = 130, f"Interrupted. {interrupt}".rstrip()
    except (UserError, OSError) as error:
        status, message = 1, one_line(error)
        in_all_processes = getattr(error, "in_all_processes", False)
    else:
        if left_out:
            raise SystemExit(1)
        return
    for bar in list(Bar.bars):
        bar.close()
    if os.environ.get("LOCAL_RANK", "0") == "0" or not in_all_processes:  # once on every machine
        warn(message)
    raise SystemExit(status)


class Bar(tqdm):
    """A tqdm bar that shows itself at most twice a minute where stderr is no terminal."""

    bars: ClassVar[WeakSet["Bar"]] = WeakSet()

    def __init__(self, *args: object, **options: object) -> None:
        self.pause = 0 if sys.stderr.isatty() else LOG_INTERVAL
        self.shown = -math.inf
        super().__init__(*args, **options)
        self.bars.add(self)

    def refresh(self, *args: object, **options: object) -> None:
        if time.monotonic() - self.shown >= self.pause:
            self.shown = time.monotonic()
            super().refresh(*args, **options)


def progress(*args: object, disable: bool = False, **options: object) -> Bar:
    """Returns a progress bar, shown by the first process; the arguments are those of tqdm."""
    return Bar(*args, disable=disable or os.environ.get("RANK", "0") != "0", **options)


def say(text: str) -> None:
    """Prints a line on stdout, above the bars."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """Prints a line on stderr, above the bars."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def report(
    done: str, made: int, problems: list[str], start: float, where: object, present: int = 0
) -> None:
    """Prints what a command did, and a warning for each image it had to leave out.

    Args:
        done: the verb.
        start: of `time.monotonic()`.
        where: what to look at.
        present: how many results were there already.
    """
    left_out.extend(problems)
    for problem in problems:
        warn(f"Left out {problem}")
    counts = [f"{done}: {made} image{'s' * (made != 1)}"]
    counts += [f"{present} there already"] if present else []
    counts += [f"{len(problems)} left out"] if problems else []
    say(f"{', '.join(counts)}, in {time.monotonic() - start:.1f} s: {where}")


def in_parallel(
    job: Callable[..., list[str] | None],
    arguments: Iterable[tuple],
    workers: int,
    title: str,
) -> tuple[int, list[str]]:
    """Runs `job(*each)` for each of the arguments in threads, with a bar.

    Threads are enough: the image codecs and NumPy let each other run. What a job returns is
    printed as warnings at once. An error that one bad file can cause costs that file only.

    Args:
        job: its first argument is the file it is about.

    Returns:
        How many jobs came to their end, and a line "file: reason" for each of the others.

    Raises:
        StorageError, KeyboardInterrupt: after dropping what has not begun.
    """
    done, problems = 0, {}
    arguments = list(arguments)
    with ThreadPoolExecutor(workers) as pool:
        numbers = {pool.submit(job, *each): i for i, each in enumerate(arguments)}
        try:
            with progress(total=len(numbers), desc=title, unit="image", disable=not numbers) as bar:
                for future in as_completed(numbers):
                    number = numbers[future]
                    try:
                        for warning in future.result() or ():
                            warn(warning)
                        done += 1
                    except (UserError, *FILE_ERRORS) as error:
                        problems[number] = problem(arguments[number][0], error)
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done, [problems[number] for number in sorted(problems)]


def problem(path: Path, error: Exception) -> str:
    """Returns "file: reason" for an error met while working on the file at `path`.

    Raises:
        StorageError: the error concerns more than one file.
    """
    if isinstance(error, StorageError):
        raise error
    if isinstance(error, UserError):
        return one_line(error)
    name = getattr(error, "filename", None) or path
    if isinstance(error, OSError):
        if stops_all := StorageError.of(error, name):
            raise stops_all from error
        return f"{name}: {error.strerror or one_line(error)}"
    return f"{name}: {one_line(error)} ({type(error).__name__})"


def positive_int(text: str) -> int:
    """Parses an option that is a whole number of at least 1."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """Parses an option that is a whole number of at least 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """Parses an option that seeds random numbers."""
    number = _whole(text, 0)
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit 63 bits")
    return number


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return number


def positive_float(text: str) -> float:
    """Parses an option that is a finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def probability(text: str) -> float:
    """Parses an option that is a number in [0, 1]."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def existing_folder(text: str) -> Path:
    """Parses an option that is the path of a folder."""
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return folder
