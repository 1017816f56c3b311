"""Kills every command at random moments, lets it go on, and compares with an undisturbed run.

    python tests/kill_everything.py [--kills 20] [--training-kills 10] [--seed 0] [COMMAND ...]

Slicing, testing and joining are started again after every kill, trainings with --resume. In the
end there must be the same bytes in tiles and images, the same weights and states. Prints a line
per command; exits with 1 if anything differs. Takes about half an hour.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import REPOSITORY, photograph, save, shrunk

from models import EdgeGenerator, Generator, SRResNet, load_file, save_network
from tiles import HR, LR, OUTPUT, TEST, TILES, TRAINING

STAGES = {
    "EdgePreModel": "train_edges",
    "EdgeModel": "train_edges",
    "SRResNet": "pretrain",
    "EdgeStageModel": "pretrain",
    "PreModel": "pretrain",
    "SRModel": "train",
}
STEPS = {"SRModel": 30}  # others: 100
COMMANDS = ["slice", "test", "join", *STAGES]


def main() -> None:
    """Kills the commands one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of slice, test and join each")
    parser.add_argument("--training-kills", type=int, default=10, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}")
    options = parser.parse_args()
    if unknown := set(options.commands) - set(COMMANDS):
        parser.error(f"no such command: {', '.join(sorted(unknown))}")
    chosen, rng = options.commands or COMMANDS, random.Random(options.seed)
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        jobs = {
            name: (kills, *job)
            for kills, jobs in (
                (options.kills, pipeline(root)),
                (options.training_kills, trainings(root)),
            )
            for name, job in jobs.items()
        }
        for name in COMMANDS:
            if name in STAGES and name not in chosen:
                continue  # the others need what is before them
            kills, command, resume, reset, result = jobs[name]
            reset()
            began = time.monotonic()
            execute(command)
            seconds, expected = time.monotonic() - began, result()
            if name not in chosen:
                continue
            count, wrong = kill(command, resume, reset, result, expected, kills, seconds, rng)
            verdict = f"DIFFERS: {', '.join(wrong[:5])}" if wrong else "nothing lost, same result"
            print(f"{name}: killed {count} times in {seconds:.1f} s: {verdict}", flush=True)
            differing += bool(wrong)
    sys.exit(bool(differing))


def kill(
    command: list,
    resume: list,
    reset: Callable[[], None],
    result: Callable[[], dict],
    expected: dict,
    kills: int,
    seconds: float,
    rng: random.Random,
) -> tuple[int, list[str]]:
    """Kills a command so many times; whenever it comes to its end, it starts from nothing.

    Args:
        resume: options with which it goes on.
        reset: removes all that it has made.
        result: returns what it has made, by name.
        expected: `result()` of an undisturbed run.
        seconds: that the undisturbed run took.

    Returns:
        How often it was killed, and the names of what differed in the end.
    """
    count, wrong, more = 0, [], []
    reset()
    while count < kills:
        process = subprocess.Popen(
            [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            # where it works, not where it starts: half of the moments lie in the last third
            late = rng.random() < 0.5
            process.wait(rng.uniform(0.66 if late else 0, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            count, more = count + 1, resume
            continue
        if process.returncode:
            return count, [process.communicate()[1].splitlines()[-1]]
        wrong += differences(expected, result())
        reset()
        more = []
    execute([*command, *more])
    return count, sorted({*wrong, *differences(expected, result())})


def execute(command: list) -> None:
    """Runs a command to its end, which must be a good one."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


def differences(expected: dict, found: dict) -> list[str]:
    """Returns the names under which two results differ."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if not same(expected.get(name), found.get(name))]


def same(a: object, b: object) -> bool:
    """Returns whether two values are equal, tensors to the bit, however deep."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# What is killed -------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """Makes images, weights of tiny networks to start from, and VGG19's, random ones."""
    for number in range(12):
        hr = photograph(number, 384)
        for subset in (TRAINING, TEST):
            save(root / subset / LR, f"image_600px_{number:04d}.png", shrunk(hr))
        save(root / TRAINING / HR, f"image_2400px_{number:04d}.png", hr)
    torch.manual_seed(0)
    (root / "start").mkdir()
    for name in ("EdgeModel", "EdgePreModel"):
        save_network(EdgeGenerator(8, 2), root / "start" / f"{name}_gen.pth")
    save_network(SRResNet(16, 8), root / "start" / "SRResNet_gen.pth")
    for name in ("EdgeStageModel", "PreModel", "SRModel"):
        save_network(Generator(16, 8), root / "start" / f"{name}_gen.pth")
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])[:12]
    vgg = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(vgg, root / "start" / "vgg19.pth")


def pipeline(root: Path) -> dict[str, tuple]:
    """Returns command line, what to go on with, reset and result of slice, test and join."""
    output = root / TEST / LR / OUTPUT
    tiled = [root / subset / size / TILES for subset in (TRAINING, TEST) for size in (LR, HR)]
    tested = output.with_name("tested")  # the test's output, for joining to start from

    def remove(*folders: Path) -> Callable[[], None]:
        return lambda: [shutil.rmtree(each, ignore_errors=True) for each in folders] and None

    def lay_out() -> None:
        if not tested.exists():
            shutil.copytree(output, tested)
        shutil.rmtree(output)
        shutil.copytree(tested, output)

    python, fixed = sys.executable, ["--root", root]
    test = [python, REPOSITORY / "main.py", "test", "--ckpts", root / "start", *fixed]
    scripts = {"slice": "slice_images_w_overlapping.py", "join": "join_slice_images.py"}
    cut, join = ([python, REPOSITORY / scripts[name], *fixed] for name in ("slice", "join"))
    return {
        name: (list(map(str, command)), [], reset, lambda: files(root))
        for name, command, reset in (
            ("slice", cut, remove(*tiled, output)),
            ("test", test, remove(output)),
            ("join", join, lay_out),
        )
    }


def files(root: Path) -> dict[str, bytes]:
    """Returns all files below TestSet and TrainingSet by path but temporary ones."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for subset in (TRAINING, TEST)
        for path in (root / subset).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def trainings(root: Path) -> dict[str, tuple]:
    """Returns the same of each training."""
    found = {}
    for name, command in STAGES.items():
        ckpts = root / name

        def reset(ckpts: Path = ckpts) -> None:
            shutil.rmtree(ckpts, ignore_errors=True)
            shutil.copytree(root / "start", ckpts)

        def result(ckpts: Path = ckpts, name: str = name) -> dict:
            return weights(ckpts, name)

        given = [sys.executable, REPOSITORY / "main.py", command, "--stage", name]
        given += ["--root", root, "--ckpts", ckpts, "--runs", ckpts / "runs", "--workers", 1]
        given += ["--vgg", root / "start" / "vgg19.pth", "--steps", STEPS.get(name, 100)]
        given += ["--batch-size", 2, "--crop", 16, "--checkpoint-every", 5, "--held-out", 1]
        first = {"EdgePreModel": "EdgeModel", "SRResNet": "SRResNet"}.get(name)
        given += ["--init", root / "start" / f"{first}_gen.pth"] if first else []
        found[name] = (list(map(str, given)), ["--resume"], reset, result)
    return found


def weights(ckpts: Path, name: str) -> dict:
    """Returns what a training left, but for the number of its run, which a start anew raises."""
    found = {
        ending: load_file(ckpts / f"{name}{ending}")
        for ending in ("_gen.pth", "_gen_best.pth", ".state.pth")
        if (ckpts / f"{name}{ending}").exists()
    }
    found.get(".state.pth", {}).get("progress", {}).pop("run", None)
    return found


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
