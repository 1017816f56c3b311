"""What the weights in ckpts/ must be good for."""

import numpy as np
import pytest
import torch
from conftest import CPU, REPOSITORY, photograph, shrunk

import inference
from inference import enlarge, for_inference
from losses import judge_picture
from models import load_network
from training import Runtime


@pytest.fixture(scope="module")
def networks():
    return [
        load_network(REPOSITORY / "ckpts" / f"{name}_gen.pth") for name in ("SRModel", "EdgeModel")
    ]


@pytest.fixture(scope="module")
def enlarged(networks):
    """A photograph, and what the networks make of its quarter."""
    hr = photograph(0, 320)
    return hr, enlarge(shrunk(hr), *(for_inference(each, CPU) for each in networks), CPU)


def psnr(a, b):
    return 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


def test_they_beat_bicubic(enlarged):
    hr, sr = enlarged
    figures = judge_picture(shrunk(hr), hr, sr)
    assert figures["PSNR"] > figures["PSNR bicubic"]
    assert figures["SSIM"] > figures["SSIM bicubic"]
    assert figures["L1"] < figures["L1 bicubic"]


def test_no_colour_is_shifted(enlarged):
    hr, sr = enlarged
    assert np.abs(sr.mean((0, 1)) - hr.mean((0, 1))).max() < 1


def test_speed_costs_no_quality(networks, enlarged):
    hr, sr = enlarged
    plain = enlarge(shrunk(hr), *networks, CPU)
    assert psnr(sr, plain) > 60
    bf16 = Runtime(torch.device("cpu"), torch.bfloat16)
    sr = enlarge(shrunk(hr), *(for_inference(each, bf16) for each in networks), bf16)
    assert psnr(sr, plain) > 45


def test_windows_leave_no_seams(networks, enlarged, monkeypatch):
    for name in ("EDGE_WINDOW", "TRUNK_WINDOW", "RENDER_WINDOW"):
        monkeypatch.setattr(inference, name, 40)
    hr, whole = enlarged
    sr = enlarge(shrunk(hr), *(for_inference(each, CPU) for each in networks), CPU)
    windowed, seamless = (
        [np.abs(np.diff(each.astype(float), axis=axis)).mean((1 - axis, 2))[159] for axis in (0, 1)]
        for each in (sr, whole)
    )  # what changes from row 159 to 160, between which the windows meet, and so for columns
    assert np.mean(windowed) < 1.03 * np.mean(seamless)
