"""What the three trainings share: devices and processes, and the loop with its checkpoints."""

import contextlib
import copy
import ctypes
import filecmp
import io
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from dataset import CropSampler
from models import WeightError, load_file, save_file, save_network
from tiles import PictureError

EMA_DECAY = 0.999  # of the average of the generator's weights, a step
LOG_EVERY, GRID_EVERY, CHECKPOINT_EVERY = 20, 100, 500  # steps
WAIT_FOR_OTHERS = timedelta(days=1)  # processes that test have unequal shares
CHECKPOINT_SECONDS = 600  # at the latest, where steps take long
GRID_ROWS = 4


# Devices and processes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely to compute, and which process of how many this is."""

    device: torch.device
    dtype: torch.dtype  # of the networks' arithmetic; weights and losses are float32
    rank: int = 0
    world: int = 1

    def autocast(self) -> torch.autocast:
        """The context to run networks in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, network: nn.Module) -> nn.Module:
        """Moves a network to the device, in the memory layout convolutions are fastest in."""
        return network.to(self.device, memory_format=torch.channels_last)

    def send(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device without waiting for it."""
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def gather(self, items: list) -> list:
        """The items of all processes, in all of them."""
        if self.world == 1:
            return items
        gathered: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def from_first(self, state: dict | None) -> dict:
        """What the first process gives, a dict of tensors and plain values, on the CPU."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sent = [buffer.getvalue()]
        dist.broadcast_object_list(sent, device=torch.device("cpu"))
        return torch.load(io.BytesIO(sent[0]), map_location="cpu", weights_only=True)


@contextlib.contextmanager
def runtime(device: str = "auto", precision: str = "auto") -> Iterator[Runtime]:
    """Finds device and precision and, under torchrun, joins the other processes.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "fp32", "bf16", or "auto": bf16 where the processor computes in it.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: PyTorch finds no GPU here; leave the option out")
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # SSIM subtracts squares
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        place = torch.device("cpu")
        capabilities = torch.cpu.get_capabilities()
        fast_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    bf16 = fast_bf16 if precision == "auto" else precision == "bf16"
    keep_freed_memory()
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=WAIT_FOR_OTHERS)
    try:
        yield Runtime(place, torch.bfloat16 if bf16 else torch.float32, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Has glibc keep large blocks for the next tensor, as PyTorch does on GPUs.

    By default it returns them to the system, whose fresh pages then cost up to a fifth of the
    time. Elsewhere than on Linux nothing happens.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)


def average_gradients(networks: Iterable[nn.Module], world: int) -> None:
    """Gives every process the mean of all processes' gradients."""
    gradients = [p.grad for network in networks for p in network.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; gradients are summed likewise."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, gradient)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which torch's own does on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        exact = x.float()
        moments = torch.stack([exact.mean((0, 2, 3)), (exact * exact).mean((0, 2, 3))])
        mean, square = SumOverProcesses.apply(moments) / dist.get_world_size()
        var = (square - mean**2).clamp(min=0)
        with torch.no_grad():
            count = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (exact * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Replaces all batch norms by ones that see the batches of all processes."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
    return network


@torch.no_grad()
def keep_norms(network: nn.Module, average: nn.Module) -> None:
    """Has all batch norms use the averaged statistics, as in inference, and leave them so."""
    for norm, averaged in zip(network.modules(), average.modules(), strict=True):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
            norm.running_mean.copy_(averaged.running_mean)
            norm.running_var.copy_(averaged.running_var)
            norm.eval()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Takes a network's weights into their exponential moving average.

    Early on the average is over fewer steps, so that it soon forgets where training started.
    """
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for (name, kept), present in zip(average.named_buffers(), network.buffers(), strict=True):
        if "running" in name:  # batch norm's statistics of the last few batches are noisy
            kept.lerp_(present, 1 - decay)
        else:
            kept.copy_(present)


# Recipes --------------------------------------------------------------------------------------


def constant_then_halved(step: int, steps: int) -> float:
    """Learning rate relative to its start: halved every 250 000 steps."""
    return 0.5 ** (step // 250_000)


def cosine(step: int, steps: int) -> float:
    """Learning rate relative to its peak: a short warm-up, then a cosine down to 2 %."""
    warm_up = min(200, steps / 10)
    return min(1, (step + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Recipe:
    """How to train: sizes, optimiser, data."""

    steps: int  # updates of the weights
    crops: tuple[int, int]  # smallest and largest, LR pixels a side
    batch_size: int = 8  # crops at once in each process
    accumulate: int = 1  # batches an update
    learning_rate: float = 1e-4  # of Adam
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    schedule: Callable[[int, int], float] = constant_then_halved
    colour: bool = False  # vary colours, besides flips and quarter turns
    edges: tuple[str, ...] = ("lr",)  # Canny edges the losses need
    norms_until: float = 1  # part of the steps after which the batch norms stay as they are


class Losses(NamedTuple):
    """What one batch came to."""

    minimise: dict[str, Tensor]  # a loss for each network
    scalars: dict[str, Tensor]  # figures to log
    grids: Callable[[], dict[str, list[Tensor]]]  # columns of pictures in [0, 1], to look at


# The loop -------------------------------------------------------------------------------------


class Training:
    """Networks in training: their optimisers, the generator's moving average, their files.

    Args:
        name: of the files: weights `{name}_gen.pth`, `{name}_gen_best.pth`, `{name}_dis.pth`, the
            state to resume from `{name}.state.pth`.
        networks: "gen" and, in adversarial training, "dis".
        ckpts: the folder of the files.
        resume: go on from the state in `ckpts` if there is one.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        networks: dict[str, nn.Module],
        run: Runtime,
        *,
        ckpts: Path,
        resume: bool,
    ) -> None:
        self.name, self.recipe, self.run, self.ckpts = name, recipe, run, ckpts
        for network in networks.values():
            if run.world > 1:
                synchronise_batch_norm(network, run.device)
            run.place(network).train()
        self.networks, self.average = networks, copy.deepcopy(networks["gen"])
        self.average.requires_grad_(False)
        self.parts = {**networks, "average": self.average} | {
            f"{key} optimizer": torch.optim.Adam(each.parameters(), betas=recipe.betas, fused=True)
            for key, each in networks.items()
        }
        self.step, self.judged, self.best = 0, 0, -math.inf
        self.state_path = ckpts / f"{name}.state.pth"
        if run.rank == 0:
            if resume and self.state_path.exists():
                self._take_up(load_file(self.state_path))
            else:
                if resume:
                    print(f"{self.state_path} is not there: {name} starts anew")
                set_aside(ckpts, name)
        if run.world > 1:  # whatever files the others have, they start like the first process
            self._take_up(run.from_first(self._state() if run.rank == 0 else None))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]

    def _state(self) -> dict:
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        return {"step": self.step, "judged": self.judged, "best": self.best, "parts": parts}

    def _take_up(self, state: dict) -> None:
        try:
            self.step, self.judged, self.best = state["step"], state["judged"], state["best"]
            for key, part in self.parts.items():
                part.load_state_dict(state["parts"][key])
        except (KeyError, RuntimeError, ValueError) as error:
            raise WeightError(f"{self.state_path}: does not fit this training: {error}") from error

    def save(self) -> None:
        """Writes the weights as they are used, and the state to resume from."""
        if self.run.rank:
            return
        for key, network in {**self.networks, "gen": self.average}.items():
            save_network(network, self.ckpts / f"{self.name}_{key}.pth")
        save_file(self._state(), self.state_path)

    def fit(
        self,
        dataset: Dataset,
        losses: Callable[[dict[str, Tensor]], Losses],
        validate: Callable[[nn.Module], dict[str, float]],
        best_by: str,
        *,
        logs: Path,
        seed: int,
        workers: int,
    ) -> None:
        """Trains to the recipe's last step, or until interrupted; then saves.

        Args:
            losses: of a batch of `dataset`, on the device.
            validate: figures of the averaged generator on the held-out pictures; may be empty.
            best_by: the figure the generator kept as best has most of.
            logs: folder of TensorBoard's files.
            workers: processes that load data.
        """
        recipe, run = self.recipe, self.run
        batches = self._batches(dataset, seed, workers)
        meter = Meter(self, logs)
        saved = time.monotonic()
        with self._saving_on_bad_pictures(), interruptible() as interrupted, meter:
            while not (stop := any_process(interrupted, run)):
                if self.judged < self.step and self._due():
                    self._judge(validate, best_by, meter)
                if self.step >= recipe.steps:
                    break
                rate = recipe.learning_rate * recipe.schedule(self.step, recipe.steps)
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = rate
                if self.step >= recipe.norms_until * recipe.steps:
                    keep_norms(self.networks["gen"], self.average)

                for _ in range(recipe.accumulate):
                    batch = {key: run.send(value) for key, value in next(batches).items()}
                    result = losses(batch)
                    for loss in result.minimise.values():
                        (loss / recipe.accumulate).backward()
                    meter.count(result, len(batch["lr"]))
                if run.world > 1:
                    average_gradients(self.networks.values(), run.world)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                update_average(self.average, self.networks["gen"], self.step)
                self.step += 1

                meter.show(result, rate)
                if self._due() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        if stop:
            self.save()
            raise KeyboardInterrupt(f"{self.name} saved at step {self.step}; go on with --resume")

    @contextlib.contextmanager
    def _saving_on_bad_pictures(self) -> Iterator[None]:
        try:
            yield
        except PictureError:
            self.save()
            raise

    def _batches(self, dataset: Dataset, seed: int, workers: int) -> Iterator[dict[str, Tensor]]:
        sampler = CropSampler(
            len(dataset),
            self.recipe.batch_size,
            self.recipe.crops,
            seed,
            start=self.step * self.recipe.accumulate,
            rank=self.run.rank,
            world=self.run.world,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=self.run.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
        try:
            yield from loader
        except PictureError as error:  # without the worker's traceback
            raise PictureError(str(error).rpartition("PictureError: ")[2].strip()) from None

    def _due(self) -> bool:
        return self.step % CHECKPOINT_EVERY == 0 or self.step == self.recipe.steps

    def _judge(
        self, validate: Callable[[nn.Module], dict[str, float]], best_by: str, meter: "Meter"
    ) -> None:
        figures = validate(self.average)
        meter.write({f"validation/{key}": value for key, value in figures.items()})
        if figures.get(best_by, -math.inf) > self.best:
            self.best = figures[best_by]
            if self.run.rank == 0:
                save_network(self.average, self.ckpts / f"{self.name}_gen_best.pth")
        self.judged = self.step
        self.save()
        meter.restart()


def set_aside(ckpts: Path, name: str) -> None:
    """Keeps what an earlier training left under a name, before a new one writes there."""
    files = [f"{name}{ending}" for ending in (".state", "_gen", "_dis", "_gen_best")]
    files = [file for file in files if (ckpts / f"{file}.pth").exists()]
    number = 1
    while any((ckpts / f"{file}.{number}.previous.pth").exists() for file in files):
        number += 1
    for file in files:
        path, kept = ckpts / f"{file}.pth", ckpts / f"{file}.{number}.previous.pth"
        if not file.endswith("_gen"):
            path.replace(kept)
        elif any(filecmp.cmp(path, each, False) for each in ckpts.glob(f"{file}.*.previous.pth")):
            continue
        else:
            shutil.copy2(path, kept)  # it serves until the new one is there
        print(f"Kept {path.name} of an earlier training as {kept.name}")


def _leave_signals_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # torchrun and schedulers signal whole process groups
        os.setpgrp()


class Meter:
    """Progress bar and TensorBoard log of a training; both in the first process only."""

    def __init__(self, training: Training, logs: Path) -> None:
        self.training, self.logs = training, logs
        self.sums: dict[str, Tensor] = {}

    def __enter__(self) -> "Meter":
        training, first = self.training, self.training.run.rank == 0
        self.writer = None
        if first:
            folder = self.logs / training.name
            self.writer = SummaryWriter(str(folder), purge_step=training.step + 1)
        self.bar = tqdm(
            desc=training.name,
            total=training.recipe.steps,
            initial=training.step,
            unit="step",
            disable=not first,
        )
        self.restart()
        return self

    def restart(self) -> None:
        """Starts the means and the clock anew."""
        self.sums, self.batches, self.crops = {}, 0, 0
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()

    def count(self, result: Losses, crops: int) -> None:
        """Takes in a batch's figures without waiting for the device."""
        for key, value in result.scalars.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.batches += 1
        self.crops += crops

    def show(self, result: Losses, rate: float) -> None:
        """Updates the bar and, every so many steps, the log."""
        step = self.training.step
        self.bar.update()
        if step % LOG_EVERY == 0:
            means = {key: float(value) / self.batches for key, value in self.sums.items()}
            seconds = time.monotonic() - self.since
            speed = self.crops * self.training.run.world / seconds
            self.write({**means, "learning rate": rate, "crops per second": speed})
            self.bar.set_postfix_str(" ".join(f"{k} {v:.4f}" for k, v in means.items()))
            self.restart()
        if self.writer and step % GRID_EVERY == 0:
            for key, columns in result.grids().items():
                rows = torch.stack([each[:GRID_ROWS].float().cpu() for each in columns], dim=1)
                grid = make_grid(rows.flatten(0, 1), nrow=len(columns))
                self.writer.add_image(key, grid.clamp(0, 1), step)

    def write(self, figures: dict[str, float]) -> None:
        """Logs figures at the present step."""
        if self.writer:
            for key, value in figures.items():
                self.writer.add_scalar(key, value, self.training.step)


# Interruption ---------------------------------------------------------------------------------


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Turns Ctrl-C and SIGTERM into an entry of the list it gives; a second one acts as ever."""
    received: list[int] = []
    before: dict[int, object] = {}

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(received: list[int], run: Runtime) -> bool:
    """Whether any of the processes was interrupted, the same answer in all of them."""
    if run.world == 1:
        return bool(received)
    flag = torch.tensor(len(received))  # on the CPU, so that the GPU need not be waited for
    dist.all_reduce(flag)
    return bool(flag)
