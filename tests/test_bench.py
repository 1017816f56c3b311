from functools import partial

import pytest
import torch
from conftest import CPU

import bench
from models import EdgeGenerator, FewChannelConv, Generator, PReLU, SRResNet


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny networks and images."""
    monkeypatch.setattr(bench, "SIDE", 48)
    monkeypatch.setattr(bench, "IMAGES", 1)
    monkeypatch.setattr(bench, "CROP", 16)
    monkeypatch.setattr(bench, "BATCH", 1)
    monkeypatch.setattr(bench, "matrix_product", lambda _: 1e9)


@pytest.mark.parametrize("stage", bench.STAGES)
@pytest.mark.parametrize("plain", [True, False])
def test_every_stage_is_measured(monkeypatch, stage, plain):
    tiny = {"Generator": partial(Generator, 8, 4), "EdgeGenerator": partial(EdgeGenerator, 4, 1)}
    for name, network in (tiny | {"SRResNet": partial(SRResNet, 8, 4)}).items():
        monkeypatch.setattr(bench, name, network)
    found = bench.STAGES[stage](CPU, plain)
    assert found["seconds"] > 0 and found["amount"] > 0 and found["memory"] > 0
    assert (found["flops"] > 0) is (found["peak"] > 0) is (stage not in ("slicing", "joining"))


def test_the_plain_layers_are_where_the_others_were():
    plain = bench.make_plain(Generator(8, 4).to("meta"))
    assert {parameter.device.type for parameter in plain.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (EdgeGenerator(4, 1), [(2, 3, 16, 16), (2, 1, 16, 16)]),
        (Generator(8, 4), [(2, 3, 16, 16), (2, 1, 64, 64)]),
    ],
    ids=["edges", "hr"],
)
def test_the_plain_layers_compute_the_same(network, inputs):
    images = [torch.rand(shape) for shape in inputs]
    plain = bench.make_plain(type(network)(**network.arguments))
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain.eval()(*images), network.eval()(*images), atol=1e-5)
    assert not any(isinstance(each, FewChannelConv | PReLU) for each in plain.modules())
