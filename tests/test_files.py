import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import console
import files

REPOSITORY = Path(__file__).resolve().parent.parent


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (KeyboardInterrupt, OSError, ValueError):
        with pytest.raises(error), files.replacing(path) as temporary:
            temporary.write_text("ne")
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_never_share_a_name(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    with files.replacing(path) as one, files.replacing(path) as other:
        assert one != other and one.parent == other.parent == tmp_path
        assert one.name.startswith(".") and str(os.getpid()) in one.name
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(100_000))
    write = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import files, pathlib\n"
        "for n in range(300):\n"
        f"    with files.replacing(pathlib.Path({str(path)!r})) as temporary:\n"
        "        temporary.write_bytes(bytes([n % 256]) * 100_000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write]) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 20
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, code):
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    with pytest.raises(console.StorageError) as raised, files.replacing(tmp_path / "a.png"):
        raise error
    folder, remedy = str(raised.value).split(": ", 1)
    assert folder == str(tmp_path) and ";" in remedy

    def fail(**_):
        raise error

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail)
    with pytest.raises(console.StorageError, match=f"{tmp_path}/new: .*;"):
        files.check_writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    path = tmp_path / "none" / "a.png"
    with pytest.raises(FileNotFoundError), files.replacing(path) as temporary:
        temporary.touch()
    with pytest.raises(PermissionError), files.replacing(tmp_path / "a.png"):
        raise PermissionError(errno.EACCES, "Permission denied", "another file")


def test_a_file_that_is_locked_for_a_moment_is_replaced(tmp_path, monkeypatch):
    attempts, rename = [], Path.replace

    def locked(self, to):
        attempts.append(self)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, to)

    monkeypatch.setattr(files, "LOCKED_SECONDS", 0.1)
    monkeypatch.setattr(Path, "replace", locked)
    with files.replacing(tmp_path / "a.png") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.png").read_text() == "new"


def test_weights_reach_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.replace

    def flush(handle):
        events.append("flush")
        fsync(handle)
        if len(events) == 3:  # the folder's, which many network file systems refuse
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("rename"), rename(self, to))
    )
    with files.replacing(tmp_path / "a.pth", durable=True) as temporary:
        temporary.write_bytes(b"weights")
    assert events == ["flush", "rename", "flush"]
    assert (tmp_path / "a.pth").read_bytes() == b"weights"
    with files.replacing(tmp_path / "a.png") as temporary:
        temporary.touch()
    assert events[3:] == ["rename"]


def test_a_digest_is_of_the_content_alone(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_bytes(b"a"), same.write_bytes(b"a"), other.write_bytes(b"b")
    assert files.digest(one) == files.digest(same) != files.digest(other)
    assert files.digest(one, other) != files.digest(other, one)
