import numpy as np
import pytest
import torch
from conftest import CPU, photograph

import inference
from dataset import canny, to_tensor
from inference import enlarge, for_inference, predict_edges
from models import Discriminator, EdgeGenerator, Generator, SRResNet
from training import Runtime


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
        (Discriminator(4), [(1, 3, 48, 48)]),
    ],
    ids=["edges", "srresnet", "generator", "discriminator"],
)
def test_folded_network_is_the_network(network, inputs):
    network = trained(network)
    pictures = [torch.rand(shape) for shape in inputs]
    folded = for_inference(network, CPU)
    with torch.no_grad():
        assert torch.allclose(folded(*pictures), network(*pictures), atol=1e-5)
    types = {type(module) for module in folded.modules()}
    assert torch.nn.BatchNorm2d not in types
    assert not any("weight_orig" in key for key in folded.state_dict())


@pytest.fixture
def small_windows(monkeypatch):
    for name in ("EDGE_WINDOW", "TRUNK_WINDOW", "RENDER_WINDOW"):
        monkeypatch.setattr(inference, name, {"TRUNK_WINDOW": 40}.get(name, 17))


def test_windows_meet_without_seams(small_windows, monkeypatch):
    monkeypatch.setattr(inference, "TRUNK_HALO", 20)
    monkeypatch.setattr(inference, "RENDER_HALO", 5)
    lr = photograph(0, 70)[:53]
    generator = for_inference(trained(Generator(8, 4)), CPU)
    edges = np.random.default_rng(0).random((212, 280)).astype(np.float16)
    hr = inference.render(lr, generator, edges, CPU)
    with torch.no_grad():
        whole = generator(to_tensor(lr) / 127.5 - 1, to_tensor(edges[..., None]) * 2 - 1)
    whole = ((whole[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    assert np.abs(hr.astype(int) - whole).max() <= 1


def test_edges_of_a_small_picture_are_the_networks_own():
    lr = photograph(1, 40)[:36]
    network = for_inference(EdgeGenerator(4, 1), CPU)
    with torch.no_grad():
        expected = network(to_tensor(lr) / 255, to_tensor(canny(lr)[..., None]))[0, 0]
    assert np.allclose(predict_edges(lr, network, CPU), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 3), (5, 61), (40, 33)])
def test_pictures_of_any_shape_become_four_times_as_large(small_windows, shape):
    lr = photograph(0, 64)[: shape[0], : shape[1]]
    edges = for_inference(EdgeGenerator(4, 1), CPU)
    done = []
    for generator in (Generator(8, 4), SRResNet(8, 4)):
        hr = enlarge(lr, for_inference(generator, CPU), edges, CPU, done.append)
        assert hr.shape == (4 * shape[0], 4 * shape[1], 3) and hr.dtype == np.uint8
    assert sum(done) == pytest.approx(2)


def test_bfloat16_changes_little():
    run = Runtime(torch.device("cpu"), torch.bfloat16)
    lr = photograph(0, 32)
    generator, edges = trained(Generator(8, 4)), EdgeGenerator(4, 1)
    pictures = [
        enlarge(lr, for_inference(generator, each), for_inference(edges, each), each).astype(float)
        for each in (CPU, run)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 2
