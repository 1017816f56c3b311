import shutil
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CPU, photograph

from console import UserError
from device import Device, to_tensor
from images import canny
from inference import Enlarger, Windows, for_inference
from models import EdgeGenerator, Generator, SRResNet
from tiles import full_area, grow, shape_of, windows
from weights import save_network


def trained(network):
    """The network with weights and statistics like after some training."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith(("bn1.weight", "bn2.weight", "running_var", "bn4.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.uniform_(-0.2, 0.2)
    return network.eval()


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (EdgeGenerator(4, 2), [(1, 3, 12, 12), (1, 1, 12, 12)]),
        (SRResNet(8, 3), [(1, 3, 12, 12)]),
        (Generator(8, 4), [(1, 3, 12, 12), (1, 1, 48, 48)]),
    ],
    ids=["edges", "srresnet", "generator"],
)
def test_folded_network_is_the_network(network, inputs):
    network = trained(network)
    images = [torch.rand(shape) for shape in inputs]
    folded = for_inference(network, CPU)
    with torch.no_grad():
        assert torch.allclose(folded(*images), network(*images), atol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert not any("weight_orig" in key for key in folded.state_dict())


def test_loaded_networks_are_known_by_content_share_and_precision(ckpts, tmp_path):
    def known(shares, folder=ckpts, device=CPU):
        files = {folder / f"{name}_gen.pth": share for name, share in shares.items()}
        return Enlarger.load(files, folder / "EdgeModel_gen.pth", device).digest

    copy = tmp_path / "copy"
    shutil.copytree(ckpts, copy, copy_function=shutil.copyfile)
    first = known({"SRModel": 1.0})
    assert known({"SRModel": 1.0}, copy) == first
    save_network(EdgeGenerator(4, 1), copy / "EdgeModel_gen.pth")
    bf16 = Device(torch.device("cpu"), torch.bfloat16)
    others = {
        known({"SRModel": 1.0}, copy),
        known({"SRModel": 1.0}, device=bf16),
        known({"PreModel": 1.0}),
        known({"SRResNet": 1.0}),
        known({"SRResNet": 0.25, "SRGAN": 0.75}),
        known({"SRResNet": 0.75, "SRGAN": 0.25}),
        known({}),
    }
    assert len({first, *others}) == 8 and not any(" " in each for each in others)
    assert known({"SRResNet": 1.0}, copy) == known({"SRResNet": 1.0})  # which takes no edges
    with pytest.raises(UserError, match=r"none.*SRModel_gen\.pth"):
        known({"SRModel": 1.0}, tmp_path / "none")


@pytest.mark.parametrize("size", [5, 23, 120])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (97, 101)])
def test_windows_cover_an_area_once_and_have_one_shape(shape, size):
    for halo, area in product((0, 4, 12), (full_area(shape), (slice(0, 1), slice(0, shape[1])))):
        covered, shapes = np.zeros(shape, int), set()
        for core, seen in windows(area, size, halo, shape):
            covered[core] += 1
            shapes.add(shape_of(seen))
            for wanted, side in zip(grow(core, halo, shape), seen, strict=True):
                assert side.start <= wanted.start and side.stop >= wanted.stop
        assert (covered[area] == 1).all() and covered.sum() == np.prod(shape_of(area))
        assert len(shapes) == 1


def test_windows_meet_without_seams(monkeypatch):
    monkeypatch.setattr("inference.TRUNK_HALO", 20)
    monkeypatch.setattr("inference.RENDER_HALO", 5)
    lr = photograph(0, 70)[:53]
    enlarger = Enlarger(trained(Generator(8, 4)), None, CPU)
    enlarger.windows = Windows(17, 40, 17)
    edges = np.random.default_rng(0).integers(0, 256, (212, 280), np.uint8)
    hr = enlarger(lr, edges)
    with torch.no_grad():
        whole_image = enlarger.generator(to_tensor(lr) / 255, to_tensor(edges) / 255)
    expected = (whole_image[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(hr - expected).max() <= 1


def test_edges_of_a_small_image_are_the_networks_own():
    lr = photograph(1, 40)[:36]
    network = EdgeGenerator(4, 1)
    with torch.no_grad():
        expected = network.eval()(to_tensor(lr) / 255, to_tensor(canny(lr)) / 255)[0, 0]
    edges = Enlarger(None, network, CPU).predict_edges(lr)
    assert np.abs(edges - 255 * expected.numpy()).max() <= 0.51


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 61), (40, 33)])
def test_images_of_any_shape_become_four_times_as_large(shape):
    lr = photograph(0, 64)[: shape[0], : shape[1]]
    parts = []
    for generator in (Generator(8, 4), SRResNet(8, 4)):
        enlarger = Enlarger(generator, EdgeGenerator(4, 1), CPU)
        enlarger.windows = Windows(17, 40, 17)
        hr = enlarger(lr, on_progress=parts.append)
        assert hr.shape == (4 * shape[0], 4 * shape[1], 3) and hr.dtype == np.uint8
    assert sum(parts) == pytest.approx(2)


def test_grey_stays_grey():
    gray = np.repeat(photograph(0, 30)[..., :1], 3, axis=2)
    enlarger = Enlarger(trained(Generator(8, 4)), EdgeGenerator(4, 1), CPU)
    hr = enlarger(gray)
    assert (hr == hr[..., :1]).all() and hr.std() > 0
    colored = enlarger(photograph(0, 30))
    assert not (colored == colored[..., :1]).all()


def test_bfloat16_changes_little():
    lr = photograph(0, 32)
    networks = trained(Generator(8, 4)), EdgeGenerator(4, 1)
    bf16 = Device(torch.device("cpu"), torch.bfloat16)
    images = [Enlarger(*networks, device)(lr).astype(float) for device in (CPU, bf16)]
    assert np.abs(images[0] - images[1]).mean() < 2


def test_windows_take_half_of_a_gpus_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * 2**30, 8 * 2**30))
    half, full = (
        Windows.of(Device(torch.device("cuda"), dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    assert 280 < half.edges < 340 and half.edges == half.trunk == half.render
    assert full.edges == pytest.approx(half.edges / 2**0.5, abs=1)
    assert Windows.of(CPU) == Windows()


def test_kernels_are_tuned_where_one_shape_comes_again():
    enlarger = Enlarger(Generator(8, 4), EdgeGenerator(4, 1), CPU)
    for sides, tuned in ((Windows(64, 64, 64), False), (Windows(20, 20, 20), True)):
        enlarger.windows = sides
        enlarger(photograph(0, 60))
        assert torch.backends.cudnn.benchmark is tuned


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_windows_shrink_until_memory_suffices(monkeypatch, kind):
    lr = photograph(0, 64)
    enlarger = Enlarger(trained(SRResNet(8, 4)), None, CPU)
    expected, trunk = enlarger(lr), SRResNet.trunk

    def small(self, features):
        if features.shape[-1] > limit:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return trunk(self, features)

    monkeypatch.setattr(SRResNet, "trunk", small)
    enlarger.windows, limit = Windows(128, 128, 128), 60
    assert np.abs(enlarger(lr).astype(int) - expected).max() <= 1
    assert enlarger.windows == Windows(16, 16, 16) or enlarger.windows.trunk < 60
    limit = 0
    with pytest.raises(MemoryError, match="--device cpu"):
        enlarger(lr)
