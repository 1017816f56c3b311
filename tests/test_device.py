import os
import signal
import time

import pytest
import torch
from conftest import CPU, Launched
from torch._subclasses.fake_tensor import FakeTensorMode

import device
from console import NotFiniteError, UserError
from device import (
    Device,
    choose_kind,
    choose_precision,
    open_device,
    to_image,
)
from losses import (
    PerceptualLoss,
    discriminator_loss,
    edge_cross_entropy,
    feature_matching,
    generator_terms,
    hinge_discriminator,
    hinge_generator,
    squared_error,
)
from models import Discriminator, EdgeDiscriminator, EdgeGenerator, Generator, SRResNet


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a CUDA GPU that computes, or fails to with an error."""

    def fake(error=None, bf16=True):
        def ones(*_, **__):
            if error:
                raise RuntimeError(error)
            return torch.zeros(1)

        for name, found in {
            "is_available": True,
            "current_device": 1,
            "device_count": 2,
            "set_device": None,
            "is_bf16_supported": bf16,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, found=found, **__: found)
        monkeypatch.setattr(torch, "ones", ones)

    return fake


def test_cuda_is_used_where_it_computes(gpu, capsys):
    gpu()
    assert choose_kind("auto") == choose_kind("cuda") == "cuda"
    assert capsys.readouterr().err == ""


def test_a_gpu_that_does_not_compute_is_named(gpu, capsys, monkeypatch):
    gpu("CUDA error: no kernel image is available\nFor debugging ...")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_kind("auto") == "cpu"
    assert "no kernel image is available; using the CPU" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--device cuda: .*no kernel image"):
        choose_kind("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_kind("auto") == "cpu" and capsys.readouterr().err == ""


def test_processes_without_a_gpu_each_compute_on_the_cpu_together(gpu, capsys, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for count, kind in (("2", "cuda"), ("3", "cpu")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert choose_kind("auto") == kind
    assert "fewer GPUs than processes; using the CPU" in capsys.readouterr().err


def leave_others_that_stay():
    """What a process does that fails, where NCCL waits for the others to leave as well."""
    device.LEAVING_SECONDS = 1
    torch.distributed.destroy_process_group = lambda: time.sleep(60)
    device.leave()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGALRM")
def test_a_process_that_fails_does_not_wait_for_those_that_wait_for_it(tmp_path):
    statuses, _ = Launched(tmp_path / "log", leave_others_that_stay).wait(30)
    assert statuses == [-signal.SIGALRM]


def test_the_cpu_is_used_without_looking_for_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "cuda_obstacle", None)
    assert choose_kind("cpu") == "cpu"


def test_opening_a_gpu(gpu):
    gpu()
    opened = device.open_device()
    assert opened.torch_device == torch.device("cuda", 1)
    assert opened.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("training", "given", "found"), [(False, None, "32"), (False, "7", "7"), (True, None, None)]
)
def test_few_kernels_are_kept_for_images_of_many_sizes(monkeypatch, training, given, found):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")  # so that it is put back
    if given is None:
        monkeypatch.delenv(name)
    device.open_device("cpu", training=training)
    assert device.os.environ.get(name) == found


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}"):
            choose_kind(name)
    assert choose_kind("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_kind("auto") == "mps"


def test_precision_is_what_the_processor_computes_in(gpu, monkeypatch, capsys):
    gpu(bf16=False)
    assert choose_precision("cuda") == torch.float16
    assert choose_precision("cuda", training=True) == torch.float32
    assert "float32" in capsys.readouterr().err
    assert choose_precision("cuda", "bf16") == torch.bfloat16
    gpu(bf16=True)
    assert choose_precision("cuda", training=True) == torch.bfloat16
    for flag, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=flag: {"avx512_bf16": f})
        assert choose_precision("cpu") == dtype
    assert choose_precision("mps") == torch.float32
    assert capsys.readouterr().err == ""


def test_what_torchrun_left_in_the_environment_alone_means_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "2")
    opened = open_device("cpu")
    assert (opened.rank, opened.world) == (0, 1)


def test_a_device_is_described_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert CPU.describe() == "CPU, float32, 2 threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    gpu = Device(torch.device("cuda", 1), torch.bfloat16, rank=1, world=2)
    assert gpu.describe() == "NVIDIA H200, bfloat16, 2 processes"


def test_a_container_s_memory_is_what_it_may_take(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(device, "CGROUPS", [(tmp_path, "max", "current")])
    for name, content in (("max", "5000000"), ("current", "1000000")):
        (tmp_path / name).write_text(content)
    assert device.free_ram() in (0, 2_000_000)  # the first outside Linux


def test_bytes_become_numbers_from_0_to_1():
    sent = Device(torch.device("cpu")).send(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert sent.dtype == torch.float32 and sent.tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_only_cuda_copies_without_waiting(monkeypatch, kind):
    """MPS reads the source later, when it may be gone (PyTorch's issue 189690)."""

    def to(tensor, _, non_blocking):
        assert non_blocking is (kind == "cuda")
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    Device(torch.device(kind)).send(torch.zeros(1))


def test_networks_and_images_are_in_the_layout_that_convolutions_are_fastest_in():
    placed = CPU.place(Generator(8, 4))
    assert placed.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    sent = CPU.send(torch.zeros(2, 3, 5, 6, dtype=torch.uint8))
    assert sent.is_contiguous(memory_format=torch.channels_last)
    assert placed.trunk(sent).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("precision", "training", "layout"),
    [
        ("fp32", True, torch.contiguous_format),  # channels-last is slower backwards
        ("fp32", False, torch.channels_last),
        ("bf16", True, torch.channels_last),
    ],
)
def test_layout_on_a_cpu(precision, training, layout):
    device = open_device("cpu", precision, training)
    weight = device.place(Generator(8, 4)).conv2.weight
    sent = device.send(torch.zeros(2, 3, 5, 6, dtype=torch.uint8))
    assert weight.is_contiguous(memory_format=layout) and sent.is_contiguous(memory_format=layout)


def test_an_output_that_is_not_a_number_is_no_image():
    with pytest.raises(NotFiniteError, match="--precision fp32"):
        to_image(torch.full((1, 3, 2, 2), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
        networks = edges, patch, trunk, generator, discriminator
        for parameter in (p for network in networks for p in network.parameters()):
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=last)
        layers = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
        state = {f"{i}.weight": torch.rand(*shape, 3, 3) for i, shape in layers.items()}
        state |= {f"{i}.bias": torch.rand(shape[0]) for i, shape in layers.items()}
        perceptual = PerceptualLoss(state)
        with gpu.autocast():
            logits = edges.logits(lr, lr_edges)
            found = logits.sigmoid()
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
        total = sum(terms.values()) + edge_cross_entropy(logits, hr_edges)
        total = total + feature_matching(seen, expected) + hinge_generator(score.float())
        total = total + discriminator_loss(answer, answer, torch.rand(2, 2))
        total = total + squared_error(fast, hr) + hinge_discriminator(score.float(), score.float())
        assert total.dtype == torch.float32 and total.shape == ()
