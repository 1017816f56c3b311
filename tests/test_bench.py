import os
import sys

import pytest
import torch

import bench
import device
import models


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny networks and images."""
    sizes = {"SIDE": 48, "CROP": 16, "BATCH": 1}
    for name, value in (sizes | {"GENERATOR": (8, 4), "EDGE_GENERATOR": (4, 1)}).items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("name", bench.MEASURES)
@pytest.mark.parametrize("plain", [True, False])
def test_everything_is_measured(name, plain):
    assert bench.MEASURES[name](device.Device(torch.device("cpu")), plain) > 0


def test_the_columns_of_the_table_stay_apart(monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *_: (123456.789, 99999999999))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--repeats", "1", "--device", "cpu"])
    bench.main()
    title, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bench.MEASURES) and len({len(line) for line in [title, *lines]}) == 1
    for line in lines:
        assert "1.0x  " in line and " MiB" in line and line.count("1.23e+05 s ") == 2


def test_the_plain_layers_are_where_the_others_were():
    plain = bench.make_plain(models.Generator(8, 4).to("meta"))
    assert {parameter.device.type for parameter in plain.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (models.EdgeGenerator(4, 1), [(2, 3, 16, 16), (2, 1, 16, 16)]),
        (models.Generator(8, 4), [(2, 3, 16, 16), (2, 1, 64, 64)]),
    ],
    ids=["edges", "hr"],
)
def test_the_plain_layers_compute_the_same(network, inputs):
    batch = [torch.rand(shape) for shape in inputs]
    plain = bench.make_plain(type(network)(**network.arguments))
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain.eval()(*batch), network.eval()(*batch), atol=1e-5)
    fast = models.FewChannelConv | models.InstanceNorm | models.PReLU
    assert not any(isinstance(each, fast) for each in plain.modules())


def test_every_measurement_is_a_process_of_its_own():
    assert len({os.getpid(), *(bench.run(os.getpid) for _ in range(2))}) == 3
