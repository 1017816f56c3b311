import pytest
import torch
from conftest import REPOSITORY

import files
import weights
from console import UserError
from models import EdgeGenerator, Generator, SRResNet
from weights import load_file, load_network, save_file, save_network


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


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
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
        with pytest.raises(UserError, match=rf"{name}\.pth") as error:
            load_network(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    assert "ran" not in capsys.readouterr().out


def test_a_network_under_the_wrong_name_is_refused(tmp_path):
    save_network(Generator(8, 4), tmp_path / "EdgeModel_gen.pth")
    with pytest.raises(UserError, match="holds Generator, not EdgeGenerator"):
        load_network(tmp_path / "EdgeModel_gen.pth", EdgeGenerator)


def test_weights_beyond_half_precision_stay_exact(tmp_path):
    network = SRResNet(8, 1)
    with torch.no_grad():
        network.conv2.weight[0, 0, 0, 0] = 1e6
    save_network(network, tmp_path / "a.pth")
    assert load_network(tmp_path / "a.pth").conv2.weight[0, 0, 0, 0] == 1e6


def test_an_interrupted_save_keeps_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_network(SRResNet(4, 1), path)
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_network(SRResNet(4, 1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrapper", ["params", "params_ema", "model_state_dict", "state_dict"])
def test_wrappers_of_other_programs_are_taken_off(tmp_path, wrapper):
    state = {f"_orig_mod.{key}": value for key, value in SRResNet(8, 2).state_dict().items()}
    other = {"params": SRResNet(8, 2).state_dict()} if wrapper == "params_ema" else {}
    torch.save({"step": 3} | other | {wrapper: state}, tmp_path / "a.pth")
    loaded = load_network(tmp_path / "a.pth").state_dict()
    assert torch.equal(loaded["conv2.weight"], state["_orig_mod.conv2.weight"])


def test_states_of_our_own_trainings_hold_the_averaged_weights(tmp_path):
    gen, ema = (SRResNet(8, 2).state_dict() for _ in range(2))
    content = {"progress": {"step": 3}, "settings": {}, "parts": {"gen": gen, "ema": ema}}
    save_file(content, tmp_path / "state.pth")
    loaded = load_network(tmp_path / "state.pth").state_dict()
    assert torch.equal(loaded["conv1.weight"], ema["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.safetensors", b"{}", "torch.save"),
        ("a.pth", b"", "damaged"),
        ("a.pth", None, "tensors-only"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name(tmp_path, name, content, words):
    if content is None:
        torch.save(SRResNet(8, 1), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_network(tmp_path / name)


def test_written_tensors_are_plain(tmp_path):
    network = Generator(8, 4).to(memory_format=torch.channels_last)
    save_network(network, tmp_path / "a.pth")
    for value in load_file(tmp_path / "a.pth")["state_dict"].values():
        assert value.is_contiguous() and value.device.type == "cpu"
        value.view(-1)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ckpts").glob("*.pth")), ids=lambda p: p.stem)
def test_weights_written_again_are_the_same(tmp_path, path):
    save_network(load_network(path), tmp_path / "a.pth")
    before, after = (load_file(each)["state_dict"] for each in (path, tmp_path / "a.pth"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value) and after[key].dtype == value.dtype


def test_weights_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.os, "fsync", flushed.append)
    save_network(SRResNet(4, 1), tmp_path / "a.pth")
    assert len(flushed) == 1
