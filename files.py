"""Atomic writes, and digests of file contents."""

import errno
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from console import StorageError

LOCKED_SECONDS = 2  # how long a virus scanner may hold a file that we replace
FULL, FORBIDDEN = "free some space and run the same command again", "choose a writable folder"
REMEDIES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL}
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), FORBIDDEN)


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` if all goes well.

    Creates the folder if necessary.

    Args:
        durable: flush the file to disk before renaming, so that it survives a power cut.

    Raises:
        StorageError: the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if durable:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
        _rename(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    deadline = time.monotonic() + LOCKED_SECONDS
    while True:
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if not isinstance(error, PermissionError) or time.monotonic() > deadline:
                error.filename = str(path)
                raise
            time.sleep(LOCKED_SECONDS / 20)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Raises StorageError for an OSError which means that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        if remedy := REMEDIES.get(error.errno):
            raise StorageError(f"{folder}: {error.strerror}; {remedy}") from error
        raise


def check_writable(folder: Path) -> None:
    """Creates a folder if necessary; raises StorageError if it is not writable."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


def digest(*paths: Path) -> str:
    """Returns a digest of the contents of files, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def weight_path(ckpts: Path, name: str) -> Path:
    """Returns the path of a stage's generator weights."""
    return ckpts / f"{name}_gen.pth"
