"""The training loop of all stages: data, resume, steps, EMA, log, validation, checkpoints."""

import contextlib
import copy
import filecmp
import math
import os
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from console import UserError, progress, say
from dataset import CropSampler, PairedTiles, crop_pair, split
from device import Device, DeviceError, NotFiniteError, is_out_of_memory
from images import ImageError, check_writable, read_image, replacing
from metrics import Metrics, mean_of
from models import WeightError, digest, load_file, save_file, save_network
from stages import Batch, Recipe, Stage, weight_path

EMA_DECAY = 0.999  # per step
LOG_EVERY = 20  # steps
GRID_EVERY = 100  # batches
CHECKPOINT_SECONDS = 600  # at the latest, where steps take long
SAMPLE_SIDE, SAMPLES = 48, 4  # LR pixels of the held-out crops to watch, and how many


class DivergedError(UserError):
    """A loss, or a weight, is no longer finite."""


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    validated: int = -1  # the step of the last validation
    best: float = -math.inf  # the stage's metric at its best
    run: int = 1  # number of the folder of its curves


def fit(  # noqa: PLR0912, PLR0915
    stage_class: type[Stage], options: Namespace, device: Device, following: tuple[str, ...] = ()
) -> None:
    """Trains a stage to its recipe's last step, or until interrupted.

    Writes to `options.ckpts`: `{name}_gen.pth` and `{name}_gen_best.pth`, the averaged weights as
    they are and as they validated best, and `{name}.state.pth`, to resume from.

    Args:
        following: names of the stages that start from this one's weights. Where it has steps to
            go, their files are set aside: they would pass for its continuation otherwise.

    Raises:
        UserError: something is missing or damaged, the loss is not finite, or what is resumed
            differs from what is asked.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when all is saved.
    """
    # Data
    files = Files(options.ckpts, stage_class.name)
    ids, held_out = split(options.root, options.held_out)
    recipe = choose_recipe(stage_class.recipe, options)
    dataset = PairedTiles(
        options.root, ids, recipe.crops[1], recipe.color, recipe.jpeg, recipe.edges
    )
    if options.epochs:
        crops_per_step = recipe.batch_size * recipe.accumulate * device.world
        recipe = replace(recipe, steps=math.ceil(options.epochs * len(dataset) / crops_per_step))
    for folder in (options.ckpts, options.runs):
        device.from_first(check_writable, folder)

    # Networks, their optimisers, the generator's moving average
    torch.manual_seed(options.seed)
    stage = stage_class(recipe, options, device)
    networks = stage.networks
    ema = copy.deepcopy(networks["gen"]).requires_grad_(False).eval()
    optimizers = {
        key: torch.optim.Adam(stage.parameter_groups(key), betas=recipe.betas, fused=True)
        for key in networks
    }
    parts = {**networks, "ema": ema, **{f"{key} adam": each for key, each in optimizers.items()}}

    # Resume, or start afresh
    settings = describe(recipe, options, device, ids, list(held_out), len(dataset))
    settings |= device.from_first(digests, [weight_path(options, name) for name in stage.needs])
    arguments = options.resume, settings, options.accept_changes, following
    state = device.from_first(files.begin, *arguments)
    done = Progress(**state["progress"]) if state else Progress()
    if state:
        restore(parts, state, files.state)
        for key, optimizer in optimizers.items():  # the state brought its own settings back
            groups = zip(optimizer.param_groups, stage.parameter_groups(key), strict=True)
            for group, given in groups:
                group |= {"factor": given["factor"], "betas": recipe.betas}
    elif device.world > 1:  # give every process the first one's weights
        restore(parts, device.from_first(lambda: {"parts": states(parts)}), files.state)

    def save() -> None:
        if not is_finite(states(parts)):
            raise diverged(files, done.step)
        content = {"progress": asdict(done), "settings": settings, "parts": states(parts)}
        device.from_first(save_network, ema, files.gen)
        device.from_first(save_file, content, files.state)

    # Train
    batches = load_batches(dataset, recipe, options, device, done.step * recipe.accumulate)
    samples = held_out_crops(held_out, recipe, device)
    one_shape = recipe.crops[0] == recipe.crops[1]
    saved = time.monotonic()
    log = Log(stage.name, options.runs, recipe.steps, done, device)
    with with_remedies(), interruptible(notice=device.rank == 0) as interrupted, log:
        log.text("settings", settings)
        while True:
            # Validate and save
            due = done.step * recipe.accumulate % options.checkpoint_every < recipe.accumulate
            last = done.step >= recipe.steps
            if (due or last) and done.validated < done.step:
                try:
                    metrics = validate(stage, ema, held_out, device, log)
                except NotFiniteError as error:
                    raise diverged(files, done.step) from error
                except ImageError:
                    if done.step:
                        save()
                    raise
                if metrics:
                    if metrics[stage.best_by] > done.best:
                        done.best = metrics[stage.best_by]
                        device.from_first(save_network, ema, files.best)
                    log.scalar("validation/best so far", done.best)
                done.validated = done.step
                if done.step:
                    save()
                    saved = time.monotonic()
            if last:
                return

            # Fetch all of a step's batches: a damaged tile then stops between two steps
            problem, step_batches = "", []
            try:
                step_batches = [next(batches) for _ in range(recipe.accumulate)]
            except ImageError as error:
                problem = str(error)
            if device.any_process(bool(problem or interrupted)):
                save()
                message = f"{stage.name} saved at step {done.step}; go on with --resume"
                if problem := max(device.gather([problem])):
                    raise ImageError(f"{problem}. {message}")
                raise KeyboardInterrupt(message)

            # Step
            if done.step >= recipe.live_norms * recipe.steps:
                stage.freeze_norms()
            device.tune_kernels(one_shape)  # validation has set it otherwise
            rate = recipe.learning_rate * recipe.schedule(done.step, recipe)
            for loaded in step_batches:
                batch = {key: device.send(value) for key, value in loaded.items()}
                losses, scalars = stage.losses(batch)
                totals = {key: sum(terms.values()) for key, terms in losses.items()}
                for total in totals.values():
                    (total / recipe.accumulate).backward()
                log.count(losses, totals, scalars, len(batch["lr"]))
            device.average_gradients(networks.values())
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, networks["gen"], done.step)
            done.step += 1

            # Log
            if done.step % LOG_EVERY == 0 and not log.means(rate):
                raise diverged(files, done.step)
            if done.step * recipe.accumulate % GRID_EVERY < recipe.accumulate:
                log.samples(stage, ema, samples or batch)
            log.bar.update()
            if device.any_process(time.monotonic() - saved > CHECKPOINT_SECONDS):
                save()
                saved = time.monotonic()


# Recipe ---------------------------------------------------------------------------------------


def choose_recipe(recipe: Recipe, options: Namespace) -> Recipe:
    """Returns the recipe with what the command line gives in place of its own values."""
    given = {
        "steps": options.steps,
        "crops": options.crop and (options.crop, options.crop),
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "jpeg": options.jpeg,
    }
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})


def describe(
    recipe: Recipe,
    options: Namespace,
    device: Device,
    ids: list[str],
    held_out: list[str],
    tiles: int,
) -> dict:
    """Returns the settings that a resumed training must share with the interrupted one."""
    values = asdict(recipe)
    values["schedule"] = recipe.schedule.__name__
    values["crops per step"] = values.pop("batch_size") * recipe.accumulate * device.world
    values = {key: list(each) if isinstance(each, tuple) else each for key, each in values.items()}
    return values | {
        "precision": str(device.dtype),
        "seed": options.seed,
        "held out": held_out,
        "training images": ids,
        "tiles": tiles,
    }


def digests(paths: list[Path]) -> dict[str, str]:
    """Returns the digests of weight files by name, short enough for a message."""
    return {path.name: digest(path)[:12] for path in paths}


# Files ----------------------------------------------------------------------------------------


class Files:
    """The files of a training, named after its stage."""

    def __init__(self, ckpts: Path, name: str) -> None:
        self.ckpts, self.name = ckpts, name
        self.gen = ckpts / f"{name}_gen.pth"
        self.best = ckpts / f"{name}_gen_best.pth"
        self.state = ckpts / f"{name}.state.pth"

    def begin(
        self, resume: bool, settings: dict, accept_changes: bool, following: tuple[str, ...]
    ) -> dict | None:
        """Returns the state to resume from; without one, sets earlier files aside.

        Args:
            settings: of `describe`.
            accept_changes: resume even if the state's settings are others.
            following: stages whose files are set aside too if this one has steps to go.

        Raises:
            UserError: the state is of another training than the one asked for.
        """
        if not resume or not self.state.exists():
            if resume:
                say(f"{self.state} is not there: {self.name} starts anew")
            self.set_aside(self.name, *following)
            return None
        state = load_file(self.state)
        if not all(isinstance(state.get(key), dict) for key in ("settings", "progress", "parts")):
            raise WeightError(
                f"{self.state}: written by an earlier version; leave --resume out, and give"
                f" --init {self.gen} to start from its weights"
            )
        changes = differences(state["settings"], settings)
        step, steps = state["progress"]["step"], settings["steps"]
        if step > steps:
            raise UserError(f"{self.state}: is at step {step} already; give --steps above {steps}")
        if new_steps := changes.pop("steps", None):
            say(f"{self.name} resumes at step {step} with {new_steps}")
        if changes and not accept_changes:
            raise UserError(
                f"{self.state}: was trained otherwise: {'; '.join(changes.values())};"
                " give what it was given, or --accept-changes to go on all the same"
            )
        if changes:
            state["progress"] |= {"best": -math.inf, "validated": -1}  # like with like only
        if step < steps:
            self.set_aside(*following)
        return state

    def set_aside(self, *names: str) -> None:
        """Keeps what earlier trainings of stages left, before new ones write there."""
        for files in (Files(self.ckpts, name) for name in names):
            paths = [path for path in (files.state, files.gen, files.best) if path.exists()]
            number = 1
            while any(previous(path, number).exists() for path in paths):
                number += 1
            for path in paths:
                kept = previous(path, number)
                copies = path.parent.glob(f"{path.stem}.*.pth")
                if path != files.gen:
                    path.replace(kept)
                elif any(filecmp.cmp(path, copy, shallow=False) for copy in copies):
                    continue
                else:
                    with replacing(kept) as temporary:  # it serves until the new one is there
                        shutil.copy2(path, temporary)
                say(f"Kept {path.name} of an earlier training as {kept.name}")


def previous(path: Path, number: int) -> Path:
    """Returns where a file of an earlier training is kept."""
    return path.with_name(f"{path.stem}.{number}.previous.pth")


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


def states(parts: dict) -> dict:
    """Returns the state dicts of networks and optimisers."""
    return {key: part.state_dict() for key, part in parts.items()}


def restore(parts: dict, state: dict, path: Path) -> None:
    """Loads networks and optimisers from a state.

    Raises:
        WeightError: it is of other networks, or not finite.
    """
    try:
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightError(f"{path}: does not fit this training ({reason})") from error
    if not is_finite(states(parts)):
        raise WeightError(f"{path}: holds weights that are not finite; leave --resume out")


def is_finite(state: object) -> bool:
    """Returns whether all tensors are finite that a state holds, however nested."""
    if isinstance(state, Tensor):
        return bool(state.isfinite().all())
    values = state.values() if isinstance(state, dict) else state
    return not isinstance(state, dict | list) or all(map(is_finite, values))


def diverged(files: Files, step: int) -> DivergedError:
    """Returns the error for a training that is no longer finite."""
    kept = f"{files.state} and {files.gen} hold" if files.state.exists() else "nothing holds"
    return DivergedError(
        f"{files.name}: not finite at step {step} or the {LOG_EVERY} before; {kept} the last good"
        " weights; start again with a lower --learning-rate"
    )


# Data -----------------------------------------------------------------------------------------


def load_batches(
    dataset: PairedTiles, recipe: Recipe, options: Namespace, device: Device, first: int
) -> Iterator[Batch]:
    """Yields batches without end, from number `first` on, loaded by processes of their own.

    Raises:
        ImageError: a tile cannot be used.
    """
    sampler = CropSampler(
        len(dataset),
        recipe.batch_size,
        recipe.crops,
        options.seed,
        start=first,
        rank=device.rank,
        world=device.world,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options.workers,
        pin_memory=device.torch_device.type == "cuda",
        worker_init_fn=prepare_worker,
    )
    try:
        yield from loader
    except ImageError as error:  # without the worker's traceback
        raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from None


def prepare_worker(_: int) -> None:
    """Limits a data-loading worker to one thread, and has it ignore the group's Ctrl-C."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def held_out_crops(
    held_out: dict[str, tuple[Path, Path]], recipe: Recipe, device: Device
) -> Batch | None:
    """Returns the middles of some held-out images as a batch, on the device, to watch."""
    items = []
    for paths in list(held_out.values())[:SAMPLES]:
        lr, hr = map(read_image, paths)
        if min(lr.shape[:2]) >= SAMPLE_SIDE:
            starts = [(side - SAMPLE_SIDE) // 2 for side in lr.shape[:2]]
            area = tuple(slice(start, start + SAMPLE_SIDE) for start in starts)
            items.append(crop_pair(lr, hr, area, recipe.edges))
    if not items:
        return None
    return {key: device.send(torch.stack([item[key] for item in items])) for key in items[0]}


# Weights --------------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int) -> None:
    """Updates the exponential moving average of a network's weights.

    Early on the average is over fewer steps, so that it soon forgets where training started.
    Batch norm's statistics are averaged too; spectral norm's vectors are copied.
    """
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    all_kept, all_present = list(ema.parameters()), list(network.parameters())
    for averaged, module in zip(ema.modules(), network.modules(), strict=True):
        buffers = zip(averaged.buffers(recurse=False), module.buffers(recurse=False), strict=True)
        for kept, present in buffers:
            if isinstance(module, nn.BatchNorm2d) and kept.is_floating_point():
                all_kept.append(kept)
                all_present.append(present)
            else:
                kept.copy_(present)
    get_ema_multi_avg_fn(decay)(all_kept, all_present, None)  # in a few kernels


def validate(
    stage: Stage,
    ema: nn.Module,
    held_out: dict[str, tuple[Path, Path]],
    device: Device,
    log: "Log",
) -> Metrics | None:
    """Returns and logs the mean metrics of the held-out images, which the processes share out.

    Raises:
        ImageError, NotFiniteError: in all processes, one cannot be read, or not be made.
    """
    mine = list(held_out.values())[device.rank :: device.world]
    rows, references, problems = [], [], []
    enlarger = stage.enlarger(ema)
    for paths in progress(mine, "Validating", unit="image", leave=False):
        try:
            lr, hr = map(read_image, paths)
            rows.append(stage.validate(enlarger, lr, hr))
        except (ImageError, NotFiniteError) as error:
            problems.append(error)
            break
        if log.reference is None:
            references.append(stage.reference(lr, hr))
    if problems := device.gather(problems):
        raise problems[0]
    rows, references = device.gather(rows), device.gather(references)
    if references:
        log.reference = mean_of(references)
    if not rows:
        return None
    metrics = mean_of(rows)
    log.validation(metrics)
    return metrics


# Log ------------------------------------------------------------------------------------------


class Log:
    """Progress bar and TensorBoard curves of a training; both in the first process only.

    A new training gets a folder `{runs}/{name}/{number}` of its own, a resumed one goes on in its.
    The metrics to beat stand in `.../reference`, so that they are a flat line in the same chart.
    """

    def __init__(self, name: str, runs: Path, steps: int, done: Progress, device: Device) -> None:
        self.done, self.device = done, device
        self.reference: Metrics | None = None
        self.writers: list[SummaryWriter] = []
        if device.rank == 0:
            folder = runs / name
            if not done.step:
                numbers = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
                done.run = max(numbers, default=0) + 1
            folders = (folder / str(done.run), folder / str(done.run) / "reference")
            self.writers = [SummaryWriter(str(f), purge_step=done.step + 1) for f in folders]
        self.bar = progress(desc=name, total=steps, initial=done.step, unit="step")
        self.restart()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for writer in self.writers:
            writer.close()

    def restart(self) -> None:
        """Starts the means and the clock anew."""
        self.sums: dict[str, Tensor] = {}
        self.batches, self.crops, self.since = 0, 0, time.monotonic()

    def count(
        self,
        losses: dict[str, dict[str, Tensor]],
        totals: dict[str, Tensor],
        scalars: Metrics,
        crops: int,
    ) -> None:
        """Takes in a batch's losses without waiting for the device."""
        values = {f"loss {key}/{term}": v for key, ts in losses.items() for term, v in ts.items()}
        values |= {f"loss {key}/sum": total for key, total in totals.items()} | scalars
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.batches += 1
        self.crops += crops

    def means(self, rate: float) -> bool:
        """Logs the means since the last call; returns whether all are finite."""
        means = {key: float(value) / self.batches for key, value in self.sums.items()}
        finite = all(map(math.isfinite, means.values()))
        seconds = time.monotonic() - self.since
        speed = self.crops * self.device.world / seconds
        for key, value in {**means, "speed/crops per second": speed, "learning rate": rate}.items():
            self.scalar(key, value)
        sums = {key.split("/")[0]: value for key, value in means.items() if key.endswith("/sum")}
        self.bar.set_postfix_str(" ".join(f"{key} {value:.4f}" for key, value in sums.items()))
        self.restart()
        return not self.device.any_process(not finite)

    def scalar(self, key: str, value: float) -> None:
        """Logs a value at the present step."""
        if self.writers:
            self.writers[0].add_scalar(key, value, self.done.step)

    def text(self, key: str, values: dict) -> None:
        """Logs a table of values."""
        if self.writers:
            rows = [f"| {name} | {value} |" for name, value in values.items()]
            self.writers[0].add_text(key, "\n".join(["| | |", "| --- | --- |", *rows]))

    def validation(self, metrics: Metrics) -> None:
        """Logs validation metrics and, in the same charts, those to beat."""
        for writer, values in zip(self.writers, (metrics, self.reference or {}), strict=False):
            for key, value in values.items():
                writer.add_scalar(f"validation/{key}", value, self.done.step)
        self.restart()

    @torch.no_grad()
    def samples(self, stage: Stage, ema: nn.Module, batch: Batch) -> None:
        """Logs what the averaged generator makes of a batch, side by side."""
        if not self.writers:
            return
        for title, columns in stage.samples(ema, batch).items():
            images = [each[:SAMPLES].float().cpu() for each in columns]
            images = [each.expand(-1, 3, -1, -1) for each in images]
            grid = make_grid(torch.stack(images, dim=1).flatten(0, 1), nrow=len(images))
            self.writers[0].add_image(title, grid.clamp(0, 1), self.done.step)


# Interruption ---------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible(notice: bool) -> Iterator[list[int]]:
    """Turns Ctrl-C and SIGTERM into an entry of the list it gives; a second one acts at once.

    Args:
        notice: tell the user that training will stop, which can take a validation's time.
    """
    received: list[int] = []
    before: dict[int, object] = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        if notice:  # not by `print`, which cannot interrupt itself
            os.write(2, b"\nStopping after this step or validation; once more to stop at once\n")
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def with_remedies() -> Iterator[None]:
    """Turns errors of memory and of data-loading workers into ones that name the remedy."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise DeviceError("Memory is full; give a smaller --batch-size") from error
        if "DataLoader worker (pid" not in str(error):  # an error in one names it otherwise
            raise
        raise DeviceError(
            "A data-loading worker was killed, probably because memory or /dev/shm is full;"
            " give --workers 0"
        ) from error
