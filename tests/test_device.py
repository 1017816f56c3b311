import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import device
from device import Device, DeviceError, choose_kind, choose_precision, threads_per_process
from losses import (
    PerceptualLoss,
    discriminator_loss,
    edge_cross_entropy,
    feature_matching,
    generator_terms,
    hinge_generator,
)
from models import Discriminator, EdgeDiscriminator, EdgeGenerator, Generator, SRResNet


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a CUDA GPU of a compute capability and a PyTorch of some architectures."""

    def fake(capability, architectures, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)

    return fake


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),  # binaries of the same major version run
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX is compiled again
        ((10, 0), ["sm_80", "sm_90a"], False),
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
    ],
)
def test_cuda_is_used_where_this_pytorch_was_built_for_the_gpu(
    gpu, capsys, capability, architectures, works
):
    gpu(capability, architectures)
    assert choose_kind("auto") == ("cuda" if works else "cpu")
    assert ("Some GPU" in capsys.readouterr().err) is not works
    if not works:
        with pytest.raises(DeviceError, match="not built for Some GPU"):
            choose_kind("cuda")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(DeviceError, match=f"--device {name}"):
            choose_kind(name)
    assert choose_kind("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_kind("auto") == "mps"


def test_precision_is_what_the_processor_computes_in(gpu, monkeypatch, capsys):
    gpu((7, 5), ["sm_75"], bf16=False)
    assert choose_precision("cuda") == torch.float16
    assert choose_precision("cuda", training=True) == torch.float32
    assert "float32" in capsys.readouterr().err
    assert choose_precision("cuda", "bf16") == torch.bfloat16
    gpu((9, 0), ["sm_90"], bf16=True)
    assert choose_precision("cuda", training=True) == torch.bfloat16
    for flag, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=flag: {"avx512_bf16": f})
        assert choose_precision("cpu") == dtype
    assert choose_precision("mps") == torch.float32
    assert capsys.readouterr().err == ""


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(device.os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's doing
    assert threads_per_process() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_process() == 3


def test_bytes_become_numbers_from_0_to_1():
    sent = Device(torch.device("cpu")).send(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert sent.dtype == torch.float32 and sent.tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_and_losses_on_cuda(monkeypatch, dtype):
    """On fake tensors: shapes, types and layouts as on a GPU, without values."""
    # else autocast disables itself where there is no GPU
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    gpu = Device(torch.device("cuda"), dtype)
    last = torch.channels_last
    with FakeTensorMode(), torch.device("cuda"):
        lr, hr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 64, 64)
        lr, hr = (each.contiguous(memory_format=last) for each in (lr, hr))
        lr_edges, hr_edges = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 64, 64)
        edges, patch, trunk = EdgeGenerator(8, 1), EdgeDiscriminator(8), SRResNet(8, 4)
        generator, discriminator = Generator(8, 4), Discriminator(8)
        for module in (m for n in (edges, patch, trunk, generator) for m in n.modules()):
            if isinstance(module, torch.nn.Conv2d) and "weight" in module._parameters:
                weight = module.weight.detach().contiguous(memory_format=last)
                module.weight = torch.nn.Parameter(weight)
        layers = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
        state = {f"{i}.weight": torch.rand(*shape, 3, 3) for i, shape in layers.items()}
        state |= {f"{i}.bias": torch.rand(shape[0]) for i, shape in layers.items()}
        perceptual = PerceptualLoss(state)
        with gpu.autocast():
            found = edges(lr, lr_edges)
            sr, fast = generator(lr, found), trunk(lr)
            features = generator.trunk(lr)
            score, seen = patch(hr, found)
            _, expected = patch(hr, hr_edges)
            answer = discriminator(sr)
            distance = perceptual(sr, hr)
        assert features.dtype == dtype
        if dtype == torch.float32:  # fake convolutions do not keep the layout under autocast
            assert features.is_contiguous(memory_format=last)
        for each in (found, sr, fast, answer):
            assert each.dtype == torch.float32 and each.is_cuda
        assert seen[0].dtype == dtype
        terms = generator_terms(sr, hr, distance, answer)
        total = sum(terms.values()) + edge_cross_entropy(found, hr_edges)
        total = total + feature_matching(seen, expected) + hinge_generator(score.float())
        total = total + discriminator_loss(answer, answer, torch.rand(2, 2))
        total = total + F.mse_loss(fast, hr)
        assert total.dtype == torch.float32 and total.shape == ()
