import argparse
import errno
import io
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, status_of

import console
from console import NotFiniteError, Parser, StorageError, UserError, plain_errors

NO_FILE = FileNotFoundError(errno.ENOENT, "No such file", "b.png")


def end_with(error):
    with plain_errors():
        raise error


def execute(script, redirections="", *options):
    """Runs a script beside the repository's modules, in a shell; returns status and output."""
    python = [sys.executable, *options, "-c", script]
    given = ["sh", "-c", f'"$@" {redirections}', "sh", *python]
    done = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.png: too\nsmall"), 1, "a.png: too small"),
        (StorageError("/out: full"), 1, "/out: full"),
        (NO_FILE, 1, "b.png: No such file"),
        (OSError(errno.ENOSPC, "full"), 1, "full"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt("Saved."), 130, "Interrupted. Saved."),
    ],
)
def test_what_the_user_can_fix_is_one_line(capsys, error, status, line):
    assert status_of(end_with, error) == status
    assert capsys.readouterr() == ("", line + "\n")


def test_full_memory_is_one_line(capsys):
    assert status_of(end_with, MemoryError()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory" in line


@pytest.mark.parametrize(
    ("error", "shown"),
    [(UserError("a"), 0), (StorageError("a"), 1), (NotFiniteError("a"), 1), (NO_FILE, 1)],
)
def test_a_second_process_tells_what_the_first_may_not_know(capsys, monkeypatch, error, shown):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert status_of(end_with, error) == 1
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_a_defect_keeps_its_traceback():
    with pytest.raises(AttributeError):
        end_with(AttributeError("'NoneType' object has no attribute 'seek'"))


# Output ---------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream whose other end is gone, or whose disk is full."""

    encoding = "utf-8"

    def write(self, _):
        raise BrokenPipeError

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Broken()], ids=["none", "closed", "broken"])
def test_output_never_raises(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    console.info("info")
    console.warn("warning")
    with console.progress(total=2, desc="Bar") as bar:
        bar.update()
        console.info("info")


TALK = """
import console, sys, tempfile
{}
with console.plain_errors():
    with tempfile.TemporaryFile("w+") as file, console.progress(total=2, mininterval=0) as bar:
        bar.update()
        console.info("x" * 10_000)
        console.warn("y")
        file.seek(0)
        content = file.read()
    sys.exit(7 if content == "" else 8)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other shells")
@pytest.mark.parametrize(
    ("redirections", "before"),
    [
        ("2>&-", ""),
        (">&- 2>&-", ""),
        pytest.param(
            *(">/dev/full 2>/dev/full", ""),
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it"),
        ),
        ("", "sys.stdout = sys.stderr = None"),
    ],
)
def test_scripts_do_without_stdout_and_stderr(redirections, before):
    assert execute(TALK.format(before), redirections)[0] == 7


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_messages_survive_any_file_name(monkeypatch, stream, encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, stream, file)
    name = os.fsdecode(b"caf" + bytes([0xE9]) + b".png")
    {"stdout": console.info, "stderr": console.warn}[stream](f"{name}: 3 µm")
    assert file.buffer.getvalue().startswith(b"caf\\udce9.png: 3 ")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_messages_stand_above_the_bars_of_a_terminal():
    import pty  # noqa: PLC0415

    script = (
        "import console\n"
        "with console.progress(total=2, desc='Outer') as bar:\n"
        "    console.warn('a warning')\n    console.info('a message')\n    bar.update()"
    )
    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=terminal, stderr=terminal
    )
    assert process.wait(60) == 0
    os.close(terminal)
    printed = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert "\r\x1b[K" in printed or re.search(r"\r +\r", printed)  # the bar made room
    for text in ("a warning", "a message"):
        assert re.search(rf"\r{text}\r\n", printed)


def test_a_log_file_shows_a_bar_twice_a_minute_and_no_inner_ones(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with console.progress(total=900, desc="Outer") as bar:
        for number in range(900):  # a minute and a half
            clock[0] += 0.1
            bar.update()
            bar.set_postfix(loss=1, refresh=False)
            if number % 300 == 0:
                console.warn("a warning")
                with console.progress(range(3), desc="Inner", leave=False) as inner:
                    list(inner)
    printed = capsys.readouterr().err
    assert "\r" not in printed and "\x1b" not in printed and "Inner" not in printed
    lines = printed.splitlines()
    assert 3 <= sum("Outer" in line for line in lines) <= 5
    assert lines.count("a warning") == 3 and all(lines)


def test_only_the_first_process_shows_bars(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with console.progress(total=1) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


# Options --------------------------------------------------------------------------------------


def test_help_shows_defaults_but_no_none_and_no_doc_is_needed(capsys):
    for doc in ("Does this.\n\nAt length.", None):  # None under python -OO
        parser = Parser(doc)
        parser.add_argument("--root", default="50 %s", help="folder")
        parser.add_argument("--steps", shown="9 in A", help="updates")
        parser.add_argument("--init", help="file")
        parser.add_argument("--fast", action="store_true", help="quick")
        assert status_of(parser.parse_args, ["--help"]) == 0
        printed = capsys.readouterr().out
        assert "(default: 50 %s)" in printed and "(default: 9 in A)" in printed
        assert printed.count("default") == 2 and "None" not in printed and "length" not in printed
        assert ("Does this." in printed) is (doc is not None)


def test_a_mistyped_option_is_one_line_that_names_the_nearest(capsys):
    parser = Parser("Does this.", prog="do")
    parser.add_argument("--batch-size")
    parser.add_argument("images", nargs="*")
    assert parser.parse_args(["a", "--batch-size", "2", "b"]).images == ["a", "b"]
    for given in (["--batchsize=3"], ["--batch", "3"]):  # no abbreviations, which may change
        assert status_of(parser.parse_args, given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert given[0] in line
    assert status_of(parser.parse_args, ["a", "--batch_size", "3"]) == 2
    assert "--batch-size" in capsys.readouterr().err


EVEN = console.option(int, "an even number", lambda n: n % 2 == 0)


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (console.count, {"1": 1, "36": 36}, ["0", "-1", "1.5", "nan", "inf", "", "six"]),
        (console.count_or_none, {"0": 0, "4": 4}, ["-1", "0.5", "9" * 5000]),
        (EVEN, {"-2": -2, "0": 0}, ["7", "2.0"]),
        (console.positive, {"1e-4": 1e-4, "2": 2.0}, ["0", "-1", "nan", "inf", "1e999", "x"]),
    ],
)
def test_odd_numbers_are_refused(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            parse(text)


def test_paths_are_taken_as_people_type_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "file").touch()
    assert console.path("~/large") == tmp_path / "large"
    assert console.existing_folder("~") == tmp_path
    assert console.existing_file("~/file") == tmp_path / "file"
    for parse, text in (
        (console.path, ""),
        (console.existing_folder, ""),
        (console.existing_folder, "~/file"),
        (console.existing_file, "~/none"),
        (console.existing_file, "~"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=text or "empty"):
            parse(text)
