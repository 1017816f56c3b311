"""The training loop of all stages: data, resume, steps, EMA, log, validation, checkpoints."""

import contextlib
import copy
import math
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torch.utils.tensorboard import SummaryWriter

import checkpoints
import console
import files
import images
import losses
import metrics
import tiles
import weights
from checkpoints import Progress
from console import ImageError, NotFiniteError, UserError
from dataset import PairedTiles, Pairs, draw_batches, split
from device import Device, is_out_of_memory
from metrics import Metrics
from stages import Batch, Losses, Recipe, Stage

EMA_DECAY = 0.999  # per step
LOG_EVERY = 20  # steps
CHECKPOINT_SECONDS = 600  # at most between two saves, if steps are slow
SAMPLE_SIDE, SAMPLES = 48, 4  # side in LR pixels, and number, of the held-out crops to log
NAMED = 5  # how many too-small images the message lists
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
STOPPING = b"\nStopping after this step or validation; interrupt again to stop at once\n"


def fit(stage_class: type[Stage], options: Namespace, device: Device) -> float:
    """Trains a stage to its recipe's last step, or until interrupted; publishes the best weights.

    Writes to its own folder, `{options.runs}/{name}/{number}`: `state.pth`, to resume from; the
    averaged weights, the current ones in `latest.pth` and those that validated best in `best.pth`;
    and curves. See `publish` for when `{options.ckpts}/{name}_gen.pth` is replaced.

    Returns:
        The duration of a step in seconds, by the last steps that were logged; NaN without any.

    Raises:
        UserError: something is missing or damaged, the loss is not finite, or the run to resume
            has different settings.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once everything is saved.
    """
    # The recipe, overridden by the command line, and the data
    given = {key: vars(options)[key] for key in ("steps", "batch_size", "learning_rate", "jpeg")}
    given["crops"] = options.crop and (options.crop, options.crop)
    given = {key: value for key, value in given.items() if value is not None}
    recipe = replace(stage_class.recipe, **given)
    training, held_out = split(options.root, options.held_out)
    dataset = PairedTiles(
        options.root, training, recipe.crops[1], recipe.color, recipe.jpeg, recipe.edges
    )
    crops_per_step = recipe.batch_size * recipe.accumulate * device.world
    if options.epochs:
        recipe = replace(recipe, steps=math.ceil(options.epochs * len(dataset) / crops_per_step))
    for folder in (options.ckpts, options.runs):
        device.from_first(files.check_writable, folder)

    # The networks, identical in all processes, their optimisers, the generator's moving average
    torch.manual_seed(options.seed)
    stage = stage_class(recipe, options, device)
    networks = stage.networks
    ema = copy.deepcopy(networks["gen"]).requires_grad_(False).eval()
    optimizers = {
        key: torch.optim.Adam(stage.parameter_groups(key), betas=recipe.betas, fused=True)
        for key in networks
    }
    parts = {**networks, "ema": ema, **{f"{key} adam": each for key, each in optimizers.items()}}

    # Resume, or start from scratch in a new folder
    settings = run_settings(stage, options, dataset, held_out)
    folder, state, settings = device.from_first(checkpoints.begin, stage, options, settings)
    done = Progress(**state.get("progress", {}))
    if state:
        checkpoints.restore(parts, state, folder / "state.pth")
    save = partial(checkpoints.save, folder, parts, done, settings)

    # Describe the training, and measure what to compare it with
    fewer = " (a quarter of the images at most)" * (len(held_out) < options.held_out)
    device.info(
        f"{stage.name}: {device.describe()}; {len(dataset.names)} images as {len(dataset)} tiles;"
        f" {len(held_out)} held out{fewer}; {recipe.steps} steps of {crops_per_step} crops"
    )
    if dataset.small:
        some = ", ".join(dataset.small[:NAMED]) + ", ..." * (len(dataset.small) > NAMED)
        device.info(f"Ignoring {len(dataset.small)} images smaller than the crops: {some}")
    dataset.keep_in_memory()
    batches = load_batches(dataset, recipe, options, device, done.step * recipe.accumulate)
    there = validate_published(stage, options, held_out)
    reference = measure(stage, held_out, stage.reference)

    # Train
    saved = time.monotonic()
    consistent = True  # False amid the updates of a step
    log = Log(stage, folder, settings, done)
    stopping = interruptible(notice=device.rank == 0)
    with contextlib.closing(batches), stopping as interrupted, log:
        try:
            while True:
                # Save, before anything else can fail; validate
                due = done.step * recipe.accumulate % options.checkpoint_every < recipe.accumulate
                last = done.step >= recipe.steps
                if (due or last) and done.validated < done.step:
                    if done.step:
                        device.from_first(save)
                    now = validate(stage, ema, held_out)
                    log.scalars("validation/", now, reference)
                    log.samples(stage, ema, held_out or training)
                    if done.step and stage.better(now, done.best):  # not the starting weights
                        device.from_first(weights.save_network, ema, folder / "best.pth")
                        done.best, done.best_step = now, done.step
                    done.validated = done.step
                    if done.step:
                        device.from_first(save)
                    saved = time.monotonic()
                if last:
                    break

                # Fetch a step's batches at once, so that Ctrl-C or a bad tile stops between steps
                fetched = list(islice(batches, recipe.accumulate))
                problems = [each for each in fetched if isinstance(each, Exception)]
                if device.any_process(bool(problems or interrupted)):
                    if problems := device.gather(problems):
                        raise problems[0]
                    device.from_first(checkpoints.save_anyway, save, folder, done)
                    break

                # Step
                if done.step >= recipe.live_norms * recipe.steps:
                    for module in networks["gen"].modules():
                        if isinstance(module, nn.BatchNorm2d):
                            module.eval()  # with frozen statistics, as at test time
                one_shape = len(set(recipe.crops)) == 1
                torch.backends.cudnn.benchmark = one_shape  # validation may have changed it
                rate = recipe.learning_rate * recipe.schedule(done.step, recipe)
                for loaded in fetched:
                    batch = {key: device.send(value) for key, value in loaded.items()}
                    all_terms, scalars = stage.loss_terms(batch)
                    for terms in all_terms.values():
                        terms["sum"] = sum(terms.values())
                        (terms["sum"] / recipe.accumulate).backward()
                    log.count(all_terms, scalars)
                device.average_gradients(networks.values())
                consistent = False
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["factor"]
                    optimizer.step()
                    optimizer.zero_grad()
                update_ema(ema, networks["gen"], done.step)
                done.step += 1
                consistent = True

                # Log
                log.bar.update()
                if done.step % LOG_EVERY == 0 or done.step == recipe.steps:
                    log.flush(rate)
                if device.any_process(time.monotonic() - saved > CHECKPOINT_SECONDS):
                    device.from_first(save)
                    saved = time.monotonic()
        except NotFiniteError as error:  # the last saved state is the one to keep
            raise UserError(
                f"{stage.name}: not finite at step {done.step} or in the {LOG_EVERY} before;"
                f" {folder} has the last good state; start again with a lower --learning-rate"
            ) from error
        except (Exception, KeyboardInterrupt) as error:
            if device.rank == 0 and done.step and consistent:
                checkpoints.save_anyway(save, folder, done)
            if is_out_of_memory(error):
                raise MemoryError("Out of memory; use a smaller --batch-size") from error
            raise

        # Publish
        device.from_first(checkpoints.publish, stage, folder, options, done, there, reference)
        if device.any_process(bool(interrupted)):
            raise KeyboardInterrupt
    return crops_per_step / log.speed


# Settings -------------------------------------------------------------------------------------


def run_settings(stage: Stage, options: Namespace, dataset: PairedTiles, held_out: Pairs) -> dict:
    """Returns the settings that a resumed training must share with the interrupted one."""
    recipe, device = stage.recipe, stage.device
    values = asdict(recipe) | {"schedule": recipe.schedule.__name__}
    values["crops per step"] = values.pop("batch_size") * recipe.accumulate * device.world
    values = {key: list(each) if isinstance(each, tuple) else each for key, each in values.items()}
    values["loss weights"] = {k: each for k, each in vars(losses).items() if k.endswith("WEIGHT")}
    return {key.replace("_", " "): value for key, value in values.items()} | {
        "precision": str(device.dtype).removeprefix("torch."),
        "seed": options.seed,
        "held-out images": list(held_out),
        "training images": dataset.names,
        "tiles": len(dataset),
    }


# Data -----------------------------------------------------------------------------------------


def load_batches(
    dataset: PairedTiles, recipe: Recipe, options: Namespace, device: Device, first: int
) -> Iterator[Batch | Exception]:
    """Yields endless batches, from number `first` on, loaded by worker processes.

    Yields an error instead of a batch if a tile cannot be used or the workers fail.
    """
    crops = len(dataset), recipe.batch_size, recipe.crops, options.seed
    requests = draw_batches(*crops, start=first, rank=device.rank, world=device.world)
    try:
        loader = DataLoader(
            dataset,
            batch_sampler=requests,
            num_workers=options.workers,
            collate_fn=collate,
            pin_memory=device.torch_device.type == "cuda",
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork" if options.workers and dataset.in_memory else None,
        )
        yield from loader
    except (RuntimeError, OSError) as error:
        if not options.workers:
            raise
        reason = str(error).strip().splitlines()[-1].partition(". ")[0]
        yield UserError(f"The data-loading processes failed ({reason}); use --workers 0")


def collate(items: list[dict | Exception]) -> Batch | Exception:
    """Returns a batch of items from `PairedTiles`, or the first error among them."""
    errors = [item for item in items if isinstance(item, Exception)]
    return errors[0] if errors else default_collate(items)


def prepare_worker(_: int) -> None:
    """Leaves Ctrl-C and the like, which reach all processes, to the training process.

    Silences multiprocessing's own tracebacks, too: errors in tiles are returned as items.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


# Weights --------------------------------------------------------------------------------------


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, step: int) -> None:
    """Updates the exponential moving average of a network's weights.

    Early on, the average is over fewer steps, so that it soon forgets the initial weights.
    Batch norm's statistics are averaged too; spectral norm's vectors are copied.
    """
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    averages, currents = list(ema.parameters()), list(network.parameters())
    for (name, average), current in zip(ema.named_buffers(), network.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            averages.append(average)
            currents.append(current)
        else:
            average.copy_(current)
    get_ema_multi_avg_fn(decay)(averages, currents, None)  # in a few kernels


# Validation -----------------------------------------------------------------------------------


def validate(stage: Stage, network: nn.Module, held_out: Pairs) -> Metrics:
    """Returns a generator's mean metrics on the held-out images, {} if there are none."""
    enlarger = stage.make_enlarger(network)
    return measure(stage, held_out, partial(stage.validate, enlarger))


def validate_published(stage: Stage, options: Namespace, held_out: Pairs) -> Metrics:
    """Returns the metrics of the published weights, which a training may replace, or {}."""
    path = files.weight_path(options.ckpts, stage.publishes)
    # {} if they are missing, of another network, or give NaN. `stage.load` raises UserError in the
    # first process then, and SystemExit in the others.
    with contextlib.suppress(UserError, SystemExit):
        return validate(stage, stage.load(path, type(stage.generator)), held_out)
    return {}


def measure(
    stage: Stage, pairs: Pairs, function: Callable[[np.ndarray, np.ndarray], Metrics]
) -> Metrics:
    """Returns the mean of a function of LR and HR over images, divided among the processes.

    Raises:
        ImageError, NotFiniteError: in all processes, if an image cannot be read or computed.
    """
    device = stage.device
    mine = list(pairs.values())[device.rank :: device.world]
    rows, problems = [], []
    for paths in console.progress(mine, "Validating", unit="image", leave=False):
        try:
            rows.append(function(*map(images.read_image, paths)))
        except (ImageError, NotFiniteError) as error:
            problems.append(error)
            break
    if problems := device.gather(problems):
        raise problems[0]
    rows = device.gather(rows)
    return metrics.mean_of(rows) if rows else {}


# Log ------------------------------------------------------------------------------------------


class Log(contextlib.AbstractContextManager):
    """Progress bar and TensorBoard curves of a training; both in the first process only.

    The stage's baseline is logged as a separate run, a flat line in the same charts. If curves
    cannot be written, training continues without them.
    """

    def __init__(self, stage: Stage, folder: Path, settings: dict, done: Progress) -> None:
        self.done, self.device = done, stage.device
        self.crops_per_batch = stage.recipe.batch_size * stage.device.world
        self.speed = math.nan  # crops per second
        self.writers: list[SummaryWriter] = []
        self.bar = console.progress(
            desc=stage.name, total=settings["steps"], initial=done.step, unit="step"
        )
        self.restart()
        self.hook, threading.excepthook = threading.excepthook, self.in_thread
        if self.device.rank == 0:
            with self.optional():
                for each in (folder, folder / stage.compared_with):
                    self.writers.append(SummaryWriter(str(each), purge_step=done.step + 1))
                rows = [f"| {key} | {str(value)[:200]} |" for key, value in settings.items()]
                table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
                self.writers[0].add_text("settings", table)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with self.optional():
            for writer in self.writers:
                writer.close()
        threading.excepthook = self.hook

    def in_thread(self, arguments: threading.ExceptHookArgs) -> None:
        """Ignores an OSError in TensorBoard's thread: its writer raises it again."""
        if not isinstance(arguments.exc_value, OSError):
            self.hook(arguments)

    @contextlib.contextmanager
    def optional(self) -> Iterator[None]:
        """Stops logging curves, with a warning, if anything goes wrong with them."""
        try:
            yield
        except Exception as error:  # whatever TensorBoard raises
            self.writers = []
            console.warn(f"Training continues without curves: {console.one_line(error)}")

    def restart(self) -> None:
        """Discards what was counted, and restarts the clock."""
        self.batches: list[dict[str, Tensor]] = []
        self.since = time.monotonic()

    def count(self, all_terms: Losses, scalars: dict[str, Tensor]) -> None:
        """Collects the values to log from a batch, without waiting for the device."""
        for key, terms in all_terms.items():
            scalars = scalars | {f"loss {key}/{term}": value for term, value in terms.items()}
        self.batches.append({key: value.detach() for key, value in scalars.items()})

    def flush(self, rate: float) -> None:
        """Logs the means since the last call; raises NotFiniteError if a loss is not finite."""
        means = metrics.mean_of(self.batches)
        sums = {key.split("/")[0]: value for key, value in means.items() if key.endswith("/sum")}
        if self.device.any_process(not all(map(math.isfinite, sums.values()))):
            raise NotFiniteError("a loss is not finite")
        self.speed = len(self.batches) * self.crops_per_batch / (time.monotonic() - self.since)
        self.scalars("", means | {"speed/crops per second": self.speed, "learning rate": rate})
        self.bar.set_postfix(sums, refresh=False)  # refreshing adds a line to a log file each time

    def scalars(self, title: str, *values: Metrics) -> None:
        """Logs values at the current step and, in the same charts, the baseline's; restarts."""
        with self.optional():
            for writer, each in zip(self.writers, values, strict=False):
                for key, value in each.items():
                    writer.add_scalar(f"{title}{key}", value, self.done.step)
        self.restart()

    def samples(self, stage: Stage, network: nn.Module, pairs: Pairs) -> None:
        """Logs a generator's output on the centers of some images, side by side."""
        if not self.writers:
            return
        enlarger, rows = stage.make_enlarger(network), defaultdict(list)
        for lr_path, hr_path in list(pairs.values())[:SAMPLES]:
            lr = images.read_image(lr_path)
            if min(lr.shape[:2]) < SAMPLE_SIDE:
                continue
            starts = [(side - SAMPLE_SIDE) // 2 for side in lr.shape[:2]]
            area = tuple(slice(start, start + SAMPLE_SIDE) for start in starts)
            hr = images.read_image(hr_path)[tiles.scaled(area)]
            for title, columns in stage.samples(enlarger, lr[area], hr).items():
                rows[title].append(np.hstack(columns))
        with self.optional():
            for title, each in rows.items():
                sheet = np.atleast_3d(np.vstack(each))
                self.writers[0].add_image(title, sheet, self.done.step, dataformats="HWC")


# Interruption ---------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible(notice: bool) -> Iterator[list[int]]:
    """Appends Ctrl-C, SIGTERM and SIGHUP to the list it yields; the same one again interrupts.

    Args:
        notice: tell the user that training will stop, which can take as long as a validation.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if number in received:  # SIGHUP may come twice; its default would stop without saving
            raise KeyboardInterrupt
        received.append(number)
        if notice:  # not by `print`, which cannot interrupt itself
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, STOPPING)

    with contextlib.ExitStack() as stack:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield received
