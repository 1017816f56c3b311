"""Pictures, networks and processes small enough to test with."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image

import slice_images_w_overlapping
from models import EdgeGenerator, Generator, save_network
from tiles import HR, LR, SCALE, TEST, TRAINING
from training import Runtime

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = Runtime(torch.device("cpu"), torch.float32)
SIZE = 96  # LR pixels a side


def photograph(number: int, side: int = SCALE * SIZE) -> np.ndarray:
    """A square out of one of scikit-image's photographs, `(side, side, 3)` uint8."""
    source = [skimage.data.astronaut, skimage.data.coffee, skimage.data.rocket][number % 3]()
    top = (number * 7) % (source.shape[0] - side + 1)
    return np.ascontiguousarray(source[top : top + side, :side])


def shrunk(hr: np.ndarray) -> np.ndarray:
    """A quarter of the size, by Pillow's bicubic."""
    size = (hr.shape[1] // SCALE, hr.shape[0] // SCALE)
    return np.array(Image.fromarray(hr).resize(size, Image.Resampling.BICUBIC))


def save(folder: Path, name: str, picture: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def sliced(tmp_path_factory) -> Path:
    """A root with four training pairs and one test picture with its truth, cut into 2 x 2."""
    root = tmp_path_factory.mktemp("root")
    for number in range(4):
        hr = photograph(number)
        save(root / TRAINING / HR, f"image_2400px_{number:04d}.png", hr)
        save(root / TRAINING / LR, f"image_600px_{number:04d}.png", shrunk(hr))
    save(root / TEST / HR, "image_2400px_1490.png", photograph(5))
    save(root / TEST / LR, "image_600px_1490.png", shrunk(photograph(5)))
    assert slice_images_w_overlapping.main(["--root", str(root), "--tiles", "2"]) == 0
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
    """A folder with untrained tiny networks."""
    folder = tmp_path_factory.mktemp("ckpts")
    torch.manual_seed(0)
    save_network(EdgeGenerator(4, 1), folder / "EdgeModel_gen.pth")
    save_network(Generator(8, 4), folder / "SRModel_gen.pth")
    return folder


def start(*arguments: object, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Starts tests/tiny.py, which is main.py with tiny networks, in one or several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(REPOSITORY / "tests" / "tiny.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: object, processes: int = 1, **environment: str) -> str:
    """Runs tests/tiny.py to its end and returns what it printed."""
    process = start(*arguments, processes=processes, **environment)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed
