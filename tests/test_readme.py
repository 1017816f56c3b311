"""Every command line of the documentation is understood, and those of the README do what it says.

No test here starts a process: scripts run in this one, as `python SCRIPT` would run them.
"""

import glob
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import chain

import pytest
import torch.distributed.run
from conftest import REPOSITORY, photograph, save, shrunk, status_of

import console
from tiles import HR, LR, TEST, TRAINING

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "ckpts" / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(\S*/)?(python3?|torchrun|tensorboard)")
LONG = {"bench.py", "reproduce.py"}  # take minutes whatever the networks; have tests of their own
SHORT = ["--steps=2", "--batch-size=1", "--crop=16", "--held-out=1", "--workers=0"]
INIT = {"train_edges": "EdgeModel", "pretrain": "SRResNet", "train": "PreModel"}  # tiny ones


def commands(page):
    """Yields (words, comment) of every command in a page's code, blocks and inline, in order."""
    for block, inline in CODE.findall(page.read_text(encoding="utf-8")):
        text = re.sub(r"\\\n", " ", block) or " ".join(inline.split())
        for line in text.splitlines():
            code, _, comment = line.partition(" #")
            for part in re.split(r"&&|[;|]", code):
                start = re.sub(r"^[\s$>]*(\w+=\S* )*", "", part)
                if PROGRAM.fullmatch(start.partition(" ")[0]):
                    yield shlex.split(start), comment


def script_of(words):
    """Returns a script and its options; nothing where a program runs something else."""
    program, *given = words
    if program == "torchrun":
        options = torch.distributed.run.get_args_parser().parse_args(given)
        return [options.training_script, *options.training_script_args]
    return given if given and not given[0].startswith("-") else []


@pytest.fixture
def start(monkeypatch):
    """Runs a script with its options in this process; returns its exit status."""

    def start(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *options])
        return status_of(lambda: runpy.run_path(script, run_name="__main__"))

    return start


@pytest.fixture
def parse(start, monkeypatch):
    """Has a program parse its command line and do no more; returns the exit status."""
    monkeypatch.chdir(REPOSITORY)
    for name in ("existing_file", "existing_folder"):  # what a user would have
        monkeypatch.setattr(console, name, console.path)
    original = console.Parser.parse_args

    def stop(*arguments):
        original(*arguments)
        raise SystemExit(0)

    monkeypatch.setattr(console.Parser, "parse_args", stop)

    def parse(words):
        if words[0] == "tensorboard":
            from tensorboard.program import TensorBoard  # noqa: PLC0415  # which warns

            return status_of(TensorBoard().configure, words)
        if not (given := script_of(words)):
            return 0
        if "Parser(" not in (REPOSITORY / given[0]).read_text(encoding="utf-8"):
            return 2 * (len(given) > 1)  # it takes no options, and would start
        return start(*given)

    return parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_are_understood(page, parse):
    for words, _ in commands(page):
        assert parse(words) == 0, shlex.join(words)


@pytest.mark.parametrize(
    "line",
    [
        "python main.py dance",
        "python main.py train --no-such-option 1",
        "python slice_images_w_overlapping.py --tiles 0",
        "python demo.py --fast",
        "torchrun --nproc-per-node=4 main.py train --steps none",
        "torchrun --no-such-option main.py train",
        "tensorboard --no-such-option runs",
        ".venv/bin/python bench.py --repeats -1",
    ],
)
def test_wrong_commands_would_be_noticed(line, parse):
    assert status_of(lambda: sys.exit(parse(shlex.split(line)))) == 2


def test_commands_are_found_in_blocks_and_in_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "python not_code.py, but `python\nmain.py edges` is, and `main.py` is no command\n"
        "```sh\n$ A=1 python main.py test \\\n    --fast   # why\n"
        "cd x && .venv/bin/python demo.py | tee log\nit's no command\n```\n"
    )
    assert list(commands(page)) == [
        (["python", "main.py", "edges"], ""),
        (["python", "main.py", "test", "--fast"], " why"),
        ([".venv/bin/python", "demo.py"], ""),
    ]


@pytest.fixture
def copy(ckpts, tmp_path, monkeypatch):
    """A copy of the repository with tiny networks, and with the images the README speaks of."""
    for path in chain(REPOSITORY.glob("*.py"), REPOSITORY.glob("tools/*.py")):
        target = tmp_path / path.relative_to(REPOSITORY)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(ckpts, tmp_path / "ckpts")
    small = photograph(0, 128)
    for name in ("holiday.jpg", "album/a.png", "album/more/b.png"):
        save((tmp_path / name).parent, (tmp_path / name).name, shrunk(small))
    save(tmp_path / "DIR" / TEST / HR, "img_001.png", small)
    save(tmp_path / "DIR" / TEST / LR, "img_001x4.png", shrunk(small))
    save(tmp_path / TEST / HR, "image_2400px_0001.png", small)
    for number in range(4):
        save(tmp_path / TRAINING / HR, f"image_2400px_000{number}.png", photograph(number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "ROOT", tmp_path)
    return tmp_path


def test_commands_of_the_readme_work_one_after_the_other(copy, start, vgg, monkeypatch):
    def run(given, **_):  # the scripts that demo.py starts
        return subprocess.CompletedProcess(given, start(*map(str, given[1:])))

    monkeypatch.setattr(subprocess, "run", run)
    for words, comment in commands(README):
        given = script_of(words)
        if not given or given[0] in LONG or words[0] == "torchrun":
            continue
        if given[1:] and given[1] in INIT and "--help" not in given:
            given += [*SHORT, f"--vgg={vgg}", f"--init=ckpts/{INIT[given[1]]}_gen.pth"]
        given = chain(*(sorted(glob.glob(word)) if "*" in word else [word] for word in given))
        assert start(*given) == 0, shlex.join(words)
        for promised in re.findall(r"[\w./*]+\.png", comment):
            assert list(copy.glob(promised)), f"{shlex.join(words)}: {promised}"


def test_last_lines_of_main_are_quoted_as_they_are():
    def stripped(text):
        return "\n".join(line.strip() for line in text.splitlines())

    blocks = [block for block, _ in CODE.findall(README.read_text(encoding="utf-8"))]
    (quoted,) = (stripped(block) for block in blocks if "# train_edges()" in block)
    assert stripped((REPOSITORY / "main.py").read_text(encoding="utf-8")).endswith(quoted)
