"""Every command line that the documentation shows is one that the scripts understand."""

import argparse
import importlib
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed.run
from conftest import REPOSITORY

import main

PAGES = [
    path
    for path in [
        *(REPOSITORY / "README.md", REPOSITORY / "ckpts" / "README.md"),
        *sorted((REPOSITORY / "docs").glob("*.md")),
    ]
    if path.exists()
]


def code_blocks(page):
    """Yields the (language, text) of every fenced block of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    """Yields the words of every command line in a page's code blocks."""
    for language, text in code_blocks(page):
        if language == "python":
            continue
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            try:
                lexer = shlex.shlex(line.lstrip("$> "), posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                words = list(lexer)
            except ValueError:  # an apostrophe in something that is no command
                continue
            command = []
            for word in [*words, ";"]:
                if not set(word) <= set("();<>|&"):
                    command.append(word)
                    continue
                while command and re.match(r"\w+=", command[0]):
                    command.pop(0)
                if command:
                    yield command
                command = []


def script_of(command):
    """Returns the arguments that Python is given, None if the command does not start Python."""
    name = re.split(r"[\\/]", command[0])[-1].removesuffix(".exe")
    if re.fullmatch(r"python[\d.]*", name):
        return command[1:]
    if name == "torchrun":
        options = torch.distributed.run.get_args_parser().parse_args(command[1:])
        return [options.training_script, *options.training_script_args]
    return None


PYTHON = [
    (page.relative_to(REPOSITORY).as_posix(), command)
    for page in PAGES
    for command in commands(page)
    if re.split(r"[\\/]", command[0])[-1].removesuffix(".exe") in ("python", "python3", "torchrun")
]


class Parsed(Exception):
    """The script has come past its parser."""


def parse(script, arguments, monkeypatch):
    """Has a script parse its arguments and do nothing else."""
    name = Path(script).stem
    if name == "main":
        if arguments[:1] and arguments[0] in main.COMMANDS:
            main.parser_of(arguments[0]).parse_args(arguments[1:])
        else:
            main.run(arguments)  # no command: runs nothing by itself
        return
    original = argparse.ArgumentParser.parse_known_args

    def parse_only(self, args=None, namespace=None):
        _, unknown = original(self, args, namespace)
        raise Parsed(unknown)

    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    with pytest.raises(Parsed) as ended:
        importlib.import_module(name).main()
    assert ended.value.args == ([],)


def check(command, folder, monkeypatch):
    arguments = script_of(command)
    if arguments[:1] == ["-c"]:
        compile(arguments[1], "-c", "exec")
    if not arguments or arguments[0].startswith("-"):
        return
    script, *options = arguments
    assert (REPOSITORY / script).is_file(), f"there is no {script}"
    monkeypatch.chdir(folder)
    for flag, value in pairwise(options):  # what a user would have
        if flag == "--root":
            Path(value).mkdir(parents=True, exist_ok=True)
        elif flag in ("--init", "--vgg", "--generator"):
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).touch()
    parse(script, options, monkeypatch)


@pytest.mark.parametrize(
    ("page", "command"), PYTHON, ids=[f"{page}: {shlex.join(words)}" for page, words in PYTHON]
)
def test_command_is_understood(page, command, tmp_path, monkeypatch):
    check(command, tmp_path, monkeypatch)


def test_commands_are_found():
    shown = {" ".join(command) for _, command in PYTHON}
    assert any("slice_images_w_overlapping.py" in each for each in shown)
    assert any("join_slice_images.py" in each for each in shown)
    assert any("main.py" in each for each in shown)


@pytest.mark.parametrize(
    "line",
    [
        "python main.py dance",
        "python main.py train --no-such-option 1",
        "python slice_images_w_overlapping.py --tiles 0",
        "python nothing.py",
        "python demo.py --fast",
        "torchrun --nproc-per-node=4 main.py train --steps none",
        "torchrun --no-such-option main.py train",
        ".venv/bin/python bench.py --repeats -1",
    ],
)
def test_wrong_commands_would_be_noticed(line, tmp_path, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        check(shlex.split(line), tmp_path, monkeypatch)


def test_lines_of_the_readme_are_split_into_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "python not_code.py\n```sh\n$ A=1 python main.py test \\\n  --tiles 3   # why\n"
        "cd x && .venv\\\\Scripts\\\\python demo.py | tee log\nit's no command\n```\n"
        "```python\npython = 1\n```\n"
    )
    assert list(commands(page)) == [
        ["python", "main.py", "test", "--tiles", "3"],
        ["cd", "x"],
        [r".venv\Scripts\python", "demo.py"],
        ["tee", "log"],
    ]
    assert script_of([r".venv\Scripts\python", "demo.py"]) == ["demo.py"]


def test_last_lines_of_main_are_quoted_as_they_are():
    text = (REPOSITORY / "main.py").read_text()
    for page in PAGES:
        for _, block in code_blocks(page):
            if re.search(r"^\s*# train_edges\(\)$", block, re.MULTILINE):
                lines = [line.strip() for line in block.strip().splitlines()]
                own = [line.strip() for line in text.splitlines()]
                assert lines == own[own.index(lines[0]) :][: len(lines)]
