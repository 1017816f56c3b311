"""What all scripts share in a terminal: bars, messages, errors in one line, option types."""

import argparse
import errno
import math
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

from tqdm import tqdm

LOG_INTERVAL = 30  # seconds between two states of a bar in a log file

# What Pillow, NumPy, OpenCV and the file system are known to raise over one bad file.
FILE_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError),
    *(ArithmeticError, AssertionError, BufferError, MemoryError, RuntimeError, SystemError),
    *(struct.error, zlib.error),
)
REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "make it writable or choose another folder",
    errno.EPERM: "make it writable or choose another folder",
}


class UserError(Exception):
    """Something the user can mend; the message is one line with the file and the remedy."""


class StorageError(UserError):
    """Nothing can be written to a folder, which stops the whole run."""

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
        SystemExit: 1 after a UserError or OSError, 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        status, message = 130, f"Interrupted. {interrupt}".rstrip()
    except (UserError, OSError) as error:
        status, message = 1, one_line(error)
    else:
        return
    for bar in list(Bar.bars):
        bar.close()
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


def progress(*args: object, **options: object) -> Bar:
    """Returns a progress bar; the arguments are those of tqdm."""
    return Bar(*args, **options)


def say(text: str) -> None:
    """Prints a line on stdout, above the bars."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """Prints a line on stderr, above the bars."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def in_parallel(
    job: Callable[..., list[str] | None],
    arguments: Iterable[tuple],
    workers: int,
    title: str,
    unit: str = "image",
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
    with ThreadPoolExecutor(max(1, workers)) as pool:
        numbers = {pool.submit(job, *each): i for i, each in enumerate(arguments)}
        try:
            with progress(total=len(numbers), desc=title, unit=unit, disable=not numbers) as bar:
                for future in as_completed(numbers):
                    number = numbers[future]
                    try:
                        for warning in future.result() or ():
                            warn(warning)
                        done += 1
                    except StorageError:
                        raise
                    except UserError as error:
                        problems[number] = one_line(error)
                    except FILE_ERRORS as error:
                        problems[number] = _problem(arguments[number], error)
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done, [problems[number] for number in sorted(problems)]


def _problem(arguments: tuple, error: Exception) -> str:
    """Returns "file: reason" for an error that is not a UserError itself.

    Raises:
        StorageError: the error concerns more than one file.
    """
    name = getattr(error, "filename", None) or arguments[0]
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
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def existing_folder(text: str) -> Path:
    """Parses an option that is the path of a folder."""
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return folder
