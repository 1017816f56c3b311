import argparse
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import cv2
import pytest

import console
from console import (
    StorageError,
    UserError,
    in_parallel,
    plain_errors,
    progress,
    report,
    say,
    warn,
)
from device import DeviceError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.png: too small; remove it"), 1, "a.png: too small; remove it"),
        (StorageError("/out: full"), 1, "/out: full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "b.png"), 1, "b.png: No such file"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt("Saved after step 7."), 130, "Interrupted. Saved after step 7."),
    ],
)
def test_what_the_user_can_fix_is_one_line(capsys, error, status, line):
    with pytest.raises(SystemExit) as ended, plain_errors():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr() == ("", line + "\n")


def test_something_left_out_is_told_by_the_exit_status(capsys):
    with pytest.raises(SystemExit) as ended, plain_errors():
        report("Done", 1, ["a.png: damaged"], 0.0, "out")
        report("Done", 2, [], 0.0, "out")
    assert ended.value.code == 1
    with plain_errors():
        report("Done", 2, [], 0.0, "out")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("a"), False),
        (StorageError("a"), True),
        (DeviceError("a"), True),
        (FileNotFoundError(errno.ENOENT, "a"), True),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_second_process_tells_what_the_first_may_not_know(capsys, monkeypatch, error, shown):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), plain_errors():
        raise error
    assert bool(capsys.readouterr().err) == shown


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), plain_errors():
        raise ZeroDivisionError


def test_bars_are_closed_before_the_message(capsys):
    with pytest.raises(SystemExit), plain_errors():
        outer = progress(total=9, desc="Outer")
        inner = progress(total=9, desc="Inner")
        raise UserError("a.png: broken")
    assert outer.disable and inner.disable
    assert capsys.readouterr().err.endswith("\na.png: broken\n")


@pytest.mark.parametrize("write", [say, warn])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_messages_survive_any_file_name(monkeypatch, write, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout" if write is say else "stderr", stream)
    write(f"{os.fsdecode(b'caf' + bytes([0xE9]) + b'.png')}: broken, 3 µm")
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"caf\\udce9.png: broken")


def test_bars_in_a_log_file_show_twice_a_minute(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with progress(total=900, desc="Reading") as bar:
        bar.mininterval = 0
        for _ in range(900):  # a minute and a half
            clock[0] += 0.1
            bar.update()
            bar.set_postfix(loss=1)
    shown = capsys.readouterr().err.count("Reading")
    assert 3 <= shown <= 5


def test_one_bad_file_costs_that_file_only(capsys):
    def job(path, number):
        if number == 1:
            raise UserError(f"{path}: too small; remove it")
        if number == 2:
            raise OSError(errno.ENAMETOOLONG, "File name too long", str(path))
        if number == 3:
            raise MemoryError
        return [f"{path}: reduced to 8 bits"] if number == 4 else []

    arguments = [(Path(f"{number}.png"), number) for number in range(6)]
    done, problems = in_parallel(job, arguments, 3, "Reading")
    assert done == 3
    assert problems == [
        "1.png: too small; remove it",
        "2.png: File name too long",
        "3.png: MemoryError (MemoryError)",
    ]
    assert "4.png: reduced to 8 bits\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError("encoder error -2"),
        cv2.error("OpenCV: (-4:Insufficient memory)"),
        UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
        AttributeError("'NoneType' has no attribute 'seek'"),
        zlib.error("Error -3\nwhile decompressing"),
        IndexError(),
        RuntimeError("decoder failed"),
    ],
)
def test_errors_of_decoders_become_one_line(error):
    def job(path):
        raise error

    done, (problem,) = in_parallel(job, [(Path("a.png"),)], 1, "Reading")
    assert done == 0
    assert problem.startswith("a.png: ") and "\n" not in problem


def test_a_defect_in_a_job_is_not_hidden():
    class Defect(Exception):
        pass

    def defective(path):
        raise Defect

    with pytest.raises(Defect):
        in_parallel(defective, [("a.png",)], 1, "Reading")


def test_nothing_to_do_shows_no_bar(capsys):
    assert in_parallel(print, [], 2, "Reading") == (0, [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        StorageError("/out: No space left on device; free some"),
        OSError(errno.ENOSPC, "No space left on device", "/out/a.png"),
        PermissionError(errno.EACCES, "Permission denied", "/out/a.png"),
        OSError(errno.EROFS, "Read-only file system", "/out/a.png"),
        KeyboardInterrupt(),
    ],
)
def test_what_concerns_the_whole_run_ends_it_at_once(error):
    begun, ended = [], threading.Event()

    def job(number):
        begun.append(number)
        if number == 0:
            raise error
        ended.wait(0.05)

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError
    with pytest.raises(expected) as raised:
        in_parallel(job, [(number,) for number in range(100)], 2, "Writing")
    assert len(begun) < 20
    if expected is StorageError:
        assert str(raised.value).startswith("/out") and ";" in str(raised.value)


def test_ctrl_c_ends_with_one_line_and_130(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import console\n"
        "def job(number):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(0.2)\n"
        "with console.plain_errors():\n"
        "    console.in_parallel(job, [(n,) for n in range(500)], 2, 'Sleeping')\n"
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("begun")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - started < 20
    assert messages.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in messages


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (console.positive_int, {"1": 1, "36": 36}, ["0", "-1", "1.5", "nan", "inf", "", "six"]),
        (console.non_negative_int, {"0": 0, "4": 4}, ["-1", "-3", "0.5", "nan", "9" * 5000]),
        (console.positive_float, {"1e-4": 1e-4, "2": 2.0}, ["0", "-1", "nan", "inf", "1e999", "x"]),
    ],
)
def test_odd_numbers_are_refused_by_the_parser(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            parse(text)


def test_a_folder_must_be_there(tmp_path, capsys):
    assert console.existing_folder(str(tmp_path)) == tmp_path
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=console.existing_folder)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--root", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
