"""What all scripts share on the command line: errors, messages, progress bars, options."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent  # where TrainingSet/, TestSet/ and ckpts/ are
incomplete: list[str] = []  # reports of commands that skipped something
LOG_INTERVAL = 30  # seconds between two lines of a bar in a log file
T = TypeVar("T")


class UserError(Exception):
    """Something the user can fix: one line that says which file and how to fix it."""


class ImageError(UserError):
    """One image cannot be used; the others may."""


class StorageError(UserError):
    """A folder cannot be written to, which stops the whole run."""


class NotFiniteError(UserError):
    """A network's output, or a loss, is not a finite number."""


def one_line(error: BaseException) -> str:
    """Returns an error's message as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) and not error.args:
        return "not enough memory; close other programs"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line on stderr, not a traceback, if the user can fix the error.

    Raises:
        SystemExit: 1 after a UserError, an OSError, a MemoryError, or `warn_incomplete`; 130 after
            Ctrl-C.
    """
    for name in ("stdout", "stderr"):  # or the next open file gets the descriptor C code writes to
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    incomplete.clear()
    try:
        yield
        if incomplete:
            raise SystemExit(1)
    except KeyboardInterrupt as error:
        warn(f"Interrupted. {error}".rstrip())
        raise SystemExit(130) from None
    except (StorageError, NotFiniteError, OSError, MemoryError) as error:
        warn(one_line(error))
        raise SystemExit(1) from None
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes raise it: one prints it
            warn(one_line(error))
        raise SystemExit(1) from None


# Messages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """A standard stream that never raises: training outlives its terminal and a full disk.

    In a terminal, which shows both streams, they compare equal, so that bars make way for either.

    Attributes:
        name: "stdout" or "stderr".
        lines: write every text as its own line, without control codes, for log files.
    """

    name: str = field(compare=False)
    lines: bool = False

    def __getattr__(self, name: str) -> object:
        return getattr(getattr(sys, self.name), name)  # tqdm asks for encoding and width

    def write(self, text: str) -> None:
        """Writes text; what the stream cannot encode is escaped."""
        if self.lines:
            text = text.replace("\x1b[A", "").strip()
            text = text and f"{text}\n"
        stream = getattr(sys, self.name)
        with suppress(OSError, ValueError, AttributeError):
            encoding = stream.encoding or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()

    def flush(self) -> None:
        """Does nothing: every text is flushed at once."""


def info(text: str, stream: str = "stdout") -> None:
    """Prints a line above any progress bar."""
    tqdm.write(f"{text}\n", file=Output(stream), end="")  # one write: processes share a terminal


def warn(text: str) -> None:
    """Prints a line on stderr, above any progress bar."""
    info(text, "stderr")


def warn_incomplete(report: str) -> None:
    """Prints the report of a command that skipped something, and makes the exit status 1."""
    incomplete.append(report)
    warn(report)


def progress(*args: object, leave: bool = True, disable: bool = False, **options: object) -> tqdm:
    """Returns a tqdm bar, shown by the first process.

    In a log file, a bar is a line every half minute, and inner ones (`leave=False`) are not shown.
    """
    log = True
    with suppress(AttributeError, ValueError):  # no stderr, or a closed one
        log = not sys.stderr.isatty()
    disable |= os.environ.get("RANK", "0") != "0" or (log and not leave)
    if log:
        options |= {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL, "delay": LOG_INTERVAL}
    return tqdm(*args, leave=leave, disable=disable, file=Output("stderr", lines=log), **options)


# Options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest option to a mistyped one.

    Args:
        doc: a docstring, whose first line is the description; None under `python -OO`.
    """

    def __init__(self, doc: str | None, **options: object) -> None:
        self.names: list[str] = []
        super().__init__(description=(doc or "").partition("\n")[0], allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Adds an argument as argparse does; its help shows the default, `shown` if given."""
        self.names += [name for name in names if name.startswith("--")]
        shown = options.pop("shown", options.get("default"))
        if shown not in (None, False, argparse.SUPPRESS):
            options["help"] += f" (default: {shown})".replace("%", "%%")
        return super().add_argument(*names, **options)

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        """Returns the options; positional arguments may stand between them."""
        options, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(name, self.names)}")
        return options

    def error(self, message: str) -> None:
        """Ends the script with one line and status 2."""
        warn(f"{self.prog}: {message}")
        raise SystemExit(2)


def did_you_mean(word: str, known: list[str]) -> str:
    """Returns "; did you mean X?" with the known word nearest to a mistyped one, or ""."""
    nearest = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def path(text: str) -> Path:
    """Parses an option that is a path; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text).expanduser()


def option(read: Callable[[str], T], wanted: str, holds: Callable[[T], bool]) -> Callable[[str], T]:
    """Returns a parser of an option's value.

    Args:
        read: int, float or `path`.
        wanted: what the value must be, for the message: "a whole number of 1 or more".
        holds: tells whether a value is that.
    """

    def parse(text: str) -> T:
        with suppress(ValueError):
            if holds(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


count = option(int, "a whole number of 1 or more", lambda n: n >= 1)
count_or_none = option(int, "a whole number of 0 or more", lambda n: n >= 0)
positive = option(float, "a number above 0", lambda x: 0 < x < math.inf)
existing_file = option(path, "an existing file", Path.is_file)
existing_folder = option(path, "an existing folder", Path.is_dir)


def processor_share() -> int:
    """Returns how many processor cores each process on this machine may use."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return max(1, len(allowed(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
