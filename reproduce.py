"""Trains all stages in order within a given time, and prints the commands that repeat each of them.

    python reproduce.py --minutes 90 --root DATA [--init DIR] [--stages SRResNet,SRGAN] [--resume]

A stage gets its share of the time. Two short trials tell how long it takes to start and how long
a step takes; from then on its number of steps is fixed, so that its schedule, and the command that
is printed, are the same on every machine. Time that a stage leaves goes to the next ones. Ends with
the table of `ablation.py` if DATA/TestSet/2400px holds images.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import console
import files
import main
import stages
import tiles
import training
from console import UserError
from device import Device, open_device

SHARES = {  # of the time
    "EdgePreModel": 0.24,
    "SRResNet": 0.31,
    "SRGAN": 0.14,
    "EdgeStageModel": 0.05,
    "PreModel": 0.17,
    "SRModel": 0.09,
}
CUDA = {"SRResNet": ["--batch-size", "64"]}  # a GPU needs more crops at a time to be busy
CUDA_OTHERS = ["--batch-size", "32"]
TRIALS = 5, 25  # steps


def run() -> None:
    """Trains the stages one after the other."""
    parser = console.Parser(__doc__)
    add, root, folder = parser.add_argument, console.ROOT, console.existing_folder
    minutes = console.number(float, "a number above 0", lambda x: x > 0)
    add("--minutes", type=minutes, required=True, help="time for all stages")
    add("--root", type=folder, default=root, help="folder of TrainingSet/, sliced")
    add("--init", type=folder, help="folder of weights to start from")
    add("--stages", type=known_stages, default=list(SHARES), shown="all", help="only these")
    add("--resume", action="store_true", help="continue the last run")
    add("--ckpts", type=console.path, default=root / "ckpts", help="folder of the weights")
    add("--runs", type=console.path, default=root / "runs", help="folder of the runs")
    add("--vgg", type=console.existing_file, shown="download", help="file of VGG19's weights")
    add("--held-out", type=console.count, default=8, help="images kept for validation")
    add("--crop", type=console.count, default=48, help="LR pixels a side of the crops")
    options = parser.parse_args()
    end, plan_path = time.monotonic() + 60 * options.minutes, options.runs / "reproduce.json"
    plan = json.loads(plan_path.read_text()) if options.resume and plan_path.exists() else {}
    with open_device(training=True) as device:
        left = [name for name in options.stages if not plan.get(name, {}).get("done")]
        for number, name in enumerate(left):
            share = SHARES[name] / sum(SHARES[each] for each in left[number:])
            given, command = stage_options(name, options, device)
            steps = plan.get(name, {}).get("steps")
            given.resume = steps is not None
            given.steps = steps or count_steps(
                name, given, device, share * (end - time.monotonic())
            )
            command += ["--steps", str(given.steps)]
            console.info(f"$ python main.py {shlex.join(command)}")
            for done in (False, True):
                plan[name] = {"steps": given.steps, "done": done}
                with files.replacing(plan_path) as temporary:
                    temporary.write_text(json.dumps(plan))
                if not done:
                    training.fit(stages.STAGES[name], given, device)
    if (options.root / tiles.TEST / tiles.HR).is_dir():
        arguments = ["--root", options.root, "--ckpts", options.ckpts]
        subprocess.run([sys.executable, console.ROOT / "ablation.py", *arguments], check=True)


def known_stages(text: str) -> list[str]:
    """Parses a list of stages; returns them in the order of training."""
    if unknown := set(text.split(",")) - SHARES.keys():
        raise UserError(f"--stages {min(unknown)}: not one of {', '.join(SHARES)}")
    return [name for name in SHARES if name in text.split(",")]


def stage_options(name: str, options: Namespace, device: Device) -> tuple[Namespace, list[str]]:
    """Returns the options of a stage's training and the command line that gives them."""
    command = next(command for command, names in main.STAGES.items() if name in names)
    argv = ["--stage", name, "--root", options.root, "--crop", options.crop]
    argv += ["--held-out", options.held_out, "--ckpts", options.ckpts, "--runs", options.runs]
    start = options.init and options.init / stages.weight_path(options, name).name
    if start and start.exists():
        argv += ["--init", start]
    if options.vgg:
        argv += ["--vgg", options.vgg]
    argv = list(map(str, argv))
    if device.torch_device.type == "cuda":
        argv += CUDA.get(name, CUDA_OTHERS)
    given = main.parser_of(command).parse_args(argv)
    return given, [command, *argv]


def count_steps(name: str, given: Namespace, device: Device, seconds: float) -> int:
    """Returns how many steps of a stage fit into a time, by two short trials; half as often it is
    validated.
    """
    start, times = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        ckpts = (
            shutil.copytree(given.ckpts, Path(folder) / "ckpts")
            if given.ckpts.exists()
            else given.ckpts
        )
        for steps in TRIALS:
            trial = Namespace(
                **vars(given) | {"steps": steps, "ckpts": ckpts, "runs": Path(folder)}
            )
            began = time.monotonic()
            training.fit(stages.STAGES[name], trial, device)
            times.append(time.monotonic() - began)
    pace = max(times[1] - times[0], 1e-6) / (TRIALS[1] - TRIALS[0])
    overhead = times[0] - TRIALS[0] * pace
    left = seconds - (time.monotonic() - start) - overhead
    steps = max(1, round(left / pace))
    accumulate = stages.STAGES[name].recipe.accumulate
    given.checkpoint_every = -(-steps * accumulate // 2)
    return steps


if __name__ == "__main__":
    with console.plain_errors():
        run()
