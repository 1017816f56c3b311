import dataclasses
import errno
import itertools
import math
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, Launched, command, photograph, run, save, shrunk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import device
import images
import main
import slice_images_w_overlapping
import training
from dataset import CropSampler, PairedTiles, split
from device import Device, open_device
from images import ImageError, canny, read_image
from inference import Enlarger
from models import (
    EdgeGenerator,
    Generator,
    SRResNet,
    load_file,
    load_network,
    save_file,
    save_network,
)
from stages import (
    EdgeModel,
    EdgePreModel,
    EdgeStageModel,
    PreModel,
    Recipe,
    SRModel,
    SRResNetModel,
    cosine,
    halving,
)
from tiles import HR, LR, SCALE, TEST, TILES, TRAINING
from training import update_ema

STAGES = {  # the command that trains them, and the steps between which tests stop them
    EdgePreModel: "train_edges",
    EdgeModel: "train_edges",
    SRResNetModel: "pretrain",
    EdgeStageModel: "pretrain",
    PreModel: "pretrain",
    SRModel: "train",
}
GENERATORS = ("EdgePreModel", "EdgeModel", "SRResNet", "EdgeStageModel", "PreModel", "SRModel")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Has all trainings compute alike, and not wait for other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """A folder with a tiny network for every stage to start from."""
    shutil.copytree(ckpts, tmp_path / "ckpts")
    shutil.copy(ckpts / "EdgeModel_gen.pth", tmp_path / "ckpts" / "EdgePreModel_gen.pth")
    return tmp_path / "ckpts"


@pytest.fixture
def options(sliced, vgg, ckpts):
    """A function that returns a command line; options that come later win."""

    def given(name, folder, *more):
        fixed = [name, "--root", sliced, "--ckpts", folder, "--runs", folder / "runs"]
        fixed += ["--vgg", vgg, "--workers", 0, "--batch-size", 2, "--crop", 16]
        fixed += [] if "--epochs" in more else ["--steps", 4]
        first = {"train_edges": "EdgeModel", "pretrain": "SRResNet"}.get(name)
        stage = more[more.index("--stage") + 1] if "--stage" in more else first
        if first and stage in (first, "EdgePreModel"):
            fixed += ["--init", ckpts / f"{first}_gen.pth"]
        return [*fixed, *more]

    return given


@pytest.fixture
def refused(capsys):
    """A function that runs a command line, which must end with 1, and returns its only line."""

    def given(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command(*arguments)
        printed = capsys.readouterr().err
        assert ended.value.code == 1 and "Traceback" not in printed
        return printed.splitlines()[-1]

    return given


class Killed(BaseException):
    """What a killed process does: nothing more."""


def stop_at(monkeypatch, kind, number, action):
    """Has a stage call `action` before its batch number `number`, from 0, once."""
    original, seen = kind.losses, []

    def losses(self, batch):
        seen.append(batch)
        if type(self) is kind and len(seen) == number + 1:
            action()
        return original(self, batch)

    monkeypatch.setattr(kind, "losses", losses)


def kill():
    raise Killed


def state(folder, kind):
    """A stage's state, but for the number of its run, which every start anew raises."""
    content = load_file(folder / f"{kind.name}.state.pth")
    del content["progress"]["run"]
    return content


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
        assert_equal(state(folder, kind), state(other, kind))
        for ending in ("gen", "gen_best"):
            name = f"{kind.name}_{ending}.pth"
            assert_equal(load_file(folder / name), load_file(other / name))


def events(folder, run="1"):
    return EventAccumulator(str(folder / run), size_guidance={"tensors": 0}).Reload()


def scalars(folder, run="1"):
    """{tag: [(step, value), ...]} of a run."""
    found = events(folder, run)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def values(curve):
    return [value for _, value in curve]


# What the trainings do ------------------------------------------------------------------------


def test_schedules():
    recipe = Recipe(steps=10_000, crops=(16, 31), accumulate=2)
    steps = (0, 124_999, 125_000, 250_000)  # of two batches
    assert [halving(step, recipe) for step in steps] == [1, 1, 0.5, 0.25]
    assert cosine(0, recipe) == pytest.approx(1 / 200)
    assert max(cosine(step, recipe) for step in range(10_000)) == pytest.approx(1, abs=0.01)
    assert cosine(10_000, recipe) == pytest.approx(0.02)
    short = Recipe(steps=40, crops=(16, 16))
    assert math.isclose(cosine(5, short), 0.51 + 0.49 * math.cos(math.pi / 8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sliced, vgg, ckpts):
    """A folder of checkpoints after all six stages; what they started from lies in `before`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(ckpts, folder / "before")
    for name in ("EdgeModel", "SRResNet"):
        shutil.copy(ckpts / f"{name}_gen.pth", folder)
    fixed = ["--root", sliced, "--ckpts", folder, "--runs", folder / "runs", "--vgg", vgg]
    fixed += ["--workers", 0, "--batch-size", 2, "--crop", 16]
    long = [*fixed, "--steps", 40, "--checkpoint-every", 20]
    command("train_edges", *long, "--init", ckpts / "EdgeModel_gen.pth")
    command("pretrain", *long, "--init", ckpts / "SRResNet_gen.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_EVERY", 4)
        command("train", *fixed, "--steps", 8, "--checkpoint-every", 16)
    return folder


def test_edges_are_learnt(trained, sliced):
    curve = values(scalars(trained / "runs" / "EdgePreModel")["loss gen/cross-entropy"])
    assert curve[-1] < curve[0]
    lr = read_image(next((sliced / TEST / LR).glob("*.png")))
    true = canny(read_image(next((sliced / TEST / HR).glob("*.png"))))
    untrained, learnt = (
        np.abs(Enlarger(None, load_network(path), CPU).predict_edges(lr) / 255 - true / 255).mean()
        for path in (trained / "before" / "EdgeModel_gen.pth", trained / "EdgePreModel_gen.pth")
    )
    assert learnt < 0.95 * untrained


def test_images_are_learnt(trained):
    trunk, whole = (scalars(trained / "runs" / name) for name in ("SRResNet", "PreModel"))
    assert values(trunk["loss gen/mse"])[-1] < values(trunk["loss gen/mse"])[0]
    psnr = values(trunk["validation/PSNR"])
    assert values(whole["validation/PSNR"])[-1] > psnr[-1] > psnr[0]


def test_curves_begin_with_what_training_starts_from(trained, sliced):
    for name in GENERATORS:
        key = "F1" if name in ("EdgePreModel", "EdgeModel") else "SSIM"
        curve = scalars(trained / "runs" / name)[f"validation/{key}"]
        assert [step for step, _ in curve] == ([0, 8] if name == "SRModel" else [0, 20, 40])
    _, held_out = split(sliced, 4)
    assert len(held_out) == 1
    lr, hr = map(read_image, next(iter(held_out.values())))
    network = load_network(trained / "before" / "SRResNet_gen.pth")
    sr = Enlarger(network, None, CPU)(lr).astype(float)
    l1 = np.abs(sr - hr).mean() / 127.5
    step, value = scalars(trained / "runs" / "SRResNet")["validation/L1"][0]
    assert (step, value) == (0, pytest.approx(l1, rel=1e-3))


def test_metrics_to_beat_are_a_flat_line_in_the_same_chart(trained):
    for name in GENERATORS:
        ours = scalars(trained / "runs" / name)
        flat = scalars(trained / "runs" / name / "1", "reference")
        assert flat and flat.keys() <= ours.keys()
        for key, curve in flat.items():
            assert len(set(values(curve))) == 1
            assert [step for step, _ in curve] == [step for step, _ in ours[key]]


def test_metrics_to_beat_are_computed_once(folder, options, monkeypatch):
    original, seen = SRResNetModel.reference, []

    def reference(self, lr, hr):
        seen.append(hr)
        return original(self, lr, hr)

    monkeypatch.setattr(SRResNetModel, "reference", reference)
    more = ["--stage", "SRResNet", "--checkpoint-every", 1, "--held-out", 1]
    command(*options("pretrain", folder, *more, "--steps", 3))
    assert len(seen) == 1


def test_losses_of_both_networks_and_what_else_is_watched_are_logged(trained):
    terms = {
        "EdgePreModel": {"loss gen/cross-entropy", "edges/precision", "edges/recall"},
        "EdgeModel": {
            *("loss gen/adversarial", "loss gen/feature matching", "loss dis/hinge"),
            *("loss dis/sum", "discriminator/hr", "discriminator/sr", "edges/recall"),
        },
        "SRResNet": {"loss gen/mse", "validation/PSNR", "validation/L1"},
        "EdgeStageModel": {"loss gen/mse", "validation/SSIM"},
        "PreModel": {"loss gen/mse", "validation/PSNR true edges"},
        "SRModel": {
            *(f"loss gen/{term}" for term in ("l1", "perceptual", "ssim", "adversarial")),
            *("loss dis/cross-entropy", "loss dis/sum", "discriminator/hr", "discriminator/sr"),
            *("SSIM", "validation/SSIM", "validation/SSIM true edges"),
        },
    }
    common = {"loss gen/sum", "speed/crops per second", "learning rate", "validation/best so far"}
    for name, expected in terms.items():
        seen = scalars(trained / "runs" / name)
        assert expected | common <= seen.keys()
        sums = [v for k, v in seen.items() if k.startswith("loss gen/") and not k.endswith("/sum")]
        total = sum(np.array(values(curve)) for curve in sums)
        assert total == pytest.approx(np.array(values(seen["loss gen/sum"])), rel=1e-4)


def test_recipe_is_recorded(trained):
    text = events(trained / "runs" / "SRModel").Tensors("settings/text_summary")
    assert b"learning_rate | 0.0001 |" in text[0].tensor_proto.string_val[0]
    assert b"seed | 0 |" in text[0].tensor_proto.string_val[0]


def test_held_out_crops_can_be_watched(sliced, folder, options, monkeypatch):
    monkeypatch.setattr(training, "GRID_EVERY", 2)
    command(*options("train", folder))
    command(*options("train_edges", folder, "--held-out", 0, "--stage", "EdgePreModel"))
    seen = events(folder / "runs" / "SRModel")
    titles = ["LR, generated, HR", "edges of LR, predicted, of HR"]
    assert sorted(seen.Tags()["images"]) == titles
    images = seen.Images(titles[0])
    assert [image.step for image in images] == [1, 2, 3, 4]  # of two batches
    side = SCALE * training.SAMPLE_SIDE
    assert (images[0].width, images[0].height) == (3 * side + 8, side + 4)  # at 100 %
    without = events(folder / "runs" / "EdgePreModel")  # then of the batch
    assert without.Tags()["images"] == titles[1:]


def test_each_stage_writes_its_files_and_no_others(trained):
    names = {path.name for path in trained.glob("*.pth")} - {"EdgeModel_gen.1.previous.pth"}
    names -= {"SRResNet_gen.1.previous.pth"}
    endings = ("_gen.pth", "_gen_best.pth", ".state.pth")
    assert names == {f"{name}{ending}" for name in GENERATORS for ending in endings}
    assert load_network(trained / "EdgeModel_gen.pth").arguments == {"width": 4, "blocks": 1}
    assert not list(trained.glob(".*"))


def test_edge_stage_learns_with_the_lr_stage_frozen(trained):
    before, after = (
        load_network(trained / f"{name}_gen.pth").state_dict()
        for name in ("SRResNet", "EdgeStageModel")
    )
    inside = ("conv1.", "residual_blocks.", "conv2.", "bn2.", "upsample")
    frozen = [key for key in before if key.startswith(inside)]
    assert len(frozen) > 20
    for key in frozen:
        assert torch.equal(before[key], after[key])
    start = Generator.from_trunk(load_network(trained / "SRResNet_gen.pth")).state_dict()
    assert not torch.equal(after["conv3.weight"], start["conv3.weight"])


def test_batch_norm_keeps_its_statistics_in_the_last_stage_only(trained):
    start, before, after = (
        load_network(trained / f"{name}_gen.pth").state_dict()
        for name in ("EdgeStageModel", "PreModel", "SRModel")
    )
    for key in ("residual_blocks.0.bn1", "bn4"):
        assert torch.equal(after[f"{key}.running_mean"], before[f"{key}.running_mean"])
        assert not torch.equal(start[f"{key}.running_mean"], before[f"{key}.running_mean"])
        assert not torch.equal(after[f"{key}.weight"], before[f"{key}.weight"])


@pytest.mark.parametrize(("share", "true"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_part_of_a_batch_is_given_the_edges_of_the_ground_truth(folder, options, share, true):
    given = main.parse_options(list(map(str, options("pretrain", folder))))
    given.init = None
    recipe = Recipe(steps=1, crops=(16, 16), true_edges=share)
    stage = PreModel(recipe, given, CPU)
    torch.manual_seed(0)
    batch = {
        "lr": torch.rand(4, 3, 16, 16),
        "lr_edges": torch.rand(4, 1, 16, 16).round(),
        "hr_edges": torch.rand(4, 1, 64, 64).round(),
    }
    edges = stage.hr_edges(batch)
    same = [torch.equal(a, b) for a, b in zip(edges, batch["hr_edges"], strict=True)]
    assert same == [True] * true + [False] * (4 - true)


def test_epochs_count_passes_over_the_tiles(folder, options):
    command(*options("train_edges", folder, "--epochs", 2, "--stage", "EdgePreModel"))
    # three images of four tiles, two crops a step
    assert state(folder, EdgePreModel)["progress"]["step"] == 2 * 3 * 4 / 2


def test_a_training_starts_from_the_weights_it_is_given(folder, options, refused, tmp_path):
    torch.manual_seed(1)
    given = EdgeGenerator(4, 1)
    save_network(given, tmp_path / "given.pth")
    more = ["--steps", 1, "--learning-rate", 1e-9, "--init", tmp_path / "given.pth"]
    command(*options("train_edges", folder, *more))
    for name in ("EdgePreModel", "EdgeModel"):  # the second from the file of the first
        trained = load_network(folder / f"{name}_gen.pth")
        for before, after in zip(given.parameters(), trained.parameters(), strict=True):
            assert torch.allclose(before, after, atol=1e-3)
    assert "given.pth: holds EdgeGenerator" in refused(*options("pretrain", folder, *more))


def test_one_stage_alone(folder, options, refused):
    command(*options("pretrain", folder, "--stage", "PreModel", "--steps", 1))
    assert not (folder / "SRResNet.state.pth").exists()
    assert state(folder, PreModel)["progress"]["step"] == 1
    line = refused(*options("train", folder, "--stage", "PreModel"))
    assert "--stage PreModel" in line and "SRModel" in line


# The moving average ---------------------------------------------------------------------------


def zeros_and_ones():
    average, network = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    average.requires_grad_(False).weight.zero_()
    network.running_mean.fill_(5)
    return average, network


def test_the_average_soon_forgets_where_training_started():
    average, network = zeros_and_ones()
    for step in range(300):
        update_ema(average, network, step)
    assert average.weight.min() > 0.99
    assert average.running_mean.tolist() == pytest.approx([5] * 3, rel=1e-2)


def test_the_average_is_over_the_last_thousand_steps():
    average, network = zeros_and_ones()
    for step in range(50_000, 51_000):
        update_ema(average, network, step)
    assert average.weight.tolist() == pytest.approx([1 - 0.999**1000] * 3, rel=1e-3)


def test_vectors_of_spectral_norm_are_copied_not_averaged():
    torch.manual_seed(0)
    average, network = EdgeGenerator(4, 1).requires_grad_(False), EdgeGenerator(4, 1)
    update_ema(average, network, 50_000)
    copied, present = average.state_dict(), network.state_dict()
    assert torch.equal(copied["encoder.1.weight_u"], present["encoder.1.weight_u"])
    assert not torch.equal(copied["encoder.1.weight_orig"], present["encoder.1.weight_orig"])


# Stopping and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_killed_and_resumed_training_ends_as_if_left_alone(
    folder, options, monkeypatch, tmp_path, kind
):
    shutil.copytree(folder, tmp_path / "alone")
    every = 2 * kind.recipe.accumulate
    more = ["--stage", kind.name, "--steps", 4, "--checkpoint-every", every]
    command(*options(STAGES[kind], tmp_path / "alone", *more))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, kind, 4 * kind.recipe.accumulate - 1, kill)  # amid the fourth step
        command(*options(STAGES[kind], folder, *more))
    assert state(folder, kind)["progress"]["step"] == 2
    command(*options(STAGES[kind], folder, *more, "--resume"))
    assert_same_training(folder, tmp_path / "alone", kind)


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGKILL")
def test_training_killed_anywhere_ends_as_if_left_alone(folder, options, tmp_path):
    shutil.copytree(folder, tmp_path / "alone")
    more = ["--stage", "SRResNet", "--steps", 12, "--checkpoint-every", 1]
    command(*options("pretrain", tmp_path / "alone", *more))
    rng = np.random.default_rng(0)
    for resume in ([], ["--resume"]):
        arguments = options("pretrain", folder, *more, *resume)
        training = Launched(tmp_path / "log", command, *arguments)
        wait_for(folder / "SRResNet.state.pth", training)
        time.sleep(rng.uniform(0, 2 if resume else 0.5))  # anywhere, also amid a checkpoint
        training.processes[0].kill()
        training.wait()
    command(*options("pretrain", folder, *more, "--resume"))
    assert_same_training(folder, tmp_path / "alone", SRResNetModel)


def wait_for(path, training):
    """Waits until a file is there that a launched training writes."""
    while not path.exists() and training.processes[0].is_alive():
        time.sleep(0.01)


def test_stopped_in_the_first_of_several_stages(folder, options, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "alone")
    more = ["--checkpoint-every", 2]
    command(*options("pretrain", tmp_path / "alone", *more))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, SRResNetModel, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        command(*options("pretrain", folder, *more))
    assert not (folder / "PreModel.state.pth").exists()
    command(*options("pretrain", folder, *more, "--resume"))
    assert_same_training(folder, tmp_path / "alone", SRResNetModel, EdgeStageModel, PreModel)


def test_later_stages_of_an_earlier_training_are_not_taken_for_those_of_this_one(
    folder, options, monkeypatch, ckpts, tmp_path
):
    shutil.copytree(folder, tmp_path / "alone")
    torch.manual_seed(7)
    save_network(type(load_network(ckpts / "SRResNet_gen.pth"))(8, 4), tmp_path / "other.pth")
    more = ["--init", tmp_path / "other.pth"]
    command(*options("pretrain", tmp_path / "alone", *more))
    command(*options("pretrain", folder))  # from other weights
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, SRResNetModel, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        command(*options("pretrain", folder, *more))
    command(*options("pretrain", folder, *more, "--resume"))
    assert_same_training(folder, tmp_path / "alone", SRResNetModel, EdgeStageModel, PreModel)


def test_more_steps_for_an_earlier_stage_train_the_later_ones_anew(folder, options, tmp_path):
    command(*options("pretrain", folder, "--steps", 2, "--stage", "SRResNet"))
    shutil.copytree(folder, tmp_path / "alone")
    more = ["--steps", 3, "--resume"]
    command(*options("pretrain", tmp_path / "alone", *more))
    for name in ("EdgeStageModel", "PreModel"):
        command(*options("pretrain", folder, "--steps", 3, "--stage", name))
    command(*options("pretrain", folder, *more))
    assert_same_training(folder, tmp_path / "alone", SRResNetModel, EdgeStageModel, PreModel)


def test_a_validation_cut_short_is_made_up_for(folder, options):
    more = ["--stage", "PreModel", "--resume"]
    command(*options("pretrain", folder, "--stage", "PreModel"))
    path = folder / "PreModel.state.pth"
    complete = load_file(path)
    assert complete["progress"]["validated"] == 4
    best = load_file(folder / "PreModel_gen_best.pth")
    (folder / "PreModel_gen_best.pth").unlink()
    cut = complete | {"progress": complete["progress"] | {"validated": 0, "best": -math.inf}}
    save_file(cut, path)
    command(*options("pretrain", folder, *more))
    assert load_file(path)["progress"]["validated"] == 4
    assert_equal(load_file(path)["parts"], complete["parts"])
    network = load_file(folder / "PreModel_gen.pth")["state_dict"]
    assert_equal(load_file(folder / "PreModel_gen_best.pth")["state_dict"], network)
    assert best.keys() == {"network", "state_dict"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_saves_and_says_how_to_go_on(
    folder, options, monkeypatch, capsys, number
):
    stop_at(monkeypatch, SRResNetModel, 7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        command(*options("pretrain", folder, "--steps", 100))
    assert ended.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "Interrupted. SRResNet saved at step 8; go on with --resume"
    assert state(folder, SRResNetModel)["progress"]["step"] == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_with_processes_that_load_data(folder, options, tmp_path):
    arguments = options("pretrain", folder, "--steps", 10_000, "--checkpoint-every", 1)
    training = Launched(tmp_path / "log", command, *arguments, "--workers", 1)
    wait_for(folder / "SRResNet.state.pth", training)
    os.kill(training.processes[0].pid, signal.SIGINT)
    statuses, printed = training.wait()
    step = state(folder, SRResNetModel)["progress"]["step"]
    line = f"Interrupted. SRResNet saved at step {step}; go on with --resume"
    assert statuses == [130] and printed.splitlines()[-1] == line
    assert "Traceback" not in printed


def test_resuming_what_is_not_there_starts_anew_and_says_so(folder, options, capsys):
    command(*options("train", folder, "--steps", 1, "--resume"))
    assert "SRModel.state.pth is not there: SRModel starts anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--batch-size", 3], "crops per step 2 -> 3"),
        (["--crop", 12], "crops [16, 16] -> [12, 12]"),
        (["--seed", 1], "seed 0 -> 1"),
        (["--learning-rate", 1e-3], "learning_rate 0.0004 -> 0.001"),
        (["--held-out", 0], "held out"),
        (["--root", "{other}"], "training images"),
    ],
)
def test_resuming_with_another_recipe_is_refused(
    sliced, folder, options, refused, tmp_path, change, named
):
    command(*options("pretrain", folder, "--stage", "SRResNet", "--steps", 2))
    if "--root" in change:
        other = tmp_path / "other"
        shutil.copytree(sliced, other)
        for size, long in ((LR, "600px"), (HR, "2400px")):
            for path in (other / TRAINING / size).rglob(f"*{long}_0003*"):
                path.unlink()
        for path in other.rglob("0003_*"):
            path.unlink()
        change = ["--root", other]
    before = (folder / "SRResNet.state.pth").read_bytes()
    given = options("pretrain", folder, "--stage", "SRResNet", "--resume", *change)
    line = refused(*given)
    assert named in line and "--accept-changes" in line and "SRResNet.state.pth" in line
    assert (folder / "SRResNet.state.pth").read_bytes() == before
    command(*given, "--accept-changes")
    assert state(folder, SRResNetModel)["progress"]["step"] == 4
    command(*given)  # now this is what it was trained with


def test_best_compares_like_with_like_only(sliced, folder, options):
    command(*options("pretrain", folder, "--stage", "SRResNet", "--steps", 2))
    path = folder / "SRResNet.state.pth"
    content = load_file(path)
    save_file(content | {"progress": content["progress"] | {"best": 2.0}}, path)  # beyond reach
    (folder / "SRResNet_gen_best.pth").unlink()
    more = ["--stage", "SRResNet", "--resume"]
    command(*options("pretrain", folder, *more))
    assert not (folder / "SRResNet_gen_best.pth").exists()
    command(*options("pretrain", folder, *more, "--steps", 5, "--seed", 1, "--accept-changes"))
    assert (folder / "SRResNet_gen_best.pth").exists()


def test_more_steps_are_said_and_fewer_refused(folder, options, refused, capsys):
    more = ["--stage", "SRResNet", "--resume"]
    command(*options("pretrain", folder, "--stage", "SRResNet"))
    command(*options("pretrain", folder, *more, "--steps", 6))
    assert "SRResNet resumes at step 4 with steps 4 -> 6" in capsys.readouterr().out
    line = refused(*options("pretrain", folder, *more, "--steps", 3))
    assert "is at step 6 already" in line and "--steps" in line
    assert state(folder, SRResNetModel)["progress"]["step"] == 6


def not_finite(content):
    content["parts"]["gen"]["conv1.weight"][0, 0, 0, 0] = math.nan
    return content


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda good: {"step": 9, "gen": {}, "adam": {}, "judged": 4}, "an earlier version"),
        (lambda good: good | {"parts": good["parts"] | {"gen": {}}}, "does not fit"),
        (lambda good: good | {"parts": {}}, "does not fit"),
        (not_finite, "not finite"),
        (None, "damaged"),
    ],
    ids=["old", "foreign", "empty", "nan", "cut"],
)
def test_states_that_cannot_be_resumed_are_refused_in_one_line(
    folder, options, refused, spoil, words
):
    command(*options("pretrain", folder, "--stage", "SRResNet"))
    path, weights = folder / "SRResNet.state.pth", (folder / "SRResNet_gen.pth").read_bytes()
    if spoil:
        save_file(spoil(load_file(path)), path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    line = refused(*options("pretrain", folder, "--stage", "SRResNet", "--resume", "--steps", 9))
    assert str(path) in line and words in line and len(line) < 500
    assert (folder / "SRResNet_gen.pth").read_bytes() == weights


def test_a_new_training_keeps_the_old_weights_and_curves(folder, options, tmp_path):
    before = (folder / "EdgeModel_gen.pth").read_bytes()
    more = ["--stage", "EdgeModel", "--steps", 1]
    command(*options("train_edges", folder, *more))
    kept = folder / "EdgeModel_gen.1.previous.pth"
    assert kept.read_bytes() == before
    trained = (folder / "EdgeModel_gen.pth").read_bytes()
    curve = scalars(folder / "runs" / "EdgeModel")
    command(*options("train_edges", folder, *more, "--init", kept))
    assert kept.read_bytes() == before
    assert (folder / "EdgeModel_gen.2.previous.pth").read_bytes() == trained
    assert scalars(folder / "runs" / "EdgeModel") == curve
    assert scalars(folder / "runs" / "EdgeModel", "2")["validation/F1"]


def test_resumed_curves_go_on_in_the_same_chart(folder, options):
    more = ["--stage", "SRResNet", "--checkpoint-every", 1]
    command(*options("pretrain", folder, *more, "--steps", 2))
    command(*options("pretrain", folder, *more, "--steps", 4, "--resume"))
    assert [path.name for path in (folder / "runs" / "SRResNet").iterdir()] == ["1"]
    curve = scalars(folder / "runs" / "SRResNet")["validation/PSNR"]
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]


# What stops a training ------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 500])
def test_diverged_training_stops_and_keeps_the_last_good_files(folder, options, refused, every):
    one = ["--stage", "SRResNet", "--checkpoint-every", every]
    command(*options("pretrain", folder, *one, "--steps", 2))
    paths = [folder / f"SRResNet{end}" for end in (".state.pth", "_gen.pth", "_gen_best.pth")]
    before = [path.read_bytes() for path in paths]
    wild = ["--learning-rate", 1e30, "--resume", "--accept-changes", "--steps", 100]
    line = refused(*options("pretrain", folder, *one, *wild))
    step = int(re.search(r"step (\d+)", line)[1])
    assert 2 < step <= 22 and "--learning-rate" in line
    assert all(str(path) in line for path in paths[:2])
    for path in paths:
        assert all_finite(load_file(path))
    if every == 500:
        assert [path.read_bytes() for path in paths] == before


def all_finite(content):
    if isinstance(content, dict):
        return all(map(all_finite, content.values()))
    return not isinstance(content, torch.Tensor) or bool(content.isfinite().all())


def test_loss_that_is_not_finite_in_one_batch_stops_the_training(
    folder, options, refused, monkeypatch
):
    original = SRModel.losses

    def losses(self, batch):
        terms, scalars = original(self, batch)
        losses.batches += 1
        if losses.batches == 5:
            terms["dis"]["cross-entropy"] = terms["dis"]["cross-entropy"] * math.nan
        return terms, scalars

    losses.batches = 0
    monkeypatch.setattr(SRModel, "losses", losses)
    monkeypatch.setattr(training, "LOG_EVERY", 4)
    before = (folder / "SRModel_gen.pth").read_bytes()
    line = refused(*options("train", folder, "--steps", 100))
    assert "SRModel: not finite at step 4" in line
    assert (folder / "SRModel_gen.pth").read_bytes() == before
    assert not (folder / "SRModel.state.pth").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_tile_is_named_and_the_training_saved(sliced, folder, options, tmp_path, workers):
    root = tmp_path / "damaged"
    shutil.copytree(sliced, root)
    for tile in (root / TRAINING / HR / TILES).glob("*_02_02.png"):
        tile.write_bytes(tile.read_bytes()[:500])
    more = ["--root", root, "--steps", 1000, "--workers", workers, "--stage", "EdgePreModel"]
    training = Launched(tmp_path / "log", command, *options("train_edges", folder, *more))
    statuses, printed = training.wait()
    assert statuses == [1] and "Traceback" not in printed
    assert re.fullmatch(rf"{re.escape(str(root))}.*/\d{{4}}_02_02\.png: .+", last_line(printed))
    assert (folder / "EdgePreModel.state.pth").exists()


def last_line(printed):
    return printed.splitlines()[-1]


def spoil_one_tile(sliced, root, batch, part=slice(None)):
    """Copies a root and damages a tile that batch number `batch` is the first to need.

    Returns the tile and a function that mends it.
    """
    shutil.copytree(sliced, root)
    ids, _ = split(root, 4)
    pairs = PairedTiles(root, ids, 16).pairs
    drawn = list(itertools.islice(CropSampler(len(pairs), 2, (16, 16), 0), batch + 1))
    early = {draw.tile for draws in drawn[:-1] for draw in draws}
    tile = next(draw.tile for draw in drawn[-1][part] if draw.tile not in early)
    path = pairs[tile][0]
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    return path, lambda: path.write_bytes(good)


def test_damaged_tile_met_while_accumulating_loses_nothing(
    sliced, folder, options, refused, tmp_path
):
    tile, mend = spoil_one_tile(sliced, tmp_path / "root", batch=3)  # the second of two
    shutil.copytree(folder, tmp_path / "alone")
    command(*options("train", tmp_path / "alone", "--steps", 3))
    more = ["--root", tmp_path / "root", "--steps", 3]
    assert tile.name in refused(*options("train", folder, *more))
    assert state(folder, SRModel)["progress"]["step"] == 1
    mend()
    command(*options("train", folder, *more, "--resume"))
    assert_same_training(folder, tmp_path / "alone", SRModel)


def test_damaged_tile_met_by_the_second_process_stops_both(sliced, folder, options, tmp_path):
    tile, mend = spoil_one_tile(sliced, tmp_path / "root", batch=3, part=slice(1, 2))
    more = ["--root", tmp_path / "root", "--steps", 2]
    arguments = options("train", folder, *more, "--batch-size", 1)
    began = time.monotonic()
    statuses, printed = Launched(tmp_path / "log", command, *arguments, processes=2).wait()
    assert time.monotonic() - began < 60
    assert all(statuses) and 1 in statuses and "Traceback" not in printed
    assert len([line for line in printed.splitlines() if tile.name in line]) == 1
    assert "SRModel saved at step 1; go on with --resume" in printed
    assert printed.count("--resume") == 1  # not once per process
    assert state(folder, SRModel)["progress"]["step"] == 1
    mend()
    command(*options("train", folder, *more, "--resume"))  # in one, twice as large a batch
    assert state(folder, SRModel)["progress"]["step"] == 2


def test_held_out_image_damaged_since_costs_no_step(sliced, folder, options, refused, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(sliced, root)
    _, held_out = split(root, 4)
    hr = next(iter(held_out.values()))[1]
    more = ["--root", root, "--checkpoint-every", 2, "--stage", "SRResNet"]
    command(*options("pretrain", folder, *more, "--steps", 1))

    def validate(*_):
        raise ImageError(f"{hr}: not readable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SRResNetModel, "validate", validate)
        assert str(hr) in refused(*options("pretrain", folder, *more, "--steps", 4, "--resume"))
    assert state(folder, SRResNetModel)["progress"]["step"] == 2


@pytest.mark.parametrize("size", [LR, HR])
def test_stale_tiles_are_named_before_the_first_step(
    sliced, folder, options, refused, tmp_path, monkeypatch, size
):
    root = tmp_path / "root"
    shutil.copytree(sliced, root)
    image = root / TRAINING / size / f"image_{size}_0001.png"
    save(image.parent, image.name, read_image(image)[::-1])
    monkeypatch.setattr(SRResNetModel, "losses", never)
    line = refused(*options("pretrain", folder, "--root", root))
    assert "0001_01_01.png: not made from this image as it is now" in line
    assert "slice_images_w_overlapping.py" in line


def test_tiles_of_another_grid_are_no_continuation(sliced, folder, options, refused, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(sliced, root)
    more = ["--root", root, "--stage", "SRResNet"]
    command(*options("pretrain", folder, *more, "--steps", 1))
    slice_images_w_overlapping.main(["--root", str(root), "--tiles", "1"])
    assert "tiles 12 -> 3" in refused(*options("pretrain", folder, *more, "--resume"))


def test_full_disk_while_saving_is_said_in_one_line(folder, options, refused, monkeypatch):
    def full(_, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (folder / "SRResNet_gen.pth").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    line = refused(*options("pretrain", folder, "--stage", "SRResNet"))
    assert (
        line == f"{folder}: No space left on device; free some space and run the same command again"
    )
    assert (folder / "SRResNet_gen.pth").read_bytes() == before


def test_weights_are_flushed_to_the_disk(folder, monkeypatch):
    flushed = []
    monkeypatch.setattr(images, "_flush", flushed.append)
    save_network(SRResNet(4, 1), folder / "a.pth")
    assert len(flushed) == 2  # the file and its folder


def test_optimiser_that_is_not_finite_is_not_saved(folder, options, refused, monkeypatch):
    original = SRResNetModel.losses

    def losses(self, batch):
        terms, scalars = original(self, batch)
        return {"gen": {"mse": terms["gen"]["mse"] * 1e25}}, scalars

    monkeypatch.setattr(SRResNetModel, "losses", losses)
    more = ["--stage", "SRResNet", "--learning-rate", 1e-30, "--held-out", 0]
    assert "not finite" in refused(*options("pretrain", folder, *more))
    assert not (folder / "SRResNet.state.pth").exists()


def test_changed_optimiser_settings_are_applied_on_resuming(folder, options, monkeypatch):
    command(*options("pretrain", folder, "--steps", 1, "--stage", "PreModel"))
    changed = dataclasses.replace(PreModel.recipe, betas=(0.5, 0.6), trunk_rate=0.25)
    monkeypatch.setattr(PreModel, "recipe", changed)
    more = ["--steps", 2, "--stage", "PreModel", "--resume", "--accept-changes"]
    command(*options("pretrain", folder, *more))
    groups = state(folder, PreModel)["parts"]["gen adam"]["param_groups"]
    assert [group["factor"] for group in groups] == [1, 0.25]
    assert all(list(group["betas"]) == [0.5, 0.6] for group in groups)


def test_a_stage_trained_alone_ends_what_followed_from_its_old_weights(folder, options):
    command(*options("train_edges", folder, "--steps", 1))
    command(*options("train_edges", folder, "--steps", 1, "--stage", "EdgePreModel"))
    assert not (folder / "EdgeModel.state.pth").exists()
    assert (folder / "EdgeModel.state.2.previous.pth").exists()


def never(*_, **__):
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folder_that_cannot_be_written_to_is_found_before_the_first_step(
    folder, options, refused, monkeypatch, code
):
    def fail(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(images.tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(SRResNetModel, "losses", never)
    line = refused(*options("pretrain", folder))
    assert line.startswith(f"{folder}: {os.strerror(code)}; ")


def test_file_in_place_of_the_folder_is_named(folder, options, refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(*options("pretrain", folder, "--ckpts", tmp_path / "file"))
    assert line.startswith(str(tmp_path / "file"))


def test_missing_images_are_noticed_before_anything_is_downloaded(
    folder, options, refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", never)
    given = options("train", folder, "--root", tmp_path)
    where = given.index("--vgg")
    line = refused(*given[:where], *given[where + 2 :])
    assert str(tmp_path / TRAINING / LR / TILES) in line
    assert "python slice_images_w_overlapping.py" in line


def test_missing_weights_name_the_command_that_makes_them(folder, options, refused):
    (folder / "PreModel_gen.pth").unlink()
    line = refused(*options("train", folder))
    assert str(folder / "PreModel_gen.pth") in line and "python main.py pretrain" in line


def test_ctrl_c_is_acknowledged_at_once(folder, options, monkeypatch, capfd):
    seen = []

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(capfd.readouterr().err)

    stop_at(monkeypatch, SRResNetModel, 1, interrupt)
    with pytest.raises(SystemExit):
        command(*options("pretrain", folder))
    assert "once more to stop at once" in seen[0]


def test_resuming_with_another_edge_generator_or_precision_is_refused(folder, options, refused):
    given = options("pretrain", folder, "--stage", "PreModel", "--steps")
    command(*given, 1)
    line = refused(*given, 2, "--resume", "--precision", "bf16")
    assert "precision torch.float32 -> torch.bfloat16" in line
    save_network(EdgeGenerator(4, 2), folder / "EdgeModel_gen.pth")
    assert "EdgeModel_gen.pth" in refused(*given, 2, "--resume")


def test_full_memory_names_the_option_to_lower(folder, options, refused, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SRResNetModel, "losses", fail)
    assert "--batch-size" in refused(*options("pretrain", folder))

    def fail_on_the_cpu(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(SRResNetModel, "losses", fail_on_the_cpu)
    assert "--batch-size" in refused(*options("pretrain", folder))

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    monkeypatch.setattr(SRResNetModel, "losses", killed)
    assert "--workers 0" in refused(*options("pretrain", folder))


# Several processes ----------------------------------------------------------------------------


def test_pretraining_in_two_processes_by_torchrun(folder, options):
    run(*options("pretrain", folder, "--steps", 1), processes=2)
    assert state(folder, PreModel)["progress"]["step"] == 1


def slow_second_process(*arguments):
    """Runs a command line in a process whose clock, in the second, is an hour ahead by turns."""
    if os.environ["RANK"] == "1":
        clock, hours = time.monotonic, itertools.cycle([0, 3600])
        training.time = SimpleNamespace(monotonic=lambda: clock() + next(hours))
    command(*arguments)


def test_processes_agree_on_when_a_checkpoint_is_due(folder, options, tmp_path):
    arguments = options("pretrain", folder, "--stage", "SRResNet", "--steps", 8)
    arguments += ["--held-out", 0]
    launched = Launched(tmp_path / "log", slow_second_process, *arguments, processes=2)
    statuses, printed = launched.wait(60)
    assert statuses == [0, 0], printed


def test_weights_that_a_later_stage_needs_are_missed_before_the_first(folder, options, refused):
    (folder / "EdgeModel_gen.pth").unlink()
    line = refused(*options("pretrain", folder))
    assert "EdgeModel_gen.pth" in line and "EdgeStageModel" in line
    assert not (folder / "SRResNet.state.pth").exists()
    command(*options("pretrain", folder, "--stage", "SRResNet", "--steps", 1))


def test_first_process_reads_and_writes_for_all_and_speaks_for_them(folder, options, tmp_path):
    (tmp_path / "0").mkdir()
    for name in ("PreModel", "EdgeModel"):
        shutil.copy(folder / f"{name}_gen.pth", tmp_path / "0")  # nothing for the second
    arguments = options("train", tmp_path, "--steps", 2)
    where = arguments.index("--ckpts") + 1
    arguments[where] = tmp_path / "{rank}"
    launched = Launched(tmp_path / "log", command, *arguments, "--batch-size", 1, processes=2)
    statuses, printed = launched.wait()
    assert statuses == [0, 0], printed
    assert not (tmp_path / "1").exists()
    assert state(tmp_path / "0", SRModel)["progress"]["step"] == 2
    assert values(scalars(tmp_path / "runs" / "SRModel")["validation/SSIM"])
    launched = Launched(tmp_path / "log", command, *arguments, "--resume", processes=2)
    statuses, printed = launched.wait()
    assert statuses == [1, 1]
    assert printed.count("was trained otherwise") == 1
    launched = Launched(tmp_path / "log", command, *arguments, "--batch-size", 1, processes=2)
    statuses, printed = launched.wait()
    assert statuses == [0, 0], printed
    assert printed.count("Kept SRModel.state.pth of an earlier training") == 1
    wild = [*arguments, "--batch-size", 1, "--learning-rate", 1e30, "--steps", 60]
    statuses, printed = Launched(tmp_path / "log", command, *wild, processes=2).wait()
    assert statuses == [1, 1] and printed.count("not finite at step") == 1
    nothing = [*arguments, "--root", tmp_path]
    statuses, printed = Launched(tmp_path / "log", command, *nothing, processes=2).wait()
    assert statuses == [1, 1] and printed.count(": no tiles; ") == 1


def batch_of(sliced):
    """Four crops, of which a process each has two, as a batch."""
    ids, _ = split(sliced, 0)
    dataset = PairedTiles(sliced, ids, 16, edges=("lr", "hr"))
    items = [dataset[draw] for draw in next(iter(CropSampler(len(dataset), 4, (16, 16), 0)))]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def gradients(kind, options, device, batch):
    """All networks' gradients of one batch, averaged over the processes, each in one vector."""
    torch.manual_seed(3)
    stage = kind(kind.recipe, options, device)
    losses, _ = stage.losses({key: device.send(value) for key, value in batch.items()})
    for terms in losses.values():
        sum(terms.values()).backward()
    device.average_gradients(stage.networks.values())
    return {
        key: torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        for key, network in stage.networks.items()
    }


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def all_gradients(options, root, device, precisions):
    batch = batch_of(root)
    # the first half of each process's crops is given true edges: so each gets one of them
    mine = slice(device.rank, None, device.world)
    batch = {key: value[mine] for key, value in batch.items()}
    return {
        f"{kind.__name__} {name}": gradients(
            kind,
            options,
            Device(device.torch_device, PRECISIONS[name], device.rank, device.world),
            batch,
        )
        for kind in (EdgeModel, PreModel, SRModel)
        for name in precisions
        if name == "fp32" or kind is SRModel
    }


def write_gradients(options, root, path, threads):
    """What each of two processes does."""
    os.cpu_count = lambda: 8
    with open_device("cpu", "fp32", training=True) as device:
        found = all_gradients(options, root, device, PRECISIONS)
        torch.save(
            {"gradients": found, "threads": torch.get_num_threads()}, f"{path}.{device.rank}"
        )


def test_two_processes_compute_the_gradient_of_the_doubled_batch(sliced, folder, options, tmp_path):
    given = main.parse_options(list(map(str, options("pretrain", folder))))
    given.init = None
    arguments = (write_gradients, given, sliced, tmp_path / "gradients", None)
    statuses, printed = Launched(tmp_path / "log", *arguments, processes=2).wait()
    assert statuses == [0, 0], printed
    both = [load_file(tmp_path / f"gradients.{rank}") for rank in range(2)]
    assert_equal(both[0]["gradients"], both[1]["gradients"])
    assert both[0]["threads"] == 4  # of eight processors
    alone = all_gradients(given, sliced, CPU, ["fp32"])
    for title, networks in both[0]["gradients"].items():
        kind, precision = title.split()
        for key, two in networks.items():
            one = alone[f"{kind} fp32"][key]
            tolerance = 1e-3 if precision == "fp32" else 0.2
            assert one.norm() > 0 and (one - two).norm() < tolerance * one.norm(), (title, key)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, 4), ("1", 4), ("3", 3)], ids=["none", "torchrun's", "user's"]
)
def test_threads_per_process(monkeypatch, given, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert device.threads_per_process() == expected


def test_warnings_of_the_device_come_from_the_first_process_only(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "cuda_obstacle", lambda: "this GPU is too old")
    for quiet in (False, True):
        device.choose_kind("auto", quiet)
    assert capsys.readouterr().err == "this GPU is too old; using the CPU\n"
