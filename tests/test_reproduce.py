import json
import re
import shutil
from argparse import Namespace

import pytest
from conftest import command

import console
import reproduce
import training


@pytest.fixture
def reproduced(sliced, ckpts, vgg, tmp_path, monkeypatch, capsys):
    """Runs the script for some seconds; returns what it printed."""
    shutil.copytree(ckpts, tmp_path / "ckpts")

    def run(*more, seconds=6):
        given = ["--minutes", seconds / 60, "--root", sliced, "--init", ckpts, "--vgg", vgg]
        given += ["--ckpts", tmp_path / "ckpts", "--runs", tmp_path / "runs"]
        given += ["--held-out", 1, "--crop", 16, *more]
        monkeypatch.setattr("sys.argv", ["reproduce.py", *map(str, given)])
        monkeypatch.setattr(reproduce.ablation, "main", lambda _: None)
        with console.plain_errors():
            reproduce.run()
        return capsys.readouterr().out

    return run


def test_stages_are_trained_in_order_and_their_commands_repeat_them(reproduced, tmp_path):
    printed = reproduced("--stages", "SRGAN,SRResNet")
    lines = re.findall(r"^\$ python main\.py (.*)$", printed, re.MULTILINE)
    assert [re.search(r"--stage (\w+)", line)[1] for line in lines] == ["SRResNet", "SRGAN"]
    assert json.loads((tmp_path / "runs" / "reproduce.json").read_text()) == {
        "SRResNet": "done",
        "SRGAN": "done",
    }
    command(*lines[0].split())
    first, second = (tmp_path / "runs" / "SRResNet" / n / "latest.pth" for n in "12")
    assert first.read_bytes() == second.read_bytes()


def test_what_is_done_is_not_done_again(reproduced, tmp_path):
    reproduced("--stages", "SRResNet")
    printed = reproduced("--stages", "SRResNet,SRGAN", "--resume")
    assert "--stage SRGAN" in printed and "--stage SRResNet" not in printed


def test_what_a_gpu_needs_to_wake_up_is_no_part_of_the_pace(tmp_path, monkeypatch):
    clock, wake_up = [0.0], [60, 0]

    def fit(stage, options, device):
        clock[0] += wake_up.pop(0) + 5 + options.steps * 0.1
        return 0.1

    monkeypatch.setattr(reproduce.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "fit", fit)
    steps = reproduce.count_steps("SRResNet", Namespace(ckpts=tmp_path), None, 300)
    assert steps == pytest.approx((300 - clock[0] - 65) / 0.1, abs=1)


def test_unknown_stages_are_refused(reproduced):
    with pytest.raises(SystemExit) as ended:
        reproduced("--stages", "SRRestNet")
    assert ended.value.code == 2
