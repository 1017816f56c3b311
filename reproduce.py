"""Trains all stages in order within a given time, and prints the command to repeat each of them.

    python reproduce.py --minutes 90 --root DATA [--init DIR] [--stages SRResNet,SRGAN] [--resume]

Each stage gets its share of the time. A short trial measures how long it takes to start and how
long a step takes; then its number of steps is fixed, so that its schedule, and the command that is
printed, do not depend on the machine. Time left over by a stage goes to the next ones. Ends with
the table of `ablation.py` if DATA/TestSet/2400px holds images.
"""

import json
import shlex
import shutil
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import ablation
import console
import files
import main
import stages
import tiles
import training
from device import Device, open_device

SHARES = {  # of the time
    "EdgePreModel": 0.24,
    "SRResNet": 0.31,
    "SRGAN": 0.14,
    "EdgeStageModel": 0.05,
    "PreModel": 0.17,
    "SRModel": 0.09,
}
CUDA_BATCHES = {"SRResNet": 64}  # crops at a time that keep a GPU busy; others: 32
TRIAL = training.LOG_EVERY + 10  # steps; the last ten tell the pace, when a GPU is warm
DONE = "done"


def run() -> None:
    """Trains the stages one after the other."""
    parser = console.Parser(__doc__)
    add, root, folder = parser.add_argument, console.ROOT, console.existing_folder
    wanted = f"one or more of {','.join(SHARES)}"
    known = console.option(lambda text: text.split(","), wanted, set(SHARES).issuperset)
    add("--minutes", type=console.positive, required=True, help="time for all stages")
    add("--root", type=folder, default=root, help="folder of TrainingSet/, sliced")
    add("--init", type=folder, help="folder of weights to start from")
    add("--stages", type=known, default=SHARES, shown="all", help="only these")
    add("--resume", action="store_true", help="continue the last run")
    add("--ckpts", type=console.path, default=root / "ckpts", help="folder of the weights")
    add("--runs", type=console.path, default=root / "runs", help="folder of the runs")
    add("--vgg", type=console.existing_file, shown="download", help="weight file of VGG19")
    add("--held-out", type=console.count, default=8, help="images held out for validation")
    add("--crop", type=console.count, default=48, help="side of the crops in LR pixels")
    options = parser.parse_args()
    end, plan_path = time.monotonic() + 60 * options.minutes, options.runs / "reproduce.json"
    device = open_device(training=True)
    plan = device.from_first(load_plan, plan_path) if options.resume else {}
    left = [name for name in SHARES if name in options.stages and plan.get(name) != DONE]
    for number, name in enumerate(left):
        share = SHARES[name] / sum(SHARES[each] for each in left[number:])
        given, command = stage_options(name, options, device)
        if name in plan:
            given.resume, given.steps = True, plan[name]
        else:
            seconds = share * (end - time.monotonic())
            given.steps = device.gather([count_steps(name, given, device, seconds)])[0]
        batches = given.steps * stages.STAGES[name].recipe.accumulate
        given.checkpoint_every = -(-batches // 2)  # two validations
        command += ["--steps", given.steps, "--checkpoint-every", given.checkpoint_every]
        device.info(f"$ python main.py {shlex.join(map(str, command))}")
        device.from_first(save_plan, plan_path, plan | {name: given.steps})
        training.fit(stages.STAGES[name], given, device)
        plan[name] = DONE
        device.from_first(save_plan, plan_path, plan)
    device.from_first(print_table, options)


def stage_options(name: str, options: Namespace, device: Device) -> tuple[Namespace, list]:
    """Returns the options of a stage's training, and the command line they come from."""
    command = next(command for command, names in main.TRAINS.items() if name in names)
    argv = ["--stage", name, "--publish", "--root", options.root, "--crop", options.crop]
    argv += ["--held-out", options.held_out, "--ckpts", options.ckpts, "--runs", options.runs]
    start = options.init and files.weight_path(options.init, stages.STAGES[name].publishes)
    if start and device.from_first(start.exists):
        argv += ["--init", start]
    if options.vgg:
        argv += ["--vgg", options.vgg]
    if device.torch_device.type == "cuda":
        argv += ["--batch-size", CUDA_BATCHES.get(name, 32)]
    given = main.parser_of(command).parse_args([str(each) for each in argv])
    return given, [command, *argv]


def count_steps(name: str, given: Namespace, device: Device, seconds: float) -> int:
    """Returns how many steps of a stage fit into some seconds, measured by a short trial."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ckpts = Path(folder) / "ckpts"
        given.ckpts.mkdir(parents=True, exist_ok=True)
        shutil.copytree(given.ckpts, ckpts)  # a trial publishes nothing
        trial = vars(given) | {"steps": TRIAL, "ckpts": ckpts, "runs": Path(folder) / "runs"}
        pace = training.fit(stages.STAGES[name], Namespace(**trial), device)
    taken = time.monotonic() - start
    starting = taken - TRIAL * pace  # which the training itself needs once more
    return max(1, round((seconds - taken - starting) / pace))


def print_table(options: Namespace) -> None:
    """Prints the table of `ablation.py` if there are test images."""
    if (options.root / tiles.TEST / tiles.HR).is_dir():
        ablation.main(["--root", str(options.root), "--ckpts", str(options.ckpts)])


def load_plan(path: Path) -> dict[str, int | str]:
    """Returns what `save_plan` wrote, or {}."""
    return json.loads(path.read_text()) if path.exists() else {}


def save_plan(path: Path, plan: dict[str, int | str]) -> None:
    """Writes each stage's number of steps, or that it is done."""
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(plan))


if __name__ == "__main__":
    with console.plain_errors():
        run()
