"""What the weights in ckpts/ must be good for."""

import numpy as np
import pytest
import torch
from conftest import CPU, REPOSITORY, photograph, shrunk

from device import Device
from inference import Enlarger, Windows
from metrics import against_bicubic
from weights import load_network


@pytest.fixture(scope="module")
def networks():
    return [
        load_network(REPOSITORY / "ckpts" / f"{name}_gen.pth") for name in ("SRModel", "EdgeModel")
    ]


@pytest.fixture(scope="module")
def enlarged(networks):
    """A photograph, and what the networks make of its quarter."""
    hr = photograph(0, 192)
    return hr, Enlarger(*networks, CPU)(shrunk(hr))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9))


def test_they_beat_bicubic(enlarged):
    hr, sr = enlarged
    metrics = against_bicubic(shrunk(hr), hr, sr, CPU)
    assert metrics["PSNR"] > metrics["PSNR bicubic"]
    assert metrics["SSIM"] > metrics["SSIM bicubic"]
    assert metrics["L1"] < metrics["L1 bicubic"]


def test_no_colour_is_shifted(enlarged):
    hr, sr = enlarged
    assert np.abs(sr.mean((0, 1)) - hr.mean((0, 1))).max() < 1


def test_speed_costs_no_quality(networks):
    lr = shrunk(photograph(0, 96))
    enlarger = Enlarger(*networks, CPU)
    sr, edges = enlarger(lr), enlarger.predict_edges(lr)
    enlarger.generator, enlarger.edge_generator = networks  # as trained, their norms not folded
    assert np.abs(enlarger.predict_edges(lr).astype(int) - edges).max() <= 1
    plain = enlarger(lr, edges)
    assert psnr(sr, plain) > 60
    bf16 = Device(torch.device("cpu"), torch.bfloat16)
    assert psnr(Enlarger(*networks, bf16)(lr), plain) > 45


def test_windows_leave_no_seams(networks, enlarged):
    hr, whole = enlarged
    enlarger = Enlarger(*networks, CPU)
    enlarger.windows = Windows(24, 24, 24)
    sr = enlarger(shrunk(hr))
    windowed, seamless = (
        [np.abs(np.diff(each.astype(float), axis=axis)).mean((1 - axis, 2))[95] for axis in (0, 1)]
        for each in (sr, whole)
    )  # what changes from row 95 to 96, between which the windows meet, and so for columns
    assert np.mean(windowed) < 1.03 * np.mean(seamless)
