import errno
import os
import shutil
from pathlib import Path

import pytest

import files
from console import StorageError
from files import check_writable, digest, replacing


def write(path, content=b"new", durable=False):
    with replacing(path, durable) as temporary:
        temporary.write_bytes(content)


def failing_with(code, calls):
    def fail(*given, **_):
        calls.append(given)
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "er" / "a.png"
    write(path, b"old")  # makes its folder
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    write(path, durable=True)
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_locked_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    failures, replace = [PermissionError(errno.EACCES, "locked")] * 3, Path.replace

    def locked(self, target):
        if failures:
            raise failures.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", locked)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"new" and not failures


def test_a_file_that_stays_locked_is_named_and_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing_with(errno.EACCES, calls := []))
    monkeypatch.setattr(files, "LOCKED_SECONDS", 0.1)
    with pytest.raises(PermissionError) as raised:
        write(tmp_path / "a.png")
    assert raised.value.filename == str(tmp_path / "a.png") and len(calls) > 3
    assert not list(tmp_path.iterdir())


FATAL = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM]


@pytest.mark.parametrize("code", FATAL)
@pytest.mark.parametrize("where", ["write_bytes", "mkdir"])
def test_what_concerns_the_whole_folder_is_a_storage_error(tmp_path, monkeypatch, where, code):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(StorageError) as raised:
        patch.setattr(Path, where, failing_with(code, []))
        write(folder / "a.png")
    assert str(folder) in str(raised.value) and os.strerror(code) in str(raised.value)
    assert not list(tmp_path.rglob(".*"))


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", failing_with(errno.EIO, []))
    with pytest.raises(OSError, match="output error") as raised:
        write(tmp_path / "a.png")
    assert raised.value.errno == errno.EIO
    with pytest.raises(OSError, match="too long") as raised, replacing(tmp_path / ("n" * 300)) as t:
        t.touch()
    assert raised.value.filename.endswith("nnn") and not list(tmp_path.iterdir())


def test_a_folder_is_checked_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
    monkeypatch.setattr(files.tempfile, "TemporaryFile", failing_with(errno.EROFS, []))
    with pytest.raises(StorageError, match=str(tmp_path)):
        check_writable(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    for attempt in (lambda: check_writable(tmp_path), lambda: write(tmp_path / "a.png")):
        with pytest.raises(StorageError, match=str(tmp_path)):
            attempt()
    tmp_path.chmod(0o700)


def test_a_digest_is_of_content_alone(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1")
    b.write_bytes(b"2")
    os.utime(b, ns=(a.stat().st_atime_ns, a.stat().st_mtime_ns))
    copy = Path(shutil.copy(a, tmp_path / "copy"))
    os.utime(copy, (0, 0))
    assert digest(a) == digest(copy) != digest(b)
    assert digest(a, b) != digest(b, a) and len(digest(a)) == 16
