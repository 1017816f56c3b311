"""Images, networks and processes small enough to test with."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image

import console
import join_slice_images
import main
import slice_images_w_overlapping
from device import Device
from models import EdgeGenerator, Generator, SRResNet
from tiles import HR, LR, SCALE, TEST, TRAINING
from weights import save_network

# Whatever the processor: TEST_BF16=0 and TEST_BF16=1 have "auto" mean float32 and bfloat16. CI runs
# all tests with the one, and tests/test_training.py and tests/test_device.py with the other too.
if bf16 := os.environ.get("TEST_BF16"):
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": bf16 == "1"}

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = Device(torch.device("cpu"))
SIZE = 96  # LR pixels a side

torch.set_num_threads(1)  # tiny networks would only wait for each other's threads


def photograph(number: int, side: int = SCALE * SIZE) -> np.ndarray:
    """A square out of one of scikit-image's photographs, `(side, side, 3)` uint8."""
    source = [skimage.data.astronaut, skimage.data.coffee, skimage.data.rocket][number % 3]()
    top = (number * 7) % (source.shape[0] - side + 1)
    return np.ascontiguousarray(source[top : top + side, :side])


def shrunk(hr: np.ndarray) -> np.ndarray:
    """A quarter of the size, by Pillow's bicubic."""
    size = (hr.shape[1] // SCALE, hr.shape[0] // SCALE)
    return np.array(Image.fromarray(hr).resize(size, Image.Resampling.BICUBIC))


def save(folder: Path, name: str, image: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def sliced(tmp_path_factory) -> Path:
    """A root with four training pairs and one test image with its ground truth, cut into 2 x 2."""
    root = tmp_path_factory.mktemp("root")
    for number in range(4):
        hr = photograph(number)
        save(root / TRAINING / HR, f"image_2400px_{number:04d}.png", hr)
        save(root / TRAINING / LR, f"image_600px_{number:04d}.png", shrunk(hr))
    save(root / TEST / HR, "image_2400px_1490.png", photograph(5))
    save(root / TEST / LR, "image_600px_1490.png", shrunk(photograph(5)))
    slice_all(root, "--tiles", 2)
    return root


@pytest.fixture(scope="session")
def vgg(tmp_path_factory) -> Path:
    """Weights of VGG19's first convolutions, random ones, in a file."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])[:12]
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def ckpts(tmp_path_factory) -> Path:
    """A folder with untrained tiny networks, one for every stage to start from."""
    folder = tmp_path_factory.mktemp("ckpts")
    torch.manual_seed(0)
    save_network(EdgeGenerator(4, 1), folder / "EdgeModel_gen.pth")
    for name in ("SRResNet", "SRGAN"):
        save_network(SRResNet(8, 4), folder / f"{name}_gen.pth")
    for name in ("EdgeStageModel", "PreModel", "SRModel"):
        save_network(Generator(8, 4), folder / f"{name}_gen.pth")
    return folder


def slice_all(root: Path, *options: object) -> None:
    """Slices the images of a root, one after the other."""
    slice_images_w_overlapping.main(["--root", str(root), "--threads", "1", *map(str, options)])


def join_all(root: Path, *options: object) -> None:
    """Joins the images of a root, one after the other."""
    join_slice_images.main(["--root", str(root), "--threads", "1", *map(str, options)])


def start(*arguments: object, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Starts main.py in one or several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(REPOSITORY / "main.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: object, processes: int = 1, **environment: str) -> str:
    """Runs main.py to its end and returns what it printed."""
    process = start(*arguments, processes=processes, **environment)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


# Processes that need not import PyTorch anew: they are forks of one that has.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["torch.utils.tensorboard", "torchvision", "skimage.feature", "pytest"]
)


class Launched:
    """Processes that run a function, as torchrun would run it if there are several."""

    def __init__(self, log: Path, function: Callable, *arguments: object, processes: int = 1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        several |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        self.log, self.processes = log, []
        log.write_text("")
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": 1}
            if processes > 1:
                environment |= several | {"RANK": rank, "LOCAL_RANK": rank}
            given = (environment, log, function, arguments)
            process: BaseProcess = forks.Process(target=launched, args=given)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> tuple[list[int], str]:
        """Waits for all to end and returns their exit statuses and what they printed."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes], self.log.read_text()


def launched(environment: dict, log: Path, function: Callable, arguments: tuple) -> None:
    """What each process of `Launched` does."""
    os.environ.update({key: str(value) for key, value in environment.items()})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a background job's: ignored
    function(*arguments)


def command(*arguments: object) -> None:
    """Runs a command line of main.py in this process; `{rank}` in it stands for the process's."""
    rank = os.environ.get("RANK", "0")
    with console.plain_errors():
        main.run([str(each).replace("{rank}", rank) for each in arguments])


def status_of(function: Callable, *arguments: object) -> int:
    """Calls what may end the script; returns its exit status."""
    try:
        function(*arguments)
    except SystemExit as ended:
        return ended.code
    return 0


def failing(capsys, function: Callable, *arguments: object) -> str:
    """Calls what must exit with 1, without a traceback; returns what it printed on stderr."""
    capsys.readouterr()
    status, printed = status_of(function, *arguments), capsys.readouterr().err
    assert status == 1 and "Traceback" not in printed, printed
    return printed


def skipped(printed: str) -> list[str]:
    """Returns the lines about images that were skipped."""
    return [line for line in printed.splitlines() if line.startswith("Skipped ")]
