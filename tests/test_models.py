import pytest
import torch
import torch.distributed as dist
from conftest import Launched

from device import open_device
from models import (
    Discriminator,
    EdgeDiscriminator,
    EdgeGenerator,
    Generator,
    PReLU,
    SRResNet,
    SyncBatchNorm,
)


@pytest.mark.parametrize(
    ("network", "millions"), [(EdgeGenerator, 10.76), (Generator, 3.56), (Discriminator, 4.69)]
)
def test_sizes_are_the_original_ones(network, millions):
    count = sum(parameter.numel() for parameter in network().parameters())
    assert round(count / 1e6, 2) == millions


def test_images_and_edges_become_four_times_as_large():
    lr, lr_edges = torch.rand(2, 3, 12, 20), torch.zeros(2, 1, 12, 20)
    hr_edges = EdgeGenerator(4, 1)(lr, lr_edges)
    assert hr_edges.shape == (2, 1, 48, 80)
    assert hr_edges.min() >= 0 and hr_edges.max() <= 1
    for sr in (SRResNet(8, 2)(lr), Generator(8, 4)(lr, hr_edges)):
        assert sr.shape == (2, 3, 48, 80)
        assert sr.min() >= 0 and sr.max() <= 1


def test_discriminators_answer():
    hr, edges = torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96)
    answers = Discriminator(4)(hr)
    assert answers.shape == (2,)
    scores, features = EdgeDiscriminator(4)(hr, edges)
    assert [f.shape[1] for f in features] == [4, 8, 16, 32, 1]
    assert torch.equal(scores, features[-1])


def test_a_ring_of_bias_joins_the_discriminators_mean():
    torch.manual_seed(0)
    network, hr = Discriminator(4).eval(), torch.rand(1, 3, 64, 64)
    seen = network.layers[:-1](2 * hr - 1)
    last = network.layers[-1]
    scores = torch.einsum("nchw,c->nhw", seen, last.weight[0, :, 0, 0]) + last.bias
    total = scores.sum() + last.bias * (6 * 6 - 4 * 4)
    assert torch.allclose(network(hr), total / 36, atol=1e-6)


def test_generator_starts_as_its_trunk():
    torch.manual_seed(0)
    trunk = SRResNet(8, 4).eval()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator = Generator.from_trunk(trunk).eval()
    lr, edges = torch.rand(1, 3, 10, 10), torch.rand(1, 1, 40, 40)
    assert torch.allclose(generator(lr, edges), trunk(lr), atol=1e-5)
    assert generator.state_dict().keys() == Generator(8, 4).state_dict().keys()


def test_edges_matter_once_trained():
    torch.manual_seed(0)
    generator = Generator(8, 4).eval()
    lr = torch.rand(1, 3, 10, 10)
    dark, light = generator(lr, torch.zeros(1, 1, 40, 40)), generator(lr, torch.ones(1, 1, 40, 40))
    assert not torch.allclose(dark, light)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_prelu_is_pytorchs(dtype, tolerance):
    torch.manual_seed(0)
    results = []
    for prelu in (PReLU(init=0.3), torch.nn.PReLU(init=0.3)):
        x = torch.linspace(-2, 2, 24, dtype=dtype).view(1, 2, 3, 4).requires_grad_()
        y = prelu.to(dtype)(x)
        (y * torch.linspace(1, 2, 24, dtype=dtype).view(1, 2, 3, 4)).sum().backward()
        results.append((y, x.grad, prelu.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[False, True], ids=["alone", "in a group"])
def group(request):
    """Once without and once with a group of processes, this one its only member."""
    if request.param:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if request.param:
        dist.destroy_process_group()


def normalised(path):
    """What each of two processes does with its half of a batch."""
    device = open_device("cpu", "fp32", training=True)
    norm, x, weight = norm_and_batch(SyncBatchNorm)
    mine = slice(2 * device.rank, 2 * device.rank + 2)
    x = x[mine].detach().requires_grad_()
    y = norm(x)
    (y * weight[mine]).sum().backward()
    torch.save([y, x.grad, *norm.buffers()], f"{path}.{device.rank}")


def norm_and_batch(kind):
    torch.manual_seed(0)
    norm = kind(3)
    torch.nn.init.uniform_(norm.weight)
    x = (2 * torch.randn(4, 3, 5, 6) + 1).requires_grad_()
    return norm, x, torch.randn(4, 3, 5, 6)


def test_two_processes_normalise_the_whole_batch(tmp_path):
    launched = Launched(tmp_path / "log", normalised, tmp_path / "result", processes=2)
    statuses, printed = launched.wait()
    assert statuses == [0, 0], printed
    halves = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]
    norm, x, weight = norm_and_batch(torch.nn.BatchNorm2d)
    y = norm(x)
    (y * weight).sum().backward()
    for ours, theirs in zip(zip(*halves, strict=True), (y, x.grad), strict=False):
        assert torch.allclose(torch.cat(ours), theirs, rtol=1e-4, atol=1e-5)
    for half in halves:
        for ours, theirs in zip(half[2:], norm.buffers(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_batch_norm_is_pytorchs(group):
    results = []
    for kind in (SyncBatchNorm, torch.nn.BatchNorm2d):
        torch.manual_seed(0)
        norm = kind(3)
        torch.nn.init.uniform_(norm.weight)
        torch.nn.init.uniform_(norm.bias)
        x = (2 * torch.randn(4, 3, 5, 6) + 1).requires_grad_()
        y = norm(x)
        (y * torch.randn(y.shape)).sum().backward()
        results.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
        results[-1].append(norm.eval()(x))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
