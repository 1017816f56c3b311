"""A training run's folder, the state to resume from in it, and the weights it publishes."""

import contextlib
import itertools
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import console
import files
import metrics
import weights
from console import NotFiniteError, UserError
from metrics import Metrics
from stages import Stage

START = "starting weights"  # key of the settings: a file's digest, or "" if --init was given


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    validated: int = -1  # step of the last validation
    best: Metrics = field(default_factory=dict)  # metrics of the weights that validated best
    best_step: int = 0


def begin(stage: Stage, options: Namespace, settings: dict) -> tuple[Path, dict, dict]:
    """Returns a run's folder, its state to resume from or {}, and its complete settings.

    A run is not continued if the weights that it started from have changed, because an earlier
    stage has been trained since.

    Raises:
        UserError: the state does not belong to the run asked for.
    """
    runs = options.runs / stage.name
    inherits = not options.init and stage.starts_from not in ("", stage.publishes)
    start = files.weight_path(options.ckpts, stage.starts_from) if inherits else None
    needed = [files.weight_path(options.ckpts, name) for name in stage.needs]
    settings = settings | {path.name: files.digest(path) for path in needed}
    settings[START] = files.digest(start) if start else ""
    numbers = [int(path.name) for path in runs.glob("*") if path.name.isdecimal()]
    last = max((n for n in numbers if (runs / f"{n}/state.pth").exists()), default=None)
    if options.resume and last:
        path = runs / str(last) / "state.pth"
        state = weights.load_file(path)
        if not all(isinstance(state.get(key), dict) for key in ("settings", "progress", "parts")):
            raise UserError(f"{path}: not the state of a run; omit --resume")
        before, now = state["settings"].get(START, ""), settings[START]
        if options.accept_changes or before == now or not (before and now):
            settings[START] = now if options.accept_changes else before
            check(path, state, settings, options.accept_changes)
            return path.parent, state, settings
        console.info(f"{path}: {start} has changed since; {stage.name} starts from scratch")
    elif options.resume:
        console.info(f"{runs}: no run to continue; {stage.name} starts from scratch")
    for number in itertools.count(max(numbers, default=0) + 1):
        with contextlib.suppress(FileExistsError):  # another run has just made it
            (runs / str(number)).mkdir(parents=True)
            return runs / str(number), {}, settings


def check(path: Path, state: dict, settings: dict, accept_changes: bool) -> None:
    """Checks a state against the settings of a run, and prints the step at which it continues.

    If changes are accepted, the best metrics are reset: they belong to other settings.

    Raises:
        UserError: the settings differ.
    """
    before, changes = state["settings"], {}
    for key, now in settings.items():
        if now != before.get(key):
            change = f"{key} {before.get(key)} -> {now}"
            changes[key] = change if len(change) < 120 else f"other {key}"
    step, steps = state["progress"]["step"], settings["steps"]
    if step > steps:
        raise UserError(f"{path}: already at step {step}; use a larger --steps")
    more = f" with {changes.pop('steps')}" if "steps" in changes else ""
    if changes and not accept_changes:
        raise UserError(
            f"{path}: was trained with different settings: {'; '.join(changes.values())}; use the"
            " same ones, or --accept-changes to continue anyway"
        )
    if changes:
        state["progress"] |= {"best": {}, "validated": -1}  # like with like only
    console.info(f"{path.parent}: continues at step {step}{more}")


def save(folder: Path, parts: dict, done: Progress, settings: dict) -> None:
    """Writes a run's averaged weights, `latest.pth`, and its state, `state.pth`.

    Raises:
        NotFiniteError: a weight is not finite; nothing is written.
    """
    current = {key: part.state_dict() for key, part in parts.items()}
    if not weights.is_finite(current):
        raise NotFiniteError("not finite")
    weights.save_network(parts["ema"], folder / "latest.pth")
    content = {"progress": vars(done), "settings": settings, "parts": current}
    weights.save_file(content, folder / "state.pth")


def save_anyway(save: Callable[[], None], folder: Path, done: Progress) -> None:
    """Saves a run that stops early, and says so or why it failed."""
    try:
        save()
    except Exception as error:  # the first error is the one to raise
        console.warn(f"{folder}: step {done.step} could not be saved: {console.one_line(error)}")
    else:
        console.warn(f"{folder}: saved at step {done.step}; continue with --resume")


def publish(
    stage: Stage, folder: Path, options: Namespace, done: Progress, old: Metrics, reference: Metrics
) -> None:
    """Copies a run's best weights to `options.ckpts`, for tests and later stages.

    Existing weights are kept if they validate as well or, for stages without a metric to judge by
    (see `Stage.best_by`) or without validation, if this run is shorter than the stage's recipe.
    Replaced weights are kept in the run's folder.

    Args:
        options: `ckpts`; `publish`: replace weights anyway if the run is complete.
        old: metrics of the existing weights, {} if there are none.
        reference: metrics of the stage's baseline.
    """
    target = files.weight_path(options.ckpts, stage.publishes)
    source, step, steps = folder / "latest.pth", done.step, type(stage).recipe.steps
    complete = step >= stage.recipe.steps
    if done.best:
        source, step = folder / "best.pth", done.best_step
        rows = (stage.compared_with, reference), ("published", old), (f"step {step}", done.best)
        metrics.print_table([row for row in rows if row[1]])
    if done.best and stage.best_by:
        better, reason = stage.better(done.best, old), f"{source} is not better"
    else:
        better = complete and (done.step >= steps or not target.exists())
        reason = f"{source} has only {done.step} of the {steps} steps in {stage.name}'s recipe"
    if target.exists() and source.exists() and files.digest(source) == files.digest(target):
        console.info(f"{target}: already is {source} (step {step})")
    elif not (better or (options.publish and complete)):
        console.info(f"{target}: unchanged, as {reason}; copy that file, or use --publish")
    else:
        if target.exists():
            kept = folder / f"replaced-{files.digest(target)}.pth"
            copy(target, kept)
            console.info(f"{kept}: backup of {target}")
        copy(source, target)
        console.info(f"{target}: now {source} (step {step})")


def copy(source: Path, target: Path) -> None:
    """Copies a file atomically."""
    with files.replacing(target, durable=True) as temporary:
        shutil.copyfile(source, temporary)


def restore(parts: dict, state: dict, path: Path) -> None:
    """Loads networks and optimisers from a state; the optimisers keep their settings.

    Raises:
        UserError: the state belongs to other networks.
    """
    try:
        for key, part in parts.items():
            own = getattr(part, "param_groups", [])
            part.load_state_dict(state["parts"][key])
            for parameter, kept in getattr(part, "state", {}).items():  # in the weights' layout
                for name in kept.keys() - {"step"}:
                    kept[name] = torch.empty_like(parameter).copy_(kept[name])
            for group, given in zip(getattr(part, "param_groups", []), own, strict=True):
                group |= {"factor": given["factor"], "betas": given["betas"]}
    except (KeyError, RuntimeError, ValueError) as error:
        reason = console.one_line(error)[:200]
        raise UserError(f"{path}: does not fit this run ({reason}); omit --resume") from error
