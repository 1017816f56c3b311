"""Atomic writes, and digests by which the content of files is recognised."""

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

LOCKED_SECONDS = 2  # how long a virus scanner may hold a file that is to be replaced
FULL, FORBIDDEN = "free some space and run the same command again", "choose a writable folder"
REMEDIES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL}
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), FORBIDDEN)


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` when all went well.

    Makes the folder if need be.

    Args:
        durable: flush the file to disk before it is renamed, so that a power cut leaves it whole.

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
    """Raises StorageError for an OSError that says that nothing can be written to a folder."""
    try:
        yield
    except OSError as error:
        if remedy := REMEDIES.get(error.errno):
            raise StorageError(f"{folder}: {error.strerror}; {remedy}") from error
        raise


def check_writable(folder: Path) -> None:
    """Makes a folder if need be; raises StorageError unless files can be written to it."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")


def digest(*paths: Path) -> str:
    """Returns a digest of the content of files, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def weight_path(ckpts: Path, name: str) -> Path:
    """Returns where the weights of a stage's generator are."""
    return ckpts / f"{name}_gen.pth"
