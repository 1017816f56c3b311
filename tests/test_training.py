import math
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import CPU, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset import canny
from inference import for_inference, predict_edges
from models import EdgeGenerator, load_file, load_network, save_file, save_network
from tiles import HR, LR, TEST, TILES, TRAINING, read_picture
from training import constant_then_halved, cosine, keep_norms, update_average


def options(sliced, folder, vgg, *more):
    fixed = ["--root", sliced, "--ckpts", folder, "--runs", folder / "runs", "--vgg", vgg]
    return [*fixed, "--workers", 0, "--batch-size", 2, "--crop", 16, *more]


@pytest.fixture
def folder(tmp_path, ckpts):
    """A folder of checkpoints that holds an edge generator only."""
    (tmp_path / "EdgeModel_gen.pth").write_bytes((ckpts / "EdgeModel_gen.pth").read_bytes())
    return tmp_path


def parts(folder, name):
    return load_file(folder / f"{name}.state.pth")


def assert_equal(a, b):
    """The same tensors and values, however deep."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def scalars(folder, name):
    events = EventAccumulator(str(folder / "runs" / name)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_schedules():
    assert [constant_then_halved(step, 0) for step in (0, 249_999, 250_000, 500_000)] == [
        1, 1, 0.5, 0.25,
    ]  # fmt: skip
    assert cosine(0, 10_000) == pytest.approx(1 / 200)
    assert max(cosine(step, 10_000) for step in range(10_000)) == pytest.approx(1, abs=0.01)
    assert cosine(10_000, 10_000) == pytest.approx(0.02)
    assert math.isclose(cosine(5, 40), 0.51 + 0.49 * math.cos(math.pi / 8))


def test_edges_are_learnt_and_watched(sliced, folder, vgg):
    run("train_edges", *options(sliced, folder, vgg, "--steps", 100))
    first, seen = scalars(folder, "EdgePreModel"), scalars(folder, "EdgeModel")
    assert first["loss/cross-entropy"][-1] < first["loss/cross-entropy"][0]
    lr = read_picture(next((sliced / TEST / LR).glob("*.png")))
    true = canny(read_picture(next((sliced / TEST / HR).glob("*.png"))))
    untrained, learnt = (
        np.abs(predict_edges(lr, for_inference(network, CPU), CPU) - true).mean()
        for network in (EdgeGenerator(4, 1), load_network(folder / "EdgeModel_gen.pth"))
    )
    assert learnt < 0.95 * untrained
    expected = {"precision", "recall", "learning rate", "crops per second", "validation/F1"}
    assert expected < seen.keys()
    assert load_network(folder / "EdgeModel_gen.pth").arguments == {"width": 4, "blocks": 1}
    assert load_network(folder / "EdgeModel_dis.pth").arguments == {"width": 4}
    events = EventAccumulator(str(folder / "runs" / "EdgeModel")).Reload()
    assert events.Tags()["images"] == ["LR edges, predicted, true"]


def test_pictures_are_learnt_in_all_stages(sliced, folder, vgg):
    run("pretrain", *options(sliced, folder, vgg, "--steps", 60))
    trunk, whole = scalars(folder, "SRResNet"), scalars(folder, "PreModel")
    assert trunk["loss/mse"][-1] < trunk["loss/mse"][0]
    assert whole["validation/PSNR"][-1] > trunk["validation/PSNR"][-1] > trunk["validation/PSNR"][0]
    for key in ("loss/mse", "validation/SSIM", "validation/L1", "validation/PSNR bicubic"):
        assert key in whole
    run("train", *options(sliced, folder, vgg, "--steps", 40))
    before, after = (
        load_network(folder / f"{name}_gen.pth").state_dict() for name in ("PreModel", "SRModel")
    )
    for key in ("residual_block1.bn1", "bn4"):
        assert torch.equal(after[f"{key}.running_mean"], before[f"{key}.running_mean"])
        assert not torch.equal(after[f"{key}.weight"], before[f"{key}.weight"])
    seen = scalars(folder, "SRModel")
    terms = ("l1", "perceptual", "ssim", "adversarial", "discriminator")
    assert {f"loss/{term}" for term in terms} < seen.keys()
    names = ("SRResNet_gen", "PreModel_gen", "SRModel_gen", "SRModel_gen_best", "SRModel_dis")
    assert all((folder / f"{name}.pth").exists() for name in names)


@pytest.mark.parametrize("command", ["train_edges", "pretrain", "train"])
def test_killed_and_resumed_training_ends_as_if_left_alone(sliced, folder, vgg, command):
    name = {"train_edges": "EdgeModel", "pretrain": "PreModel", "train": "SRModel"}[command]
    steps = options(sliced, folder, vgg, "--steps", 60)
    (folder / "alone").mkdir()
    (folder / "alone" / "EdgeModel_gen.pth").write_bytes(
        (folder / "EdgeModel_gen.pth").read_bytes()
    )
    alone = list(steps)
    alone[alone.index(folder)] = folder / "alone"
    run(command, *alone)

    process = start(command, *steps)
    state = folder / f"{name}.state.pth"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())  # anywhere, also amid a checkpoint
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert parts(folder, name)["step"] < 60
    run(command, *steps, "--resume")
    assert_equal(parts(folder, name), parts(folder / "alone", name))


def test_a_validation_cut_short_is_made_up_for(sliced, folder, vgg):
    run("pretrain", *options(sliced, folder, vgg, "--steps", 4))
    complete = parts(folder, "PreModel")
    assert complete["judged"] == 4
    (folder / "PreModel_gen_best.pth").unlink()
    save_file(complete | {"judged": 0, "best": -math.inf}, folder / "PreModel.state.pth")
    run("pretrain", *options(sliced, folder, vgg, "--steps", 4, "--resume"))
    assert_equal(parts(folder, "PreModel"), complete)
    assert (folder / "PreModel_gen_best.pth").exists()


def test_interrupted_training_saves_and_says_how_to_go_on(sliced, folder, vgg):
    process = start("pretrain", *options(sliced, folder, vgg, "--steps", 100_000))
    state = folder / "SRResNet.state.pth"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "--resume" in printed and "Traceback" not in printed
    assert f"saved at step {parts(folder, 'SRResNet')['step']};" in printed


def test_a_new_training_keeps_the_old_weights(sliced, folder, vgg):
    before = (folder / "EdgeModel_gen.pth").read_bytes()
    run("train_edges", *options(sliced, folder, vgg, "--steps", 1))
    assert (folder / "EdgeModel_gen.1.previous.pth").read_bytes() == before
    trained = (folder / "EdgeModel_gen.pth").read_bytes()
    run("train_edges", *options(sliced, folder, vgg, "--steps", 1))
    assert (folder / "EdgeModel_gen.1.previous.pth").read_bytes() == before
    assert (folder / "EdgeModel_gen.2.previous.pth").read_bytes() == trained


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_tile_is_named_and_the_training_saved(sliced, folder, vgg, tmp_path, workers):
    root = tmp_path / "damaged"
    shutil.copytree(sliced, root)
    for tile in (root / TRAINING / HR / TILES).glob("*_02_02.png"):
        tile.write_bytes(tile.read_bytes()[:500])
    given = options(root, folder, vgg, "--steps", 1000)
    given[given.index("--workers") + 1] = workers
    process = start("train_edges", *given)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"\d{4}_02_02\.png: not readable", printed) and "Traceback" not in printed
    assert (folder / "EdgePreModel.state.pth").exists()


def test_pretraining_in_two_processes(sliced, folder, vgg):
    run("pretrain", *options(sliced, folder, vgg, "--steps", 1), processes=2)
    assert parts(folder, "PreModel")["step"] == 1


def test_epochs_count_passes_over_the_tiles(sliced, folder, vgg):
    run("train_edges", *options(sliced, folder, vgg, "--epochs", 2))
    assert parts(folder, "EdgePreModel")["step"] == 2 * 3 * 4 / 2  # three pictures of four tiles


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_two_processes_compute_the_gradient_of_the_doubled_batch(
    sliced, folder, vgg, precision, tolerance
):
    gradients = []
    for processes in (1, 2):
        where = folder / str(processes)
        where.mkdir()
        (where / "EdgeModel_gen.pth").write_bytes((folder / "EdgeModel_gen.pth").read_bytes())
        size = ["--batch-size", 4 // processes, "--steps", 1, "--precision", precision]
        run("train", *options(sliced, where, vgg, *size), processes=processes,
            GRADIENTS=str(where / "gradients"))  # fmt: skip
        gradients.append(torch.load(where / "gradients.0", weights_only=True))
    for network in zip(*gradients, strict=True):  # the generator, then the discriminator
        one, two = (torch.cat([gradient.flatten() for gradient in each]) for each in network)
        assert (one - two).norm() < tolerance * one.norm()


def zeros_and_ones():
    average, network = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    average.requires_grad_(False).weight.zero_()
    network.running_mean.fill_(5)
    return average, network


def test_the_average_soon_forgets_where_training_started():
    average, network = zeros_and_ones()
    for step in range(300):
        update_average(average, network, step)
    assert average.weight.min() > 0.99
    assert average.running_mean.tolist() == pytest.approx([5] * 3, rel=1e-2)


def test_kept_norms_are_those_of_the_average():
    average, network = zeros_and_ones()
    average.running_mean.fill_(3)
    keep_norms(network, average)
    network(torch.randn(2, 3, 4, 4))
    assert network.running_mean.tolist() == [3] * 3


def test_the_average_is_over_the_last_thousand_steps():
    average, network = zeros_and_ones()
    for step in range(50_000, 51_000):
        update_average(average, network, step)
    assert average.weight.tolist() == pytest.approx([1 - 0.999**1000] * 3, rel=1e-3)


def test_a_training_starts_from_the_weights_it_is_given(sliced, folder, vgg, tmp_path):
    torch.manual_seed(1)
    given = EdgeGenerator(4, 1)
    save_network(given, tmp_path / "given.pth")
    more = ["--steps", 1, "--learning-rate", 1e-9, "--init"]
    run("train_edges", *options(sliced, folder, vgg, *more, tmp_path / "given.pth"))
    trained = load_network(folder / "EdgePreModel_gen.pth")
    for before, after in zip(given.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(before, after, atol=1e-3)
    process = start("pretrain", *options(sliced, folder, vgg, *more, tmp_path / "given.pth"))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "given.pth: holds EdgeGenerator" in printed
