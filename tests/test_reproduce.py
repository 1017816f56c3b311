import json
import os
import re
import shutil
import sys
from argparse import Namespace

import pytest
from conftest import Launched, command

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


def resume_by_rank(sliced, runs):
    """Continues with a folder of runs that only the first process has, as on several machines."""
    runs = runs / os.environ["RANK"]
    given = ["--minutes", 1, "--root", sliced, "--ckpts", runs, "--runs", runs, "--resume"]
    sys.argv = ["reproduce.py", *map(str, given), "--stages", "SRResNet"]
    reproduce.ablation.main = lambda _: None
    reproduce.run()


def test_the_first_process_knows_what_is_done(sliced, tmp_path):
    reproduce.save_plan(tmp_path / "0" / "reproduce.json", {"SRResNet": "done"})
    launched = Launched(tmp_path / "log", resume_by_rank, sliced, tmp_path, processes=2)
    statuses, printed = launched.wait(30)
    assert statuses == [0, 0], printed


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
