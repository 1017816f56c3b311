import dataclasses
import errno
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import CPU, Launched, failing, photograph, save, shrunk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoints
import console
import files
import images
import slice_images_w_overlapping
import training
import weights
from console import ImageError
from dataset import PairedTiles, draw_batches, split
from device import open_device
from inference import Enlarger
from models import EdgeGenerator, Generator, SRResNet
from stages import (
    EdgeModel,
    EdgePreModel,
    EdgeStageModel,
    PreModel,
    Recipe,
    SRGANModel,
    SRModel,
    SRResNetModel,
    cosine,
    halving,
)
from tiles import HR, LR, SCALE, TEST, TRAINING
from training import update_ema
from weights import load_file, load_network, save_file, save_network

STAGES = [EdgePreModel, EdgeModel, SRResNetModel, EdgeStageModel, PreModel, SRModel, SRGANModel]
FIRST = {EdgePreModel: "EdgeModel", SRResNetModel: "SRResNet"}  # start from nothing or `--init`


@pytest.fixture(autouse=True)
def python_s_own_handlers():
    """Lets Ctrl-C interrupt also where the tests run in the background, which ignores it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """The root of conftest.py with images half as large: trainings validate often here."""
    root = tmp_path_factory.mktemp("small")
    for number in range(5):
        folder = root / (TRAINING if number < 4 else TEST)
        hr = photograph(number, SCALE * 48)
        save(folder / HR, f"image_2400px_{number:04d}.png", hr)
        save(folder / LR, f"image_600px_{number:04d}.png", shrunk(hr))
    slice_images_w_overlapping.main(["--root", str(root), "--tiles", "2"])
    return root


@pytest.fixture
def folder(tmp_path, ckpts):
    """A folder with a tiny network for every stage to start from, none of them trained."""
    for name in ("EdgeModel", "SRResNet", "EdgeStageModel", "PreModel"):
        (tmp_path / "ckpts").mkdir(exist_ok=True)
        shutil.copy(ckpts / f"{name}_gen.pth", tmp_path / "ckpts")
    return tmp_path / "ckpts"


@pytest.fixture
def given(sliced, vgg, ckpts, folder):
    """A function that returns the options of a training; what it is given wins."""
    return lambda kind, **changes: options_of(sliced, vgg, ckpts, folder, kind, **changes)


def options_of(root, vgg, ckpts, folder, kind, /, **changes):
    """Options of a training that takes a second."""
    init = ckpts / f"{FIRST[kind]}_gen.pth" if kind in FIRST else None
    runs = changes.get("ckpts", folder) / "runs"
    values = {"root": root, "ckpts": folder, "runs": runs, "vgg": vgg, "init": init}
    values |= {"resume": False, "accept_changes": False, "seed": 0, "workers": 0}
    values |= {"steps": 4, "epochs": None, "batch_size": 2, "crop": 16, "learning_rate": None}
    values |= {"jpeg": None, "held_out": 4, "checkpoint_every": 500, "publish": False}
    return Namespace(**values | changes)


def fit(kind, options, precision="auto"):
    """Trains a stage as a command does."""
    with console.plain_errors():
        device = open_device("cpu", precision, training=True)
        training.fit(kind, options, device)


@pytest.fixture
def refused(capsys):
    """A function that trains, which must end with 1, and returns the last line."""
    return lambda *arguments: failing(capsys, fit, *arguments).splitlines()[-1]


def fit_from_disk(*arguments):
    """Trains where memory holds no tiles."""
    training.PairedTiles.keep_in_memory = lambda _: None
    fit(*arguments)


class Killed(BaseException):
    """What a killed process does: nothing more."""


def stop_at(monkeypatch, kind, number, action):
    """Has a stage call `action` before its batch number `number`, from 0, once."""
    original, seen = kind.loss_terms, []

    def loss_terms(self, batch):
        seen.append(batch)
        if type(self) is kind and len(seen) == number + 1:
            action()
        return original(self, batch)

    monkeypatch.setattr(kind, "loss_terms", loss_terms)


def interrupted_at(monkeypatch, kind, number, options):
    """Trains a stage until Ctrl-C in a batch."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        stop_at(patch, kind, number, lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(kind, options)
    assert ended.value.code == 130


def kill():
    raise Killed


def never(*_, **__):
    raise AssertionError("this must not be reached")


def run_of(folder, kind, number=1):
    return folder / "runs" / kind.name / str(number)


def state(folder, kind, number=1):
    return load_file(run_of(folder, kind, number) / "state.pth")


def step(folder, kind, number=1):
    return state(folder, kind, number)["progress"]["step"]


def published(folder, kind):
    return (folder / f"{kind.publishes}_gen.pth").read_bytes()


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


def assert_same_training(folder, other, *kinds):
    """The same state and weights, to the bit."""
    for kind in kinds:
        for name in ("state", "latest", "best"):
            ours, theirs = (run_of(each, kind) / f"{name}.pth" for each in (folder, other))
            assert_equal(load_file(ours), load_file(theirs))
        assert published(folder, kind) == published(other, kind)


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def scalars(folder):
    """{tag: [(step, value), ...]} of a run."""
    found = events(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def values(curve):
    return [value for _, value in curve]


# What the trainings do ------------------------------------------------------------------------


def test_schedules():
    long, few, recipe = (
        Recipe(steps=steps, crops=(16, 31), accumulate=2) for steps in (500_000, 124_999, 10_000)
    )
    steps = (0, 124_999, 125_000, 250_000)  # of two batches
    assert [halving(step, long) for step in steps] == [1, 1, 0.5, 0.25]
    assert [halving(step, few) for step in (0, 500)] == [cosine(step, few) for step in (0, 500)]
    assert cosine(0, recipe) == pytest.approx(1 / 200)
    assert max(cosine(step, recipe) for step in range(10_000)) == pytest.approx(1, abs=0.01)
    assert cosine(10_000, recipe) == pytest.approx(0.02)
    short = Recipe(steps=40, crops=(16, 16))
    assert math.isclose(cosine(5, short), 0.51 + 0.49 * math.cos(math.pi / 8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sliced, vgg, ckpts):
    """A folder of checkpoints after all stages, each from the one before."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_EVERY", 4)
        for kind in STAGES:
            adversarial = kind in (SRModel, SRGANModel)
            lengths = {"steps": 8} if adversarial else {"steps": 40, "checkpoint_every": 20}
            fit(kind, options_of(sliced, vgg, ckpts, folder, kind, **lengths))
    return folder


def test_edges_are_learnt(trained, sliced, ckpts):
    curve = values(scalars(run_of(trained, EdgePreModel))["loss gen/cross-entropy"])
    assert curve[-1] < curve[0]
    lr = images.read_image(next((sliced / TEST / LR).glob("*.png")))
    true = images.canny(images.read_image(next((sliced / TEST / HR).glob("*.png"))))
    untrained, learnt = (
        np.abs(Enlarger(None, load_network(path), CPU).predict_edges(lr) / 255 - true / 255).mean()
        for path in (ckpts / "EdgeModel_gen.pth", run_of(trained, EdgePreModel) / "latest.pth")
    )
    assert learnt < 0.95 * untrained


def test_images_are_learnt(trained):
    trunk, whole = (scalars(run_of(trained, kind)) for kind in (SRResNetModel, PreModel))
    assert values(trunk["loss gen/mse"])[-1] < values(trunk["loss gen/mse"])[0]
    psnr = values(trunk["validation/PSNR"])
    assert values(whole["validation/PSNR"])[-1] > psnr[-1] > psnr[0]


def test_curves_begin_with_what_training_starts_from(trained, sliced, ckpts):
    for kind in STAGES:
        curve = scalars(run_of(trained, kind))[f"validation/{kind.best_by or 'SSIM'}"]
        steps = [0, 8] if kind in (SRModel, SRGANModel) else [0, 20, 40]
        assert [step for step, _ in curve] == steps
    _, held_out = split(sliced, 4)
    assert len(held_out) == 1
    lr, hr = map(images.read_image, next(iter(held_out.values())))
    sr = Enlarger(load_network(ckpts / "SRResNet_gen.pth"), None, CPU)(lr).astype(float)
    l1 = np.abs(sr - hr).mean() / 127.5
    step, value = scalars(run_of(trained, SRResNetModel))["validation/L1"][0]
    assert (step, value) == (0, pytest.approx(l1, rel=2e-2))


def test_what_is_to_be_beaten_is_a_flat_line_in_the_same_charts(trained):
    for kind in STAGES:
        ours, flat = (scalars(run_of(trained, kind) / sub) for sub in ("", kind.compared_with))
        assert flat and flat.keys() <= ours.keys()
        for key, curve in flat.items():
            assert len(set(values(curve))) == 1
            assert [step for step, _ in curve] == [step for step, _ in ours[key]]


def test_losses_of_both_networks_and_what_else_is_watched_are_logged(trained):
    for kind in STAGES:
        seen = scalars(run_of(trained, kind))
        assert {"loss gen/sum", "speed/crops per second", "learning rate"} <= seen.keys()
        adversarial = {"loss dis/sum", "discriminator/hr", "discriminator/sr"} <= seen.keys()
        assert adversarial is (kind in (EdgeModel, SRModel, SRGANModel))
        sums = [v for k, v in seen.items() if k.startswith("loss gen/") and not k.endswith("/sum")]
        total = sum(np.array(values(curve)) for curve in sums)
        assert total == pytest.approx(np.array(values(seen["loss gen/sum"])), rel=1e-4)
    assert "validation/SSIM true edges" in scalars(run_of(trained, SRModel))
    assert "validation/VGG19 distance" in scalars(run_of(trained, SRGANModel))


def test_settings_and_samples_are_logged(trained):
    seen = events(run_of(trained, SRModel))
    text = seen.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| setting | value |")
    assert "| learning rate | 0.0001 |" in text and "| seed | 0 |" in text
    titles = ["LR, generated, HR", "edges of LR, predicted, of HR"]
    assert sorted(seen.Tags()["images"]) == titles
    samples = seen.Images(titles[0])
    assert [sample.step for sample in samples] == [0, 8]
    side = SCALE * training.SAMPLE_SIDE
    assert (samples[0].width, samples[0].height) == (3 * side, side)  # at 100 %


def test_a_training_says_what_it_trains_on_and_what_came_of_it(given, folder, capsys):
    options = given(EdgePreModel, held_out=3)
    fit(EdgePreModel, options)
    first, *_, last = capsys.readouterr().out.splitlines()
    for words in (
        "EdgePreModel: CPU",
        "3 images",
        "12 tiles",
        "1 held out (a quarter of the images at most)",
        "4 steps",
    ):
        assert words in first
    assert str(folder / "EdgeModel_gen.pth") in last and "best.pth" in last


def test_each_stage_writes_its_files_and_no_others(trained):
    assert {path.name for path in trained.glob("*.pth")} == {
        f"{kind.publishes}_gen.pth" for kind in STAGES
    }
    for kind in STAGES:
        names = {path.name for path in run_of(trained, kind).iterdir() if path.suffix == ".pth"}
        replaced = {name for name in names if name.startswith("replaced-")}
        assert names - replaced == {"state.pth", "latest.pth", "best.pth"}
    assert load_network(trained / "EdgeModel_gen.pth").arguments == {"width": 4, "blocks": 1}
    assert not list(trained.rglob(".*"))


def test_edge_stage_learns_with_the_lr_stage_frozen(trained):
    before = load_network(trained / "SRResNet_gen.pth")
    after = load_network(run_of(trained, EdgeStageModel) / "latest.pth").state_dict()
    inside = ("conv1.", "residual_blocks.", "conv2.", "bn2.", "upsample")
    frozen = {key: v for key, v in before.state_dict().items() if key.startswith(inside)}
    assert len(frozen) > 20
    for key, value in frozen.items():
        assert torch.equal(value, after[key])
    start = Generator.from_trunk(before).state_dict()
    assert not torch.equal(after["conv3.weight"], start["conv3.weight"])


def test_batch_norm_keeps_its_statistics_in_the_last_stage_only(trained):
    def change(kind, key):
        paths = trained / f"{kind.starts_from}_gen.pth", run_of(trained, kind) / "latest.pth"
        before, after = (load_network(path).state_dict()[key] for path in paths)
        return not torch.equal(before, after)

    for norm in ("residual_blocks.0.bn1", "bn4"):
        assert change(PreModel, f"{norm}.weight") and change(SRModel, f"{norm}.weight")
        assert change(PreModel, f"{norm}.running_mean")
        assert not change(SRModel, f"{norm}.running_mean")


def test_half_of_a_batch_is_given_the_edges_of_the_ground_truth(given):
    stage = PreModel(Recipe(steps=1, crops=(16, 16), true_edges=0.5), given(PreModel), CPU)
    torch.manual_seed(0)
    batch = {
        "lr": torch.rand(4, 3, 16, 16),
        "lr_edges": torch.rand(4, 1, 16, 16).round(),
        "hr_edges": torch.rand(4, 1, 64, 64).round(),
    }
    edges = stage.hr_edges(batch)
    same = [torch.equal(a, b) for a, b in zip(edges, batch["hr_edges"], strict=True)]
    assert same == [True, True, False, False]
    alone = {key: value[:1] for key, value in batch.items()}
    assert torch.equal(stage.hr_edges(alone), alone["hr_edges"])


def test_epochs_count_passes_over_the_tiles(given, folder):
    fit(EdgePreModel, given(EdgePreModel, steps=None, epochs=2))
    assert step(folder, EdgePreModel) == 2 * 3 * 4 / 2  # three images of four tiles, two a step


def test_a_training_starts_from_the_weights_it_is_given(given, folder, refused, tmp_path):
    torch.manual_seed(1)
    network, path = EdgeGenerator(4, 1), tmp_path / "given.pth"
    save_network(network, path)
    fit(EdgePreModel, given(EdgePreModel, steps=1, learning_rate=1e-9, init=path))
    trained = load_network(run_of(folder, EdgePreModel) / "latest.pth")
    for before, after in zip(network.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(before, after, atol=1e-3)
    assert "given.pth: holds EdgeGenerator" in refused(SRResNetModel, given(PreModel, init=path))


# The moving average ---------------------------------------------------------------------------


def zeros_and_ones():
    average, network = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    average.requires_grad_(False).weight.zero_()
    network.running_mean.fill_(5)
    return average, network


def test_the_average_soon_forgets_where_training_started():
    average, network = zeros_and_ones()
    for number in range(300):
        update_ema(average, network, number)
    assert average.weight.min() > 0.99
    assert average.running_mean.tolist() == pytest.approx([5] * 3, rel=1e-2)


def test_the_average_is_over_the_last_thousand_steps():
    average, network = zeros_and_ones()
    for number in range(50_000, 51_000):
        update_ema(average, network, number)
    assert average.weight.tolist() == pytest.approx([1 - 0.999**1000] * 3, rel=1e-3)


def test_vectors_of_spectral_norm_are_copied_not_averaged():
    torch.manual_seed(0)
    average, network = EdgeGenerator(4, 1).requires_grad_(False), EdgeGenerator(4, 1)
    update_ema(average, network, 50_000)
    copied, present = average.state_dict(), network.state_dict()
    assert torch.equal(copied["encoder.1.weight_u"], present["encoder.1.weight_u"])
    assert not torch.equal(copied["encoder.1.weight_orig"], present["encoder.1.weight_orig"])


# What is published ----------------------------------------------------------------------------


def test_better_weights_are_published_and_those_before_kept(given, folder):
    before = published(folder, EdgePreModel)
    fit(EdgePreModel, given(EdgePreModel, steps=40, checkpoint_every=20))
    run = run_of(folder, EdgePreModel)
    assert published(folder, EdgePreModel) == (run / "best.pth").read_bytes() != before
    (kept,) = run.glob("replaced-*.pth")
    assert kept.read_bytes() == before


def test_a_short_trial_takes_no_good_weights_place(given, folder, capsys):
    fit(EdgePreModel, given(EdgePreModel, steps=40, checkpoint_every=20))
    good = published(folder, EdgePreModel)
    fit(EdgePreModel, given(EdgePreModel, steps=1))
    assert published(folder, EdgePreModel) == good
    last = capsys.readouterr().out.splitlines()[-1]
    for path in (folder / "EdgeModel_gen.pth", run_of(folder, EdgePreModel, 2) / "best.pth"):
        assert str(path) in last


@pytest.mark.parametrize("every", [2, 500])
def test_ctrl_c_publishes_what_was_validated_since_the_start(given, folder, monkeypatch, every):
    before = published(folder, EdgePreModel)
    options = given(EdgePreModel, steps=100, checkpoint_every=every)
    interrupted_at(monkeypatch, EdgePreModel, 8, options)
    assert (published(folder, EdgePreModel) == before) is (every == 500)


@pytest.mark.parametrize("kind", [SRResNetModel, SRModel])  # the former without held-out images
def test_what_nothing_judges_is_published_when_complete(given, folder, monkeypatch, capsys, kind):
    shutil.copy(folder / "PreModel_gen.pth", folder / "SRModel_gen.pth")
    before, options = published(folder, kind), {"held_out": 4 * (kind is SRModel)}
    interrupted_at(monkeypatch, kind, 2, given(kind, **options, publish=True))
    assert published(folder, kind) == before
    fit(kind, given(kind, **options, resume=True))  # of its steps, not of the recipe's
    assert published(folder, kind) == before
    assert "--publish" in capsys.readouterr().out.splitlines()[-1]
    fit(kind, given(kind, **options, resume=True, publish=True))
    latest = (run_of(folder, kind) / "latest.pth").read_bytes()
    assert published(folder, kind) == latest != before
    shutil.copy(folder / "PreModel_gen.pth", folder / f"{kind.publishes}_gen.pth")
    monkeypatch.setattr(kind, "recipe", dataclasses.replace(kind.recipe, steps=4))
    fit(kind, given(kind, **options, resume=True))
    assert published(folder, kind) == latest


def test_weights_of_another_network_are_replaced_without_a_comparison(given, folder):
    shutil.copy(folder / "SRResNet_gen.pth", folder / "PreModel_gen.pth")
    fit(PreModel, given(PreModel, steps=1))
    assert type(load_network(folder / "PreModel_gen.pth")) is Generator
    (kept,) = run_of(folder, PreModel).glob("replaced-*.pth")
    assert type(load_network(kept)) is SRResNet


def test_an_adversarial_training_publishes_its_last_weights(given, folder, monkeypatch):
    """Whatever its metrics: none of them judges texture."""
    scores = iter([0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])  # of the weights before, and of each step
    monkeypatch.setattr(SRModel, "validate", lambda *_: {"SSIM": next(scores)})
    monkeypatch.setattr(SRModel, "reference", lambda *_: {"SSIM": 0.5})
    fit(SRModel, given(SRModel, checkpoint_every=2))
    run = run_of(folder, SRModel)
    assert published(folder, SRModel) == (run / "latest.pth").read_bytes()
    assert state(folder, SRModel)["progress"]["best_step"] == 4


def test_an_interrupted_adversarial_training_replaces_nothing(given, folder, monkeypatch):
    shutil.copy(folder / "PreModel_gen.pth", folder / "SRModel_gen.pth")
    before = published(folder, SRModel)
    interrupted_at(monkeypatch, SRModel, 8, given(SRModel, steps=100, checkpoint_every=2))
    assert published(folder, SRModel) == before
    assert state(folder, SRModel)["progress"]["best_step"] > 0


def test_half_a_step_is_not_saved(given, folder, refused, monkeypatch):
    """An error between the updates of two networks would leave weights that never were."""
    fit(SRModel, given(SRModel, steps=2))
    before = state(folder, SRModel)
    original, calls = torch.optim.Adam.step, []

    def step(self, *arguments):
        calls.append(self)
        if len(calls) == 2:  # the discriminator's, after the generator's
            raise OSError("injected")
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert "injected" in refused(SRModel, given(SRModel, steps=4, resume=True))
    assert_equal(state(folder, SRModel)["parts"], before["parts"])


def test_adversarial_edges_are_published_only_if_their_f1_is_higher(given, folder, monkeypatch):
    before = published(folder, EdgeModel)
    for scores, kept in (([0.9] + [0.8] * 9, True), ([0.5] + [0.8] * 9, False)):
        found = iter(scores)
        monkeypatch.setattr(
            EdgeModel,
            "validate",
            lambda *_, found=found: {"F1": next(found), "precision": 0, "recall": 0},
        )
        fit(EdgeModel, given(EdgeModel))
        assert (published(folder, EdgeModel) == before) is kept


def test_what_training_starts_from_is_not_its_result(given, folder, monkeypatch):
    scores = iter([0.9, 0.3, 0.2])
    monkeypatch.setattr(SRResNetModel, "validate", lambda *_: {"SSIM": next(scores)})
    monkeypatch.setattr(SRResNetModel, "reference", lambda *_: {"SSIM": 0.5})
    (folder / "SRResNet_gen.pth").unlink()
    fit(SRResNetModel, given(SRResNetModel, checkpoint_every=2))
    assert state(folder, SRResNetModel)["progress"]["best_step"] == 2
    assert (
        published(folder, SRResNetModel)
        == (run_of(folder, SRResNetModel) / "best.pth").read_bytes()
    )


def test_changed_settings_publish_nothing_worse(given, folder, monkeypatch):
    scores = iter([0.5, 0.1, 0.9, 0.9, 0.3])  # before, at steps 0 and 2; before, at step 4
    monkeypatch.setattr(SRResNetModel, "validate", lambda *_: {"SSIM": next(scores)})
    monkeypatch.setattr(SRResNetModel, "reference", lambda *_: {"SSIM": 0.5})
    fit(SRResNetModel, given(SRResNetModel, steps=2))
    good = published(folder, SRResNetModel)
    fit(SRResNetModel, given(SRResNetModel, resume=True, accept_changes=True, seed=1))
    assert published(folder, SRResNetModel) == good


# Stopping and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_a_step_never_waits_for_the_gpu(sliced, given, monkeypatch, kind):
    """As it would to send numbers there, or to fetch some."""
    stage = kind(kind.recipe, given(kind), CPU)
    batch = {key: CPU.send(value) for key, value in batch_of(sliced).items()}
    for name in ("new_tensor", "item", "tolist", "cpu", "numpy", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, never)
    monkeypatch.setattr(torch, "tensor", never)
    losses, _ = stage.loss_terms(batch)
    for terms in losses.values():
        sum(terms.values()).backward()


@pytest.mark.parametrize("kind", STAGES)
def test_killed_and_resumed_training_ends_as_if_left_alone(
    folder, given, monkeypatch, tmp_path, kind
):
    shutil.copytree(folder, tmp_path / "alone")
    every = 2 * kind.recipe.accumulate
    fit(kind, given(kind, ckpts=tmp_path / "alone", checkpoint_every=every))
    options = given(kind, checkpoint_every=every)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, kind, 4 * kind.recipe.accumulate - 1, kill)  # amid the fourth step
        fit(kind, options)
    assert step(folder, kind) == 2
    options.resume = True
    fit(kind, options)
    assert_same_training(folder, tmp_path / "alone", kind)


def wait_for(path, process):
    """Waits until a file is there that a launched training writes."""
    while not path.exists() and process.processes[0].is_alive():
        time.sleep(0.01)


def test_a_validation_cut_short_is_made_up_for(folder, given):
    fit(PreModel, given(PreModel))
    path, best = (run_of(folder, PreModel) / name for name in ("state.pth", "best.pth"))
    complete = load_file(path)
    assert complete["progress"]["validated"] == 4
    cut = {"validated": 0, "best": {}, "best_step": 0}
    save_file(complete | {"progress": complete["progress"] | cut}, path)
    fit(PreModel, given(PreModel, resume=True))
    assert load_file(path)["progress"]["validated"] == load_file(path)["progress"]["best_step"] == 4
    assert_equal(load_file(path)["parts"], complete["parts"])
    assert_equal(load_file(best), load_file(best.with_name("latest.pth")))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted_training_saves_and_says_how_to_go_on(folder, given, monkeypatch, capfd, name):
    number = getattr(signal, name, None) or pytest.skip(f"no {name} here")
    seen = []

    def interrupt():
        os.kill(os.getpid(), number)
        seen.append(capfd.readouterr().err)

    before = signal.signal(number, signal.SIG_DFL) if name == "SIGHUP" else None
    stop_at(monkeypatch, SRResNetModel, 7, interrupt)
    with pytest.raises(SystemExit) as ended:
        fit(SRResNetModel, given(SRResNetModel, steps=100))
    if before is not None:
        signal.signal(number, before)
    assert ended.value.code == 130 and "interrupt again to stop at once" in seen[0]
    printed = capfd.readouterr().err
    assert "saved at step 8" in printed and "--resume" in printed and "Traceback" not in printed
    assert step(folder, SRResNetModel) == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_stops_at_once_and_saves(folder, given, monkeypatch, capfd):
    def interrupt():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    stop_at(monkeypatch, SRResNetModel, 3, interrupt)
    with pytest.raises(SystemExit) as ended:
        fit(SRResNetModel, given(SRResNetModel, steps=100))
    assert ended.value.code == 130 and "saved at step 3" in capfd.readouterr().err
    assert step(folder, SRResNetModel) == 3


def test_ctrl_c_in_the_last_validation_ends_the_command_as_well(folder, given, monkeypatch):
    """Else it goes on with the next stage."""
    original = EdgePreModel.validate

    def validate(self, *arguments):
        if list(run_of(folder, EdgePreModel).glob("state.pth")):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(EdgePreModel, "validate", validate)
    with pytest.raises(SystemExit) as ended:
        fit(EdgePreModel, given(EdgePreModel))
    assert ended.value.code == 130
    best = run_of(folder, EdgePreModel) / "best.pth"
    assert published(folder, EdgePreModel) == best.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_nohup_is_respected(folder, given, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, EdgePreModel, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        fit(EdgePreModel, given(EdgePreModel))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert step(folder, EdgePreModel) == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_with_processes_that_load_data(folder, given, tmp_path):
    options = given(SRResNetModel, steps=10_000, checkpoint_every=1, workers=1)
    process = Launched(tmp_path / "log", fit, SRResNetModel, options)
    wait_for(run_of(folder, SRResNetModel) / "state.pth", process)
    os.kill(process.processes[0].pid, signal.SIGINT)
    statuses, printed = process.wait()
    assert statuses == [130] and "Traceback" not in printed
    assert f"saved at step {step(folder, SRResNetModel)}" in printed


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to ignore")
def test_sigterm_to_all_processes_as_batch_systems_send_it(folder, given, monkeypatch, capfd):
    def interrupt():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            process.join(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    stop_at(monkeypatch, SRResNetModel, 3, interrupt)
    with pytest.raises(SystemExit) as ended:
        fit(SRResNetModel, given(SRResNetModel, steps=100, workers=1))
    assert ended.value.code == 130 and "saved at step 4" in capfd.readouterr().err


def test_resuming_what_is_not_there_starts_from_scratch_and_says_so(folder, given, capsys):
    fit(EdgePreModel, given(EdgePreModel, steps=1, resume=True))
    assert "no run to continue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "crops per step 2 -> 3"),
        ({"crop": 12}, "crops [16, 16] -> [12, 12]"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"learning_rate": 1e-3}, "learning rate 0.0004 -> 0.001"),
        ({"held_out": 0}, "held-out images"),
    ],
)
def test_resuming_with_other_settings_is_refused(folder, given, refused, change, named):
    fit(SRResNetModel, given(SRResNetModel, steps=2))
    path = run_of(folder, SRResNetModel) / "state.pth"
    before, options = path.read_bytes(), given(SRResNetModel, resume=True, **change)
    line = refused(SRResNetModel, options)
    assert named in line and "--accept-changes" in line and str(path) in line
    assert path.read_bytes() == before
    options.accept_changes = True
    fit(SRResNetModel, options)
    assert step(folder, SRResNetModel) == 4
    options.accept_changes = False
    fit(SRResNetModel, options)  # now this is what it was trained with


def test_resuming_with_another_edge_generator_or_precision_is_refused(folder, given, refused):
    fit(PreModel, given(PreModel, steps=1), "fp32")
    line = refused(PreModel, given(PreModel, resume=True), "bf16")
    assert "precision float32 -> bfloat16" in line
    save_network(EdgeGenerator(4, 2), folder / "EdgeModel_gen.pth")
    assert "EdgeModel_gen.pth" in refused(PreModel, given(PreModel, resume=True), "fp32")


def test_best_compares_like_with_like_only(folder, given):
    fit(SRResNetModel, given(SRResNetModel, steps=2))
    path = run_of(folder, SRResNetModel) / "state.pth"
    content = load_file(path)
    best = content["progress"]["best"] | {"SSIM": 2.0}  # beyond reach
    save_file(content | {"progress": content["progress"] | {"best": best}}, path)
    options = given(SRResNetModel, resume=True)
    fit(SRResNetModel, options)
    assert load_file(path)["progress"]["best"]["SSIM"] == 2
    options.seed, options.accept_changes, options.steps = 1, True, 5
    fit(SRResNetModel, options)
    assert load_file(path)["progress"]["best"]["SSIM"] < 1


def test_more_steps_are_said_and_fewer_refused(folder, given, refused, capsys):
    fit(SRResNetModel, given(SRResNetModel))
    fit(SRResNetModel, given(SRResNetModel, steps=6, resume=True))
    assert "step 4 with steps 4 -> 6" in capsys.readouterr().out
    line = refused(SRResNetModel, given(SRResNetModel, steps=3, resume=True))
    assert "step 6" in line and "--steps" in line
    assert step(folder, SRResNetModel) == 6


def not_finite(content):
    content["parts"]["gen"]["conv1.weight"][0, 0, 0, 0] = math.nan
    return content


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda good: {"step": 9, "gen": {}}, "not the state"),
        (lambda good: good | {"parts": good["parts"] | {"gen": {}}}, "does not fit"),
        (not_finite, "not finite"),
        (None, "damaged"),
    ],
    ids=["other", "foreign", "nan", "cut"],
)
def test_states_that_cannot_be_resumed_are_refused_in_one_line(
    folder, given, refused, spoil, words
):
    fit(SRResNetModel, given(SRResNetModel))
    path, weights = run_of(folder, SRResNetModel) / "state.pth", published(folder, SRResNetModel)
    if spoil:
        save_file(spoil(load_file(path)), path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    line = refused(SRResNetModel, given(SRResNetModel, resume=True, steps=9))
    assert str(path) in line and words in line and len(line) < 500
    assert published(folder, SRResNetModel) == weights


def test_a_new_training_leaves_earlier_ones_alone(folder, given):
    fit(EdgePreModel, given(EdgePreModel))
    before = {path: path.read_bytes() for path in run_of(folder, EdgePreModel).rglob("*.*")}
    fit(EdgePreModel, given(EdgePreModel, seed=1))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert step(folder, EdgePreModel, 2) == 4
    fit(EdgePreModel, given(EdgePreModel, seed=1, steps=5, resume=True))
    assert step(folder, EdgePreModel, 1) == 4 and step(folder, EdgePreModel, 2) == 5


def test_trainings_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        options = Namespace(runs=tmp_path, ckpts=tmp_path, resume=False, init=None)
        made = list(pool.map(lambda _: checkpoints.begin(SRResNetModel, options, {}), range(40)))
    folders = {folder for folder, *_ in made}
    assert len(folders) == 40 and all(path.is_dir() for path in folders)


def test_resumed_curves_go_on_in_the_same_chart(folder, given):
    fit(SRResNetModel, given(SRResNetModel, steps=2, checkpoint_every=1))
    fit(SRResNetModel, given(SRResNetModel, steps=4, checkpoint_every=1, resume=True))
    assert [path.name for path in run_of(folder, SRResNetModel).parent.iterdir()] == ["1"]
    curve = scalars(run_of(folder, SRResNetModel))["validation/PSNR"]
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]


def test_a_later_stage_is_not_continued_from_weights_that_are_new(folder, given, capsys):
    for kind in (SRResNetModel, SRGANModel):
        fit(kind, given(kind, steps=2))
    fit(SRResNetModel, given(SRResNetModel, steps=40, checkpoint_every=20, resume=True))
    fit(SRGANModel, given(SRGANModel, steps=3, resume=True))
    assert "SRResNet_gen.pth has changed" in capsys.readouterr().out
    assert step(folder, SRGANModel) == 2 and step(folder, SRGANModel, 2) == 3
    fit(SRGANModel, given(SRGANModel, steps=4, resume=True))
    assert step(folder, SRGANModel, 2) == 4


def test_changed_optimiser_settings_are_applied_on_resuming(folder, given, monkeypatch):
    fit(PreModel, given(PreModel, steps=1))
    changed = dataclasses.replace(PreModel.recipe, betas=(0.5, 0.6), trunk_rate=0.25)
    monkeypatch.setattr(PreModel, "recipe", changed)
    fit(PreModel, given(PreModel, steps=2, resume=True, accept_changes=True))
    groups = state(folder, PreModel)["parts"]["gen adam"]["param_groups"]
    assert [group["factor"] for group in groups] == [1, 0.25]
    assert all(list(group["betas"]) == [0.5, 0.6] for group in groups)


def test_moments_are_restored_into_the_layout_of_the_weights():
    """Where it is fused, Adam takes numbers in the order in which they lie in memory."""

    def resumed(before):
        """Returns weights after two steps, with another Adam and in channels-last for the other."""
        torch.manual_seed(0)
        network, state = torch.nn.Conv2d(3, 4, 3), {}
        for layout in (before, torch.channels_last):
            network = network.to(memory_format=layout)
            group = {"params": network.parameters(), "factor": 1}
            adam = torch.optim.Adam([group], lr=0.1, fused=True)
            if state:
                checkpoints.restore({"adam": adam}, state, None)
            adam.zero_grad()
            network(torch.rand(2, 3, 5, 5)).square().sum().backward()
            adam.step()
            state = {"parts": {"adam": adam.state_dict()}}
        return network.weight

    ours, other = map(resumed, (torch.channels_last, torch.contiguous_format))
    assert torch.allclose(ours, other, atol=1e-4)


# What goes wrong ------------------------------------------------------------------------------


def broken(monkeypatch, where, name, after, error):
    """Has a function raise an error at its call number `after`, from 0, once."""
    original, calls = getattr(where, name), []

    def fail(*arguments, **options):
        calls.append(name)
        if len(calls) == after + 1:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(where, name, fail)


IO = OSError(errno.EIO, os.strerror(errno.EIO))
FAULTS = {  # what fails, at which call, how: between the second step and the fourth
    "renaming": (files, "_rename", 2, IO),
    "flushing": (os, "fsync", 3, IO),
    "writing": (torch, "save", 2, IO),
    "loading": (PairedTiles, "crop", 5, IO),
    "memory": (SRResNetModel, "loss_terms", 2, torch.OutOfMemoryError("CUDA out of memory.")),
    "ours": (SRResNetModel, "loss_terms", 2, RuntimeError("a defect")),
    "held-out image": (SRResNetModel, "validate", 2, ImageError("a.png: not readable")),
    "samples": (SRResNetModel, "samples", 1, OSError("no")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_training_is_saved(folder, given, monkeypatch, capsys, fault):
    broken(monkeypatch, *FAULTS[fault])
    options = given(SRResNetModel, checkpoint_every=2)
    with pytest.raises(RuntimeError if fault == "ours" else SystemExit):
        fit(SRResNetModel, options)
    printed = capsys.readouterr().err
    assert re.search(r"SRResNet/1: saved at step [23]; continue with --resume", printed), printed
    assert step(folder, SRResNetModel) >= 2
    assert ("--batch-size" in printed) is (fault == "memory")
    options.resume = True
    fit(SRResNetModel, options)
    assert step(folder, SRResNetModel) == 4


def test_a_full_disk_is_named_and_nothing_half_written_left(folder, given, refused, monkeypatch):
    before = published(folder, EdgePreModel)

    def fail(_, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    line = refused(EdgePreModel, given(EdgePreModel, held_out=0))
    assert line.startswith(f"{run_of(folder, EdgePreModel)}: No space left on device; free some")
    assert published(folder, EdgePreModel) == before and not list(folder.rglob(".*"))


@pytest.mark.parametrize("method", ["add_scalar", "add_text", "add_image", "close", "__init__"])
def test_a_broken_log_costs_the_curves_alone(folder, given, monkeypatch, capsys, method):
    def fail(*_, **__):
        raise IO

    monkeypatch.setattr(training.SummaryWriter, method, fail)
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    fit(SRResNetModel, given(SRResNetModel, checkpoint_every=1))
    assert step(folder, SRResNetModel) == 4
    warnings = [line for line in capsys.readouterr().err.splitlines() if "curves" in line]
    assert len(warnings) == 1


def test_a_folder_that_vanishes_is_made_again(folder, given, monkeypatch):
    # Moved, not removed file by file, while the curves' thread makes more of them.
    stop_at(monkeypatch, SRResNetModel, 2, lambda: (folder / "runs").rename(folder / "away"))
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    fit(SRResNetModel, given(SRResNetModel, checkpoint_every=3))
    assert step(folder, SRResNetModel) == 4


def fit_after_opencv(*arguments):
    """Trains in a process in which OpenCV has used all of its threads, as testing may."""
    cv2.GaussianBlur(np.zeros((4000, 4000, 3), np.uint8), (9, 9), 2)
    fit(*arguments)


def test_loading_processes_start_where_opencv_has_worked(given, tmp_path):
    options = given(EdgePreModel, steps=1, workers=1)
    training = Launched(tmp_path / "log", fit_after_opencv, EdgePreModel, options)
    statuses, printed = training.wait(timeout=60)
    assert statuses == [0], printed


def test_loading_processes_that_cannot_work_are_done_without(folder, given, refused, monkeypatch):
    for error in (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        RuntimeError("Caught RuntimeError in DataLoader\n  Traceback\nunable to allocate shm"),
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    ):
        broken(monkeypatch, training, "DataLoader", 0, error)
        assert "--workers 0" in refused(SRResNetModel, given(SRResNetModel, workers=1))


@pytest.mark.parametrize("every", [1, 500])
def test_diverged_training_stops_and_keeps_the_last_good_files(folder, given, refused, every):
    fit(SRResNetModel, given(SRResNetModel, steps=2, checkpoint_every=every))
    paths = [run_of(folder, SRResNetModel) / f"{name}.pth" for name in ("state", "latest", "best")]
    before = [path.read_bytes() for path in paths]
    wild = {"learning_rate": 1e30, "resume": True, "accept_changes": True, "steps": 100}
    line = refused(SRResNetModel, given(SRResNetModel, checkpoint_every=every, **wild))
    assert 2 < int(re.search(r"step (\d+)", line)[1]) <= 22
    assert "--learning-rate" in line and str(paths[0].parent) in line
    assert all(weights.is_finite(load_file(path)) for path in paths)
    if every == 500:
        assert [path.read_bytes() for path in paths[:2]] == before[:2]


def test_loss_that_is_not_finite_in_one_batch_stops_the_training(
    folder, given, refused, monkeypatch
):
    original, count = SRModel.loss_terms, itertools.count()

    def loss_terms(self, batch):
        terms, scalars = original(self, batch)
        if next(count) == 4:
            terms["dis"]["cross-entropy"] = terms["dis"]["cross-entropy"] * math.nan
        return terms, scalars

    monkeypatch.setattr(SRModel, "loss_terms", loss_terms)
    monkeypatch.setattr(training, "LOG_EVERY", 4)
    line = refused(SRModel, given(SRModel, steps=100))
    assert "SRModel: not finite at step 4" in line
    assert not (run_of(folder, SRModel) / "state.pth").exists()


def spoil_one_tile(sliced, root, batch, part=slice(None)):
    """Copies a root and damages a tile that batch number `batch` is the first to need.

    Returns the tile and a function that mends it.
    """
    shutil.copytree(sliced, root)
    ids, _ = split(root, 4)
    pairs = PairedTiles(root, ids, 16).pairs
    drawn = list(itertools.islice(draw_batches(len(pairs), 2, (16, 16), 0), batch + 1))
    early = {draw.tile for draws in drawn[:-1] for draw in draws}
    tile = next(draw.tile for draw in drawn[-1][part] if draw.tile not in early)
    path = pairs[tile][0]
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    return path, lambda: path.write_bytes(good)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_tile_met_while_accumulating_loses_nothing(
    sliced, folder, given, tmp_path, workers
):
    tile, mend = spoil_one_tile(sliced, tmp_path / "root", batch=3)  # the second of two
    shutil.copytree(folder, tmp_path / "alone")
    fit(SRModel, given(SRModel, ckpts=tmp_path / "alone", steps=3))
    options = given(SRModel, root=tmp_path / "root", steps=3, workers=workers)
    statuses, printed = Launched(tmp_path / "log", fit_from_disk, SRModel, options).wait()
    assert statuses == [1] and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"{tile}: ") and step(folder, SRModel) == 1
    mend()
    options.resume = True
    fit(SRModel, options)
    assert_same_training(folder, tmp_path / "alone", SRModel)


def test_damaged_tile_is_found_before_the_first_step(sliced, given, refused, tmp_path):
    tile, _ = spoil_one_tile(sliced, tmp_path / "root", batch=1)
    assert refused(SRModel, given(SRModel, root=tmp_path / "root")).startswith(f"{tile}: ")


@pytest.mark.parametrize("name", ["ckpts", "runs"])
def test_folder_that_cannot_be_written_to_is_found_before_the_first_step(
    given, refused, monkeypatch, tmp_path, name
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(EdgePreModel, "loss_terms", never)
    options = given(EdgePreModel)
    setattr(options, name, tmp_path / "file")
    assert str(tmp_path / "file") in refused(EdgePreModel, options)


# Several processes ----------------------------------------------------------------------------


def test_damaged_tile_met_by_the_second_process_stops_both(sliced, folder, given, tmp_path):
    tile, mend = spoil_one_tile(sliced, tmp_path / "root", batch=3, part=slice(1, 2))
    options = given(SRModel, root=tmp_path / "root", steps=2, batch_size=1)
    launched = Launched(tmp_path / "log", fit_from_disk, SRModel, options, processes=2)
    statuses, printed = launched.wait(60)
    assert all(statuses) and 1 in statuses and "Traceback" not in printed
    assert len([line for line in printed.splitlines() if tile.name in line]) == 1
    assert printed.count("SRModel/1: saved at step 1; continue with --resume") == 1
    mend()
    options.resume, options.batch_size = True, 2
    fit(SRModel, options)  # in one process, twice as large a batch
    assert step(folder, SRModel) == 2


def slow_second_process(*arguments):
    """Trains in a process whose clock, in the second, is an hour ahead by turns."""
    if os.environ["RANK"] == "1":
        clock, hours = time.monotonic, itertools.cycle([0, 3600])
        training.time = SimpleNamespace(monotonic=lambda: clock() + next(hours))
    fit(*arguments)


def test_processes_agree_on_when_a_checkpoint_is_due(given, tmp_path):
    options = given(SRResNetModel, steps=8, held_out=0)
    launched = Launched(tmp_path / "log", slow_second_process, SRResNetModel, options, processes=2)
    statuses, printed = launched.wait(60)
    assert statuses == [0, 0], printed


def fit_by_rank(kind, options):
    """Trains with a folder of checkpoints that only the first process has."""
    options.ckpts = options.ckpts / os.environ["RANK"]
    fit(kind, options)


def test_first_process_reads_and_writes_for_all_and_speaks_for_them(folder, given, tmp_path):
    shutil.copytree(folder, tmp_path / "0")

    def train(**changes):
        values = {"ckpts": tmp_path, "steps": 2, "batch_size": 1} | changes
        options = given(SRModel, **values)
        launched = Launched(tmp_path / "log", fit_by_rank, SRModel, options, processes=2)
        return launched.wait()

    statuses, printed = train()
    assert statuses == [0, 0], printed
    assert not (tmp_path / "1").exists() and step(tmp_path, SRModel) == 2
    assert values(scalars(run_of(tmp_path, SRModel))["validation/SSIM"])
    statuses, printed = train(resume=True, batch_size=2)
    assert statuses == [1, 1] and printed.count("different settings") == 1
    statuses, printed = train(learning_rate=1e30, steps=60)
    assert statuses == [1, 1] and printed.count("not finite at step") == 1
    statuses, printed = train(root=tmp_path)
    assert statuses == [1, 1] and printed.count(": no tiles; ") == 1


def batch_of(sliced):
    """Four crops, of which a process each has two, as a batch."""
    ids, _ = split(sliced, 0)
    dataset = PairedTiles(sliced, ids, 16, edges=("lr", "hr"))
    items = [dataset[draw] for draw in next(iter(draw_batches(len(dataset), 4, (16, 16), 0)))]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def gradients(options, root, device):
    """All networks' gradients of one batch, averaged over the processes, each in one vector."""
    # the first half of each process's crops is given true edges: so each gets one of them
    mine = {key: value[device.rank :: device.world] for key, value in batch_of(root).items()}
    found = {}
    for kind in (EdgeModel, PreModel, SRModel):
        torch.manual_seed(3)
        stage = kind(kind.recipe, options, device)
        losses, _ = stage.loss_terms({key: device.send(value) for key, value in mine.items()})
        for terms in losses.values():
            sum(terms.values()).backward()
        device.average_gradients(stage.networks.values())
        for key, network in stage.networks.items():
            grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            found[f"{kind.__name__} {key}"] = torch.cat(grads)
    return found


def write_gradients(options, root, path):
    """What each of two processes does."""
    os.sched_getaffinity = lambda _: range(8)
    device = open_device("cpu", "fp32", training=True)
    found = gradients(options, root, device)
    threads = torch.get_num_threads()
    torch.save({"gradients": found, "threads": threads}, f"{path}.{device.rank}")


def test_two_processes_compute_the_gradient_of_the_doubled_batch(sliced, given, tmp_path):
    options = given(PreModel)
    arguments = (write_gradients, options, sliced, tmp_path / "gradients")
    statuses, printed = Launched(tmp_path / "log", *arguments, processes=2).wait()
    assert statuses == [0, 0], printed
    both = [load_file(tmp_path / f"gradients.{rank}") for rank in range(2)]
    assert_equal(both[0]["gradients"], both[1]["gradients"])
    assert both[0]["threads"] == 4  # of eight processors
    alone = gradients(options, sliced, CPU)
    for key, two in both[0]["gradients"].items():
        assert alone[key].norm() > 0 and (alone[key] - two).norm() < 1e-3 * alone[key].norm(), key
