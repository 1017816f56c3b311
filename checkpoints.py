"""The folder of a training, the state in it to resume from, and the weights it publishes."""

import contextlib
import filecmp
import itertools
import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import console
import files
import metrics
import weights
from console import UserError
from metrics import Metrics
from stages import Stage, weight_path

START = "starting weights"  # of settings: the digest of a file, "" where --init was given


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    validated: int = -1  # the step of the last validation
    best: Metrics = field(default_factory=dict)  # of the weights that validated best
    best_step: int = 0


def begin(stage: Stage, options: Namespace, settings: dict) -> dict:
    """Returns a training's `folder`, its `state` to resume from or None, and its `settings`.

    A state is not continued whose stage started from weights that are others now: an earlier stage
    has been trained since.

    Raises:
        UserError: the state is of another training than the one asked for.
    """
    runs = options.runs / stage.name
    start = stage.starts_from and not options.init and weight_path(options, stage.starts_from)
    settings = settings | {START: files.digest(start) if start else ""}
    numbers = (path.parent.name for path in runs.glob("*/state.pth"))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if options.resume and last:
        path = runs / str(last) / "state.pth"
        state = weights.load_file(path)
        if not all(isinstance(state.get(key), dict) for key in ("settings", "progress", "parts")):
            raise UserError(f"{path}: not a state of a training; leave --resume out")
        before, now = state["settings"].get(START, ""), settings[START]
        if options.accept_changes or before == now or not (before and now):
            settings[START] = now if options.accept_changes else before
            check(path, state, settings, options.accept_changes)
            return {"folder": str(path.parent), "state": state, "settings": settings}
        console.info(f"{path}: {start} is new since; {stage.name} starts from scratch")
    elif options.resume:
        old = options.ckpts / f"{stage.name}.state.pth"
        if old.exists():
            raise UserError(
                f"{old}: an earlier version wrote it; leave --resume out and go on from its weights"
                f" with --init {weight_path(options, stage.name)}"
            )
        console.info(f"{runs}: no run to continue; {stage.name} starts from scratch")
    return {"folder": str(new_folder(runs)), "state": None, "settings": settings}


def new_folder(runs: Path) -> Path:
    """Makes and returns a folder of its own for a training, also if two ask for one at once."""
    numbers = [int(path.name) for path in runs.glob("*") if path.name.isdecimal()]
    for number in itertools.count(max(numbers, default=0) + 1):
        with contextlib.suppress(FileExistsError):
            (runs / str(number)).mkdir(parents=True)
            break
    return runs / str(number)


def check(path: Path, state: dict, settings: dict, accept_changes: bool) -> None:
    """Checks that a state is of a training with some settings, and says what it is.

    Raises:
        UserError: it is of another training than the one asked for.
    """
    changes = differences(state["settings"], settings)
    step, steps = state["progress"]["step"], settings["steps"]
    if step > steps:
        raise UserError(f"{path}: is at step {step} already; give --steps above {steps}")
    more = f" with {changes.pop('steps')}" if "steps" in changes else ""
    if changes and not accept_changes:
        raise UserError(
            f"{path}: was trained with different settings: {'; '.join(changes.values())}; give the"
            " same ones, or --accept-changes to continue anyway"
        )
    if changes:
        state["progress"] |= {"best": {}, "validated": -1}  # like with like only
    console.info(f"{path.parent}: continues at step {step}{more}")


def differences(before: dict, after: dict) -> dict[str, str]:
    """Returns a phrase for every value that differs."""
    phrases = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new and isinstance(new, list) and len(new) > 4:
            count = len(set(map(str, new)) ^ set(map(str, old or [])))
            phrases[key] = f"{key}: {count} of them differ"
        elif old != new:
            phrases[key] = f"{key} {old} -> {new}"
    return phrases


def save_anyway(
    save: Callable[[Path], None], folder: Path, spare: Path, name: str, step: int
) -> None:
    """Saves a training that an error ends, and says so, or why not.

    Args:
        save: writes to a folder.
        folder: of the training.
        spare: in the place of `{runs}`, for another disk than a full one.
    """
    for place in (folder, spare / name / folder.name):
        try:
            save(place)
        except Exception as error:  # the first error is the one to raise
            console.warn(f"{place}: {name} could not be saved: {console.one_line(error)}")
        else:
            where = "" if place == folder else f" --runs {spare}"
            console.warn(f"{name} saved at step {step}; continue with --resume{where}")
            return


def publish(
    stage: Stage,
    folder: Path,
    target: Path,
    done: Progress,
    before: Metrics,
    reference: Metrics,
    complete: bool = True,
) -> None:
    """Copies a training's best weights to where tests and later stages look for them.

    Unless those there validate as well: a short trial must not replace good weights. Nor does an
    interrupted training publish what has not been validated since it began. What is replaced is
    kept in the training's folder.

    Args:
        before: metrics of the weights there, {} if there are none.
        reference: metrics of what the stage is compared with.
        complete: the training came to its last step.
    """
    source, step = folder / "latest.pth", done.step
    if done.best:
        source, step = folder / "best.pth", done.best_step
    rows = [(stage.compared_with, reference), ("before", before), (f"step {step}", done.best)]
    if complete and done.best:
        metrics.print_table([row for row in rows if row[1]])
    if same(source, target):
        console.info(f"{target}: holds the best weights of {folder} already")
    elif not (complete or (done.best and done.best_step)):
        console.info(f"{target}: unchanged, as nothing of {source} is validated yet")
    elif before and not stage.better(done.best, before):
        key = stage.best_by
        console.info(
            f"{target}: unchanged, as its {key} {before[key]:.4f} is no worse than"
            f" {done.best.get(key, math.nan):.4f} of {source}; copy that file to use it anyway"
        )
    else:
        kept = keep(target, folder)
        with files.replacing(target, durable=True) as temporary:
            shutil.copyfile(source, temporary)
        console.info(f"{target}: now {source}, of step {step}{kept}")


def same(path: Path, other: Path) -> bool:
    """Returns whether two files are there and of one content."""
    return path.exists() and other.exists() and filecmp.cmp(path, other, shallow=False)


def keep(path: Path, folder: Path) -> str:
    """Copies a file that is about to be replaced to a folder; returns a phrase that says where."""
    if not path.exists() or any(same(path, other) for other in folder.glob("*.pth")):
        return ""
    names = itertools.chain(["replaced.pth"], (f"replaced.{n}.pth" for n in itertools.count(2)))
    kept = next(folder / name for name in names if not (folder / name).exists())
    with files.replacing(kept) as temporary:
        shutil.copyfile(path, temporary)
    return f"; what it replaces is {kept}"


def states(parts: dict) -> dict:
    """Returns the state dicts of networks and optimisers, on the CPU."""
    return {key: on_cpu(part.state_dict()) for key, part in parts.items()}


def on_cpu(state: object) -> object:
    """Returns a state, however nested, with its tensors on the CPU, in the layout they have."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return list(map(on_cpu, state)) if isinstance(state, list) else state


def restore(parts: dict, state: dict, path: Path) -> None:
    """Loads networks and optimisers from a state.

    Raises:
        UserError: it is of other networks, or not finite.
    """
    try:
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = console.one_line(error)[:200]
        raise UserError(
            f"{path}: does not fit this training ({reason}); leave --resume out"
        ) from error
    if not is_finite(states(parts)):
        raise UserError(f"{path}: holds weights that are not finite; leave --resume out")


def is_finite(state: object) -> bool:
    """Returns whether all tensors are finite that a state holds, however nested."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    values = state.values() if isinstance(state, dict) else state
    return not isinstance(state, dict | list) or all(map(is_finite, values))
