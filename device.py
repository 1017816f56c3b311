"""Where the networks run: device, precision, processes."""

import atexit
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import console
from console import NotFiniteError, UserError

WAIT_FOR_OTHERS = timedelta(days=1)  # when testing, processes have unequal shares
LEAVING_SECONDS = 60  # for the process group to shut down
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CGROUPS = [(Path("/sys/fs/cgroup"), "memory.max", "memory.current")]
CGROUPS += [(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")]
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is PyTorch's for full GPU or CPU memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class Device:
    """Where and how precisely to compute, and which process of how many this is."""

    torch_device: torch.device
    dtype: torch.dtype = torch.float32  # of the networks' arithmetic; weights and losses: float32
    rank: int = 0
    world: int = 1
    layout: torch.memory_format = torch.channels_last  # of images and of convolutions' weights

    def describe(self) -> str:
        """Returns a description such as "CPU, bfloat16, 2 threads"."""
        kind = self.torch_device.type
        name = torch.cuda.get_device_name(self.torch_device) if kind == "cuda" else kind.upper()
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if kind == "cpu" else ""
        processes = f", {self.world} processes" if self.world > 1 else ""
        return f"{name}, {str(self.dtype).removeprefix('torch.')}{threads}{processes}"

    def info(self, text: str) -> None:
        """Prints a line, in the first process only."""
        if self.rank == 0:
            console.info(text)

    def autocast(self) -> torch.autocast:
        """Returns the context to run networks in."""
        kind, enabled = self.torch_device.type, self.dtype != torch.float32
        return torch.autocast(kind, self.dtype, enabled=enabled)

    def place(self, network: nn.Module) -> nn.Module:
        """Moves a network to the device, in the memory layout with the fastest convolutions."""
        return network.to(self.torch_device, memory_format=self.layout)

    def send(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the device; uint8 becomes float32 in [0, 1]."""
        asynchronous = self.torch_device.type == "cuda"  # MPS would read memory freed meanwhile
        tensor = tensor.to(self.torch_device, non_blocking=asynchronous)
        if tensor.dtype == torch.uint8:
            tensor = tensor / 255
        return tensor.contiguous(memory_format=self.layout) if tensor.ndim == 4 else tensor

    def gather(self, items: list) -> list:
        """Returns the items of all processes, in all of them."""
        if self.world == 1:
            return items
        gathered: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def from_first(self, function: Callable[..., T], *arguments: object) -> T:
        """Calls a function in the first process and returns its result in all.

        Raises:
            Exception: the function's; the other processes exit silently.
        """
        if self.world == 1:
            return function(*arguments)
        answer, error = [None, False], None
        if self.rank == 0:
            try:
                answer = [function(*arguments), False]
            except Exception as raised:
                answer, error = [None, True], raised
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if answer[1]:
            raise error or SystemExit(1)
        return answer[0]

    def any_process(self, flag: bool) -> bool:
        """Returns, in all processes alike, whether the flag is set in any of them."""
        if self.world == 1:
            return flag
        total = torch.tensor(int(flag))  # on the CPU, to avoid waiting for the GPU
        dist.all_reduce(total)
        return bool(total)

    def average_gradients(self, networks: Iterable[nn.Module]) -> None:
        """Gives every process the mean of all processes' gradients."""
        if self.world == 1:
            return
        parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def open_device(name: str = "auto", precision: str = "auto", training: bool = False) -> Device:
    """Chooses device and precision and, under torchrun, joins the other processes.

    Args:
        name: "auto", "cpu", "cuda" or "mps".
        precision: "fp32", "bf16", "fp16", or "auto": see `choose_precision`.
        training: whether gradients are needed, for which float16 is too coarse.

    Raises:
        UserError: the device is not available.
    """
    several = all(name in os.environ for name in TORCHRUN)  # only some of them: leftovers
    rank = int(os.environ["RANK"]) if several else 0
    world = int(os.environ["WORLD_SIZE"]) if several else 1
    kind = choose_kind(name)
    torch_device = torch.device(kind)
    if kind == "cuda":
        torch_device = torch.device(kind, torch.cuda.current_device())
        torch.backends.cudnn.allow_tf32 = False  # SSIM subtracts squares
    dtype = choose_precision(kind, precision, training)
    slow_backwards = kind == "cpu" and dtype == torch.float32  # in channels-last
    layout = torch.contiguous_format if slow_backwards and training else torch.channels_last
    keep_freed_memory()
    if not training:  # oneDNN compiles a kernel per image shape, and caches up to 1024 of them
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if world > 1:
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's default
            torch.set_num_threads(console.processor_share())
        if not dist.is_initialized():  # by an earlier command
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=WAIT_FOR_OTHERS)
            atexit.register(leave)
    return Device(torch_device, dtype, rank, world, layout)


def leave() -> None:
    """Leaves the process group, within `LEAVING_SECONDS`.

    NCCL waits for the others on this machine to leave. A process that fails would wait for ones
    that are waiting for it; once it is killed, torchrun ends them.
    """
    if hasattr(signal, "alarm"):  # not on Windows, which has no NCCL either
        signal.alarm(LEAVING_SECONDS)
    dist.destroy_process_group()


def choose_kind(name: str) -> str:
    """Returns "cuda", "mps" or "cpu": the one asked for or, for "auto", the best that works here.

    Raises:
        UserError: the one asked for is not available.
    """
    obstacle = cuda_obstacle() if name in ("auto", "cuda") else "not asked for"
    mps = name != "cpu" and torch.backends.mps.is_available()
    if not obstacle:
        return "cuda"
    if name == "cuda":
        raise UserError(f"--device cuda: {obstacle}; omit the option to use the CPU")
    if name == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU; omit the option")
    if name == "auto" and torch.cuda.is_available():
        warn_once(f"{obstacle}; using the CPU")
    return "mps" if mps else "cpu"


def cuda_obstacle() -> str | None:
    """Returns why CUDA cannot be used here, or None if this process's GPU works."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    # With a GPU for only some of them, the processes would wait for each other on both devices.
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        return "there are fewer GPUs than processes"
    try:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # PyTorch was built for other GPUs, or the driver is broken
        return str(error).partition("\n")[0]
    return None


def warn_once(text: str) -> None:
    """Prints a warning, in the first process only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        console.warn(text)


def choose_precision(kind: str, precision: str = "auto", training: bool = False) -> torch.dtype:
    """Returns the networks' precision.

    "auto" is bfloat16 where the hardware supports it; else float16 for testing on a CUDA GPU, and
    float32 everywhere else. Training in float16 falls back to float32, with a warning.
    """
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
        has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    automatic = torch.bfloat16 if has_bf16 else torch.float16 if kind == "cuda" else torch.float32
    dtype = NAMES.get(precision, automatic)
    if dtype == torch.float16 and training:
        warn_once("Training in float32: float16 is too coarse for gradients")
        return torch.float32
    return dtype


def free_ram() -> int:
    """Returns the bytes of free RAM that this process may use; 0 outside Linux."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
        for folder, limit, used in CGROUPS:  # a container's
            with contextlib.suppress(OSError, ValueError):
                most, taken = (int((folder / each).read_text()) for each in (limit, used))
                free = min(free, most - taken)
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next tensor, as PyTorch does on GPUs.

    By default they go back to the system, and fresh pages cost time. No effect outside Linux.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)


def release_freed_memory() -> None:
    """Gives memory kept by `keep_freed_memory` back: images of many sizes would fragment it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# Tensors and arrays ---------------------------------------------------------------------------


def to_tensor(image: np.ndarray) -> Tensor:
    """Returns an `(H, W, C)` or `(H, W)` array as a (1, C, H, W) tensor: same values and dtype."""
    tensor = torch.from_numpy(np.ascontiguousarray(image))
    return (tensor[..., None] if tensor.ndim == 2 else tensor).permute(2, 0, 1)[None]


def to_image(tensor: Tensor) -> np.ndarray:
    """Returns a (1, C, H, W) tensor in [0, 1] as an `(H, W, C)` uint8 array, rounded.

    Raises:
        NotFiniteError: a value is not a number.
    """
    if tensor.isnan().any():
        raise NotFiniteError("The network's output is NaN; use --precision fp32 or other weights")
    return (tensor[0].permute(1, 2, 0).float() * 255).round().byte().cpu().numpy()


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
