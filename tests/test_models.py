import pytest
import torch
import torch.distributed as dist
from conftest import Launched

import models
from device import open_device
from models import (
    BatchNorm2d,
    Discriminator,
    EdgeDiscriminator,
    EdgeGenerator,
    Generator,
    PReLU,
    SRResNet,
    WeightError,
    load_network,
    save_network,
)


def edge_generator_keys() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published EdgeModel_gen.pth."""
    encoder = {1: (64, 4, 7, 7), 4: (128, 64, 4, 4), 7: (256, 128, 4, 4)}
    decoder = {0: (256, 128, 4, 4), 3: (128, 64, 4, 4)}
    normed = {f"encoder.{i}": (shape, shape[0], True) for i, shape in encoder.items()}
    normed |= {f"decoder.{i}": (shape, shape[1], True) for i, shape in decoder.items()}
    for block in range(8):
        for i in (1, 5):
            normed[f"middle.{block}.conv_block.{i}"] = ((256, 256, 3, 3), 256, False)
    keys = {"decoder.7.weight": (1, 64, 7, 7), "decoder.7.bias": (1,)}
    for name, (shape, out, bias) in normed.items():
        flat = 1
        for n in shape:
            flat *= n
        keys |= {f"{name}.weight_orig": shape, f"{name}.weight_u": (out,)}
        keys[f"{name}.weight_v"] = (flat // out,)
        if bias:
            keys[f"{name}.bias"] = (out,)
    return keys


def generator_keys() -> dict[str, tuple[int, ...]]:
    """Names and shapes in a generator that the original's training wrote."""
    keys: dict[str, tuple[int, ...]] = {}

    def conv(name, out, into, size):
        keys.update({f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)})

    def norm(name, channels):
        keys.update({f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean")})
        keys.update({f"{name}.running_var": (channels,), f"{name}.num_batches_tracked": ()})

    def block(name, channels):
        for i in (1, 2):
            conv(f"{name}.conv{i}", channels, channels, 3)
            norm(f"{name}.bn{i}", channels)
        keys[f"{name}.prelu.weight"] = (1,)

    conv("conv1", 64, 3, 9)
    for i in range(1, 21):
        block(f"residual_block{i}", 64)
    conv("conv2", 64, 64, 3)
    norm("bn2", 64)
    for i in (1, 2):
        conv(f"upsample{i}.conv", 256, 64, 3)
        keys[f"upsample{i}.prelu.weight"] = (1,)
    conv("conv3", 128, 65, 3)
    for i in range(1, 6):
        block(f"residual_block_edges{i}", 128)
    conv("conv4", 128, 128, 3)
    norm("bn4", 128)
    conv("conv5", 3, 128, 9)
    keys["prelu.weight"] = (1,)
    return keys


def state_of(keys: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A state dict of random numbers, whole ones where they count batches."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.tensor(3) if shape == () else torch.rand(shape, generator=generator) - 0.5
        for key, shape in keys.items()
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_files_load_as_they_are(tmp_path, prefix):
    edges, images = state_of(edge_generator_keys()), state_of(generator_keys())
    optimizer = {"state": {}, "param_groups": []}
    contents = {
        "edges": {"iteration": 7, "generator": edges},
        "images": {"epoch": 3, "state_dict": images, "optim_dict": optimizer},
        "bare": images,
    }
    for name, given in contents.items():
        content = given
        if prefix:
            content = {
                key: {prefix + k: v for k, v in value.items()}
                if key in ("generator", "state_dict")
                else value
                for key, value in given.items()
            }
        torch.save(content, tmp_path / f"{name}.pth")
        loaded = load_network(tmp_path / f"{name}.pth")
        assert type(loaded) is (EdgeGenerator if name == "edges" else Generator)
        state = loaded.state_dict()
        assert len(state) == len(edges if name == "edges" else images)
        assert not loaded.training
        if name == "edges":
            assert torch.equal(state["middle.7.conv_block.5.weight_u"],
                               edges["middle.7.conv_block.5.weight_u"])  # fmt: skip
        else:
            for ours, theirs in {
                "residual_blocks.19.conv2.weight": "residual_block20.conv2.weight",
                "residual_blocks_edges.4.bn1.running_var": "residual_block_edges5.bn1.running_var",
                "prelu.weight": "prelu.weight",
            }.items():
                assert torch.equal(state[ours], images[theirs])


@pytest.mark.parametrize(
    ("network", "millions"), [(EdgeGenerator, 10.76), (Generator, 3.56), (Discriminator, 4.69)]
)
def test_sizes_are_the_original_ones(network, millions):
    count = sum(parameter.numel() for parameter in network().parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize(
    "network",
    [
        EdgeGenerator(4, 2),
        SRResNet(8, 3),
        Generator(8, 4),
    ],
    ids=lambda network: type(network).__name__,
)
def test_own_files_rebuild_the_network(tmp_path, network):
    save_network(network, tmp_path / "a.pth")
    loaded = load_network(tmp_path / "a.pth")
    assert type(loaded) is type(network) and loaded.arguments == network.arguments
    for key, value in network.state_dict().items():
        assert torch.allclose(loaded.state_dict()[key], value, rtol=1e-3, atol=1e-6)


class Code:
    def __reduce__(self):
        return (print, ("code of a stranger ran",))


def test_bad_files_are_named_and_code_in_them_not_run(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    torch.save({"unknown": 1}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"a": "b"}}, tmp_path / "words.pth")
    broken = Generator(8, 4).state_dict()
    broken["conv2.weight"][0, 0, 0, 0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    cut = {k: v for k, v in Generator(8, 4).state_dict().items() if k != "bn4.bias"}
    torch.save(cut, tmp_path / "unfit.pth")
    for name in ("text", "code", "other", "unfit", "list", "words", "nan", "none"):
        with pytest.raises(WeightError, match=rf"{name}\.pth") as error:
            load_network(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out


def test_a_network_under_the_wrong_name_is_refused(tmp_path):
    save_network(Generator(8, 4), tmp_path / "EdgeModel_gen.pth")
    with pytest.raises(WeightError, match="holds Generator, not EdgeGenerator"):
        load_network(tmp_path / "EdgeModel_gen.pth", EdgeGenerator)


def test_weights_beyond_half_precision_stay_exact(tmp_path):
    network = SRResNet(8, 1)
    with torch.no_grad():
        network.conv2.weight[0, 0, 0, 0] = 1e6
    save_network(network, tmp_path / "a.pth")
    assert load_network(tmp_path / "a.pth").conv2.weight[0, 0, 0, 0] == 1e6


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


def test_an_interrupted_save_keeps_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_network(SRResNet(4, 1), path)
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_network(SRResNet(4, 1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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
    with open_device("cpu", "fp32", training=True) as device:
        norm, x, weight = norm_and_batch(BatchNorm2d)
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
    for kind in (BatchNorm2d, torch.nn.BatchNorm2d):
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
