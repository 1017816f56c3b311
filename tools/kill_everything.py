"""Kills every command at random moments, restarts it, and compares with an undisturbed run.

    python tools/kill_everything.py [--kills 20] [--training-kills 10] [--seed 0] [COMMAND ...]

Slicing, testing and joining are started again after every kill, trainings with --resume once they
have saved a state. In the end, tiles and images must be the same to the byte, and so must weights
and states. Prints a line per command; exits with 1 if anything differs. Takes about half an hour.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from conftest import photograph, save, shrunk

import console
import files
import stages
import weights
from console import ROOT
from main import TRAINS
from models import EdgeGenerator, Generator, SRResNet
from tiles import HR, LR, OUTPUT, TEST, TILES, TRAINING

STEPS = {"SRModel": 30}  # others: 100
COMMANDS = ["slice", "test", "join", *stages.STAGES]


@dataclass
class Target:
    """A command to kill.

    Attributes:
        command: its command line.
        reset: removes its output.
        result: returns its output, by name.
        resume: returns the options with which it continues.
    """

    command: list[object]
    reset: Callable[[], None]
    result: Callable[[], dict[str, object]]
    resume: Callable[[], list[str]] = list

    def run(self) -> None:
        """Runs the command to its end, which must succeed."""
        done = subprocess.run(self.arguments(), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(self.arguments())}\n{done.stderr}")

    def arguments(self) -> list[str]:
        """Returns the command line that starts or continues the command."""
        return [sys.executable, *map(str, self.command), *self.resume()]


def main() -> None:
    """Kills the commands one after the other."""
    parser = console.Parser(__doc__)
    add, count = parser.add_argument, console.count
    add("--kills", type=count, default=20, help="kills of slice, test and join each")
    add("--training-kills", type=count, default=10, help="kills of each training")
    add("--seed", type=int, default=0, help="random seed for the moments")
    add("commands", nargs="*", metavar="COMMAND", help=f"any of {', '.join(COMMANDS)}")
    options = parser.parse_args()
    if unknown := set(options.commands) - set(COMMANDS):
        parser.error(f"no such command: {', '.join(sorted(unknown))}")
    chosen, rng, differing = options.commands or COMMANDS, random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        pipeline = image_targets(Path(folder))
        for name in COMMANDS:
            if name not in pipeline and name not in chosen:
                continue  # slice, test and join need those before them
            target = pipeline.get(name) or training_target(Path(folder), name)
            target.reset()
            began = time.monotonic()
            target.run()
            seconds, expected = time.monotonic() - began, target.result()
            if name in chosen:
                kills = options.kills if name in pipeline else options.training_kills
                count, wrong = kill(target, expected, kills, seconds, rng)
                verdict = f"DIFFERS: {', '.join(wrong[:5])}" if wrong else "nothing lost"
                print(f"{name}: killed {count} times in {seconds:.1f} s: {verdict}", flush=True)
                differing += bool(wrong)
    sys.exit(bool(differing))


def kill(
    target: Target, expected: dict, kills: int, seconds: float, rng: random.Random
) -> tuple[int, list[str]]:
    """Kills a command `kills` times; whenever it completes, it starts from scratch.

    Args:
        expected: the result of an undisturbed run, which took `seconds`.

    Returns:
        How often it was killed, and the names of what differed in the end.
    """
    count, wrong = 0, set()
    target.reset()
    while count < kills:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(target.arguments(), **pipes, text=True)
        try:
            # mostly while it works, not while it starts: half of the kills are in the last third
            late = rng.random() < 0.5
            process.wait(rng.uniform(0.66 if late else 0, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            count += 1
            continue
        if process.returncode:
            return count, [process.communicate()[1].splitlines()[-1]]
        wrong |= differences(expected, target.result())
        target.reset()
    target.run()
    return count, sorted(wrong | differences(expected, target.result()))


def differences(expected: dict, found: dict) -> set[str]:
    """Returns the names of the items in which two results differ."""
    names = expected.keys() | found.keys()
    return {name for name in names if not same(expected.get(name), found.get(name))}


def same(a: object, b: object) -> bool:
    """Returns whether two nested values are equal, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# What is killed -------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """Makes images, weights of tiny networks to start from, and random weights of VGG19."""
    for number in range(12):
        hr = photograph(number, 384)
        for subset in (TRAINING, TEST):
            save(root / subset / LR, f"image_600px_{number:04d}.png", shrunk(hr))
        save(root / TRAINING / HR, f"image_2400px_{number:04d}.png", hr)
    torch.manual_seed(0)
    start = root / "start"
    start.mkdir()
    for names, kind, size in (
        (("EdgeModel", "EdgePreModel"), EdgeGenerator, (8, 2)),
        (("SRResNet", "SRGAN"), SRResNet, (16, 8)),
        (("EdgeStageModel", "PreModel", "SRModel"), Generator, (16, 8)),
    ):
        for name in names:
            weights.save_network(kind(*size), start / f"{name}_gen.pth")
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])[:12]
    vgg = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(vgg, start / "vgg19.pth")


def image_targets(root: Path) -> dict[str, Target]:
    """Returns slice, test and join, each of which needs those before it."""
    output = root / TEST / LR / OUTPUT
    tested = root / "tested"  # a copy of test's output, for join to start from

    def remove() -> None:
        shutil.rmtree(output, ignore_errors=True)

    def remove_tiles() -> None:
        for folder in root.glob(f"*/*/{TILES}"):
            shutil.rmtree(folder)

    def lay_out() -> None:
        if not tested.exists():
            shutil.copytree(output, tested)
        remove()
        shutil.copytree(tested, output)

    def result() -> dict[str, bytes]:
        found = [path for subset in (TRAINING, TEST) for path in (root / subset).rglob("*.png")]
        return {str(p.relative_to(root)): p.read_bytes() for p in found if p.name[0] != "."}

    test = ["main.py", "test", "--ckpts", root / "start"]
    commands = {
        "slice": (["slice_images_w_overlapping.py"], remove_tiles),
        "test": (test, remove),
        "join": (["join_slice_images.py"], lay_out),
    }
    return {
        name: Target([ROOT / script, *more, "--root", root], reset, result)
        for name, ((script, *more), reset) in commands.items()
    }


def training_target(root: Path, name: str) -> Target:
    """Returns the training of a stage."""
    start, ckpts, runs = (root / each for each in ("start", f"ckpts-{name}", f"runs-{name}"))

    def reset() -> None:
        for folder in (ckpts, runs):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, ckpts)

    def result() -> dict[str, object]:
        latest = max((runs / name).iterdir(), key=lambda folder: int(folder.name))
        paths = [*latest.glob("*.pth"), files.weight_path(ckpts, stages.STAGES[name].publishes)]
        return {path.name: weights.load_file(path) for path in paths}

    def resume() -> list[str]:
        return ["--resume"] if list(runs.rglob("state.pth")) else []

    command = next(command for command, names in TRAINS.items() if name in names)
    given = [ROOT / "main.py", command, "--stage", name, "--root", root, "--ckpts", ckpts]
    given += ["--runs", runs, "--vgg", start / "vgg19.pth", "--steps", STEPS.get(name, 100)]
    given += ["--batch-size", 2, "--crop", 16, "--checkpoint-every", 5, "--held-out", 1]
    if name in ("EdgePreModel", "SRResNet"):  # which would start from full-size networks
        given += ["--init", start / f"{name}_gen.pth"]
    return Target([*given, "--workers", 1], reset, result, resume)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
