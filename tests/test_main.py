import csv
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    REPOSITORY,
    Launched,
    command,
    failing,
    join_all,
    photograph,
    save,
    shrunk,
    skipped,
    slice_all,
    status_of,
)
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import images
import main
import metrics
from images import read_image
from inference import Enlarger
from models import EdgeGenerator, Generator, SRResNet
from tiles import HR, JOINED, LR, OUTPUT, TEST, TILES
from weights import save_network


@pytest.fixture
def root(tmp_path):
    """A root with three sliced test images, two of them with their ground truth."""
    folder = tmp_path / "root"
    for number in range(3):
        hr = photograph(number)[:96, :128]
        save(folder / TEST / LR, f"image_600px_{number}.png", shrunk(hr))
        if number < 2:
            save(folder / TEST / HR, f"image_2400px_{number}.png", hr)
    slice_all(folder, "--tiles", 3)
    return folder


@pytest.fixture
def other(tmp_path):
    """A file with another generator's weights."""
    torch.manual_seed(5)
    save_network(Generator(8, 4), tmp_path / "other.pth")
    return tmp_path / "other.pth"


def run_test(root, ckpts, *more):
    command("test", "--root", root, "--ckpts", ckpts, *more)


def predict_edges(root, ckpts):
    command("edges", "--root", root, "--ckpts", ckpts)


def evaluate(root):
    command("evaluate", "--root", root)


def output(root):
    return root / TEST / LR / OUTPUT


def joined(root, name):
    return output(root) / JOINED / f"candidate_{name}.png"


def lr_image(root, name):
    return root / TEST / LR / f"image_600px_{name}.png"


def replace(path, image):
    """Puts another picture under a name, with the same time of change."""
    before = path.stat()
    save(path.parent, path.name, image)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tiles(root):
    """{name: (time of change, bytes)} of all HR tiles."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in output(root).rglob("*_??_??.png")
    }


def rows(root):
    with (output(root) / JOINED / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The whole way --------------------------------------------------------------------------------


def test_from_tiles_to_joined_images_and_metrics(root, ckpts, capsys):
    run_test(root, ckpts)
    assert len(list(output(root).glob("*.png"))) == 27
    assert read_image(output(root) / "2_01_03.png").shape == (64, 76, 3)
    join_all(root)
    assert read_image(joined(root, 1)).shape == (96, 128, 3)
    capsys.readouterr()
    evaluate(root)
    printed = capsys.readouterr().out
    found = rows(root)
    assert [row["image"] for row in found] == ["0", "1", "mean"]
    assert "bicubic" in printed and re.search(r"^1 .*$", printed, re.MULTILINE)

    sr, hr, lr = map(
        read_image,
        (joined(root, 1), root / TEST / HR / "image_2400px_1.png", lr_image(root, 1)),
    )
    bicubic = np.asarray(Image.fromarray(lr).resize((128, 96), Image.Resampling.BICUBIC))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for suffix, image in (("", sr), (" bicubic", bicubic)):
        a, b = (rgb2ycbcr(each)[4:-4, 4:-4, 0] for each in (image, hr))
        original = structural_similarity(
            image / 127.5 - 1, hr / 127.5 - 1, data_range=2, channel_axis=2, **how
        )
        expected = {
            "PSNR": peak_signal_noise_ratio(b, a, data_range=255),
            "SSIM": structural_similarity(a, b, data_range=255, **how),
            "L1": np.abs(image / 127.5 - hr / 127.5).mean(),
            "SSIM original": original,
        }
        for key, value in expected.items():
            assert float(found[1][key + suffix]) == pytest.approx(value, rel=1e-3)
            mean = (float(found[0][key + suffix]) + float(found[1][key + suffix])) / 2
            assert float(found[2][key + suffix]) == pytest.approx(mean)


# Nothing is done twice, nothing stale passes --------------------------------------------------


def test_a_copied_root_goes_on_where_it_was(root, ckpts, tmp_path, capsys):
    run_test(root, ckpts)
    join_all(root)
    predict_edges(root, ckpts)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # with new times, as cp -r
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.png")}
    capsys.readouterr()
    for step in (run_test, predict_edges):
        step(copy, ckpts)
        assert "0 images, 3 up to date" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.png")}
    join_all(copy)
    evaluate(copy)
    run_test(copy, ckpts, "--edges", output(copy) / "edges")


def test_finished_images_are_not_made_again(root, ckpts, other):
    run_test(root, ckpts)
    first = tiles(root)
    (output(root) / "1_02_02.png").unlink()
    (output(root) / "0_01_01.png").write_bytes(b"")
    run_test(root, ckpts)
    second = tiles(root)
    assert {name for name in first if second[name] == first[name]} == {
        name for name in first if name.startswith("2_")
    }
    assert {k: v for k, (_, v) in first.items()} == {k: v for k, (_, v) in second.items()}
    join_all(root)
    run_test(root, ckpts)
    assert tiles(root) == second
    run_test(root, ckpts, "--generator", other)
    third = tiles(root)
    assert third.keys() == first.keys()
    assert not any(third[name][1] == first[name][1] for name in first)


def test_tiles_of_another_grid_are_replaced_but_not_those_of_other_images(tmp_path, ckpts):
    root, names = tmp_path / "root", ["a", "a_b", "1", "1_2"]
    for number, name in enumerate(names):
        save(root / TEST / LR, f"{name}.png", photograph(number, 24))
    slice_all(root, "--tiles", 2)
    run_test(root, ckpts)
    join_all(root)
    before = tiles(root)
    for name in ("a", "1"):
        replace(root / TEST / LR / f"{name}.png", photograph(7, 24))
    slice_all(root, "--tiles", 3)
    for name in ("a_b", "1_2"):  # no longer images, but their tiles are
        (root / TEST / LR / f"{name}.png").unlink()
    run_test(root, ckpts)
    after = tiles(root)
    assert len(after) == 2 * 9 + 2 * 4
    assert all(after[name] == before[name] for name in before if name[:3] in ("a_b", "1_2"))


def test_image_replaced_since_it_was_sliced_is_named(root, ckpts, capsys):
    run_test(root, ckpts)
    join_all(root)
    first, path = tiles(root), lr_image(root, 1)
    replace(path, read_image(path)[::-1])
    (line,) = skipped(failing(capsys, run_test, root, ckpts))
    assert "1_01_01.png" in line and "slice_images_w_overlapping.py" in line
    assert tiles(root) == first
    slice_all(root)
    run_test(root, ckpts, "--precision", "fp32")
    join_all(root)
    enlarger = Enlarger.load({ckpts / "SRModel_gen.pth": 1.0}, ckpts / "EdgeModel_gen.pth", CPU)
    expected = enlarger(read_image(path)).astype(int)
    assert np.abs(read_image(joined(root, 1)) - expected).max() <= 1


def test_lr_tiles_of_another_program_give_their_grid(root, ckpts):
    for tile in (root / TEST / LR / TILES).iterdir():
        save(tile.parent, tile.name, read_image(tile))  # without a stamp
    run_test(root, ckpts)
    assert len(tiles(root)) == 27


def test_interrupted_test_with_other_weights_does_not_pass(root, ckpts, other, monkeypatch, capsys):
    run_test(root, ckpts)
    join_all(root)
    old, write_png = read_image(joined(root, 1)), images.write_png

    def interrupted(path, *given):
        if path.name == "1_02_01.png":
            raise KeyboardInterrupt
        write_png(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(images, "write_png", interrupted)
        assert status_of(run_test, root, ckpts, "--generator", other) == 130
    (line,) = skipped(failing(capsys, join_all, root))  # not half of either generator
    assert "_1.png" in line and "main.py test" in line
    assert (read_image(joined(root, 1)) == old).all()
    run_test(root, ckpts, "--generator", other)
    join_all(root)
    assert (read_image(joined(root, 1)) != old).any()


@pytest.mark.parametrize("where", ["fresh", "moved"])
def test_stray_hr_tile_is_removed_once(root, ckpts, where):
    run_test(root, ckpts)
    if where == "moved":
        join_all(root)
    folder = output(root) / "1" if where == "moved" else output(root)
    shutil.copy(folder / "1_01_01.png", folder / "1_07_07.png")
    assert status_of(join_all, root) == 1
    run_test(root, ckpts)
    second = tiles(root)
    assert "1_07_07.png" not in second and len(second) == 27
    run_test(root, ckpts)
    assert tiles(root) == second
    join_all(root)


def test_images_that_cannot_be_made_are_named_and_the_others_made(root, ckpts, capsys):
    folder = root / TEST / LR
    (folder / TILES / "0_02_02.png").unlink()
    shutil.copy(folder / TILES / "1_01_01.png", folder / TILES / "1_07_07.png")
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "camera.heic").touch()
    lines = skipped(failing(capsys, run_test, root, ckpts))
    assert len(lines) == 5
    for name in ("_0.png", "_1.png", "link.png", "broken.png", "camera.heic"):
        assert any(name in line for line in lines)
    assert sum("slice_images_w_overlapping.py" in line for line in lines) >= 2
    assert len(tiles(root)) == 9
    slice_all_again = partial(status_of, slice_all, root, "--tiles", 3)
    assert slice_all_again() == 1
    assert status_of(run_test, root, ckpts) == 1 and len(tiles(root)) == 27


# Edges by hand --------------------------------------------------------------------------------


def test_predicted_edges_given_back_give_the_same_image(root, ckpts, capsys):
    run_test(root, ckpts)
    first = tiles(root)
    predict_edges(root, ckpts)
    folder = output(root) / "edges"
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "2.png"]
    assert "Predicted edges of 3 images, in " in capsys.readouterr().out
    run_test(root, ckpts, "--edges", folder)
    for name, (changed, _) in tiles(root).items():
        tile = read_image(output(root) / name)
        assert changed != first[name][0]
        (output(root) / name).write_bytes(first[name][1])
        assert (tile == read_image(output(root) / name)).all()


def test_edited_edges_change_the_image_and_are_known_again(root, ckpts):
    folder = output(root) / "edges"
    predict_edges(root, ckpts)
    run_test(root, ckpts, "--edges", folder)
    first = tiles(root)
    run_test(root, ckpts, "--edges", folder)
    assert tiles(root) == first
    edited = 255 - read_image(folder / "1.png")
    replace(folder / "1.png", edited[..., 0])  # as grey, which drawing programs write
    run_test(root, ckpts, "--edges", folder)
    second = tiles(root)
    for name, kept in first.items():
        assert (second[name] == kept) is not name.startswith("1_")
    join_all(root)
    run_test(root, ckpts)  # predicted ones again
    assert all(tiles(root)[name][1] != kept[1] for name, kept in first.items())


def test_edges_that_are_missing_or_of_another_size_are_named(root, ckpts, tmp_path, capsys):
    save(tmp_path / "drawn", "0.png", np.zeros((96, 128), np.uint8))
    save(tmp_path / "drawn", "1.png", np.zeros((24, 32), np.uint8))
    lines = skipped(failing(capsys, run_test, root, ckpts, "--edges", tmp_path / "drawn"))
    assert len(lines) == 2
    assert "drawn/1.png" in lines[0] and "(24, 32)" in lines[0] and "(96, 128)" in lines[0]
    assert "drawn/2.png" in lines[1] and "main.py edges" in lines[1]
    assert len(tiles(root)) == 9


def test_edges_that_are_there_are_the_users_own(root, ckpts, capsys):
    predict_edges(root, ckpts)
    drawn = output(root) / "edges" / "1.png"
    save(drawn.parent, drawn.name, np.zeros((96, 128, 3), np.uint8))
    (output(root) / "edges" / "2.png").unlink()
    before = drawn.read_bytes()
    predict_edges(root, ckpts)
    assert drawn.read_bytes() == before
    assert "Predicted edges of 1 image, 2 up to date" in capsys.readouterr().out


def test_edges_of_an_image_replaced_since_are_named(root, ckpts, capsys):
    predict_edges(root, ckpts)
    path, folder = lr_image(root, 1), output(root) / "edges"
    replace(path, read_image(path)[::-1])
    slice_all(root)
    for step in (predict_edges, partial(run_test, root, ckpts, "--edges", folder)):
        (line,) = skipped(failing(capsys, step, *([root, ckpts] if step is predict_edges else [])))
        assert "edges/1.png" in line and "delete it" in line
    (folder / "1.png").unlink()
    predict_edges(root, ckpts)
    run_test(root, ckpts, "--edges", folder)


# Evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(root, ckpts, capsys):
    run_test(root, ckpts)
    join_all(root)
    capsys.readouterr()
    return root


def compared(root):
    return [row["image"] for row in rows(root)]


def test_images_that_are_not_joined_as_they_are_now_are_named(evaluated, ckpts, other, capsys):
    joined(evaluated, 0).unlink()
    (line,) = skipped(failing(capsys, evaluate, evaluated))
    assert "image_600px_0.png" in line and "join_slice_images.py" in line
    assert compared(evaluated) == ["1", "mean"]
    join_all(evaluated)
    replace(lr_image(evaluated, 0), read_image(lr_image(evaluated, 0))[::-1])
    (line,) = skipped(failing(capsys, evaluate, evaluated))
    assert "candidate_0.png" in line and "join again" in line
    slice_all(evaluated)
    run_test(evaluated, ckpts, "--generator", other)
    lines = skipped(failing(capsys, evaluate, evaluated))
    assert len(lines) == 2 and all("join_slice_images.py" in line for line in lines)


def test_lr_image_made_from_a_ground_truth_replaced_since_is_named(tmp_path, ckpts, capsys):
    root = tmp_path / "root"
    for number in range(2):
        save(root / TEST / HR, f"{number}.png", photograph(number)[:96, :128])
    slice_all(root)
    run_test(root, ckpts)
    join_all(root)
    replace(root / TEST / HR / "0.png", photograph(3)[:96, :128])
    for step in (partial(run_test, root, ckpts), partial(evaluate, root)):
        (line,) = skipped(failing(capsys, step))
        assert "0.png" in line and "slice_images_w_overlapping.py" in line


def test_names_that_are_not_utf_8_are_evaluated(evaluated, ckpts):
    for path in [*evaluated.rglob("image_*_0.png"), *evaluated.rglob("0_*.png")]:
        path.unlink()
    name, hr = os.fsdecode(b"caf\xe9.png"), photograph(0)[:96, :128]
    try:
        save(evaluated / TEST / HR, name, hr)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    save(evaluated / TEST / LR, name, shrunk(hr))
    slice_all(evaluated)
    run_test(evaluated, ckpts)
    join_all(evaluated)
    evaluate(evaluated)
    assert compared(evaluated) == ["1", "caf\\udce9", "mean"]


@pytest.mark.parametrize("spoil", ["broken", "small", "link"])
def test_ground_truth_that_cannot_be_used_is_named(evaluated, capsys, spoil):
    path = evaluated / TEST / HR / "image_2400px_0.png"
    path.unlink()
    if spoil == "broken":
        path.write_bytes(b"no image")
    elif spoil == "small":
        save(path.parent, path.name, photograph(0)[:90, :128])
    else:
        path.symlink_to("nowhere.png")
    lines = skipped(failing(capsys, evaluate, evaluated))
    assert len(lines) == 1 and path.name in lines[0]
    assert compared(evaluated) == ["1", "mean"]


def test_no_ground_truth_at_all_is_said(evaluated, capsys):
    shutil.rmtree(evaluated / TEST / HR)
    (line,) = failing(capsys, evaluate, evaluated).splitlines()
    assert str(evaluated / TEST / HR) in line


def test_no_table_of_earlier_images_is_left(evaluated, capsys):
    evaluate(evaluated)
    shutil.rmtree(evaluated / TEST / LR / OUTPUT / JOINED)
    table = evaluated / TEST / LR / OUTPUT / JOINED / "metrics.csv"
    table.parent.mkdir()
    table.write_text("of before")
    assert "metrics.csv" not in failing(capsys, evaluate, evaluated) and not table.exists()


def test_table_is_on_disk_before_it_is_printed(evaluated, monkeypatch):
    monkeypatch.setattr(metrics, "print_table", None)
    with pytest.raises(TypeError):
        evaluate(evaluated)
    assert compared(evaluated) == ["0", "1", "mean"]


def test_every_part_of_the_network_is_measured(root, tmp_path, monkeypatch, capsys):
    import ablation  # noqa: PLC0415

    torch.manual_seed(0)
    ckpts = tmp_path / "ckpts"
    ckpts.mkdir()
    save_network(EdgeGenerator(4, 1), ckpts / "EdgeModel_gen.pth")
    save_network(SRResNet(8, 4), ckpts / "SRResNet_gen.pth")
    for name in ("PreModel", "SRModel"):
        save_network(Generator(8, 4), ckpts / f"{name}_gen.pth")
    given = ["ablation.py", "--root", str(root), "--ckpts", str(ckpts)]
    monkeypatch.setattr(sys, "argv", given)
    ablation.main()
    printed = capsys.readouterr().out
    run_test(root, ckpts)
    join_all(root)
    evaluate(root)
    mean = rows(root)[-1]
    for row, suffix in (("SRModel, predicted edges", ""), ("bicubic", " bicubic")):
        cells = re.search(rf"^{row} +(.*)$", printed, re.MULTILINE)[1].split()
        expected = [float(mean[key + suffix]) for key in ("PSNR", "SSIM", "L1", "SSIM original")]
        assert [float(each) for each in cells[:4]] == pytest.approx(expected, abs=1e-4)
    assert re.search(r"^PreModel, true edges +\d", printed, re.MULTILINE)
    assert re.search(r"^SRModel, no edges +\d", printed, re.MULTILINE)
    with (root / "ablation" / "images.csv").open(newline="", encoding="utf-8") as file:
        shift = next(row for row in csv.DictReader(file) if row["image"] == "bicubic")
    pairs = [(root / "ablation" / "bicubic" / f"{n}.png", photograph(n)[:96, :128]) for n in (0, 1)]
    means = np.mean([read_image(sr).mean((0, 1)) - hr.mean((0, 1)) for sr, hr in pairs], axis=0)
    assert [float(shift[key]) for key in ("red", "green", "blue")] == pytest.approx(means, abs=1e-4)


# Processes, Ctrl-C ----------------------------------------------------------------------------


def all_commands(root, ckpts, album):
    """Runs every command that shares images out, one after the other."""
    given = ["--root", root, "--ckpts", ckpts]
    command("test", *given)
    if os.environ["RANK"] == "0":
        join_all(root)
        (root / "joined").touch()
    while not (root / "joined").exists():
        time.sleep(0.05)
    command("edges", *given)
    command("evaluate", "--root", root)
    command("upscale", album, *given)


def test_processes_share_the_images_out(root, ckpts, tmp_path):
    album = tmp_path / "album"
    shutil.copytree(root / TEST / HR, album)
    arguments = [all_commands, root, ckpts, album]
    statuses, printed = Launched(tmp_path / "log", *arguments, processes=2).wait()
    assert statuses == [0, 0], printed
    done = ["Tested 3 images", "Predicted edges of 3 images", "Evaluated 2", "Upscaled 2 images"]
    for words in done:
        assert printed.count(words) == 1
    assert printed.count("\nmean ") == 1 and printed.count("CPU") == 3
    assert compared(root) == ["0", "1", "mean"]
    assert len(list((output(root) / "edges").iterdir())) == 3
    assert len(list(album.glob("*_x4.png"))) == 2


def test_messages_of_several_processes_are_printed_once(root, ckpts, tmp_path):
    for name in (0, 1):  # an image of either process
        (root / TEST / LR / TILES / f"{name}_02_02.png").unlink()
    (root / TEST / LR / "camera.heic").touch()
    given = ["test", "--root", root, "--ckpts", ckpts]
    statuses, printed = Launched(tmp_path / "log", command, *given, processes=2).wait()
    assert 1 in statuses and len(tiles(root)) == 9
    for word in ("image_600px_0.png", "image_600px_1.png", "camera.heic", "Tested 1 image, 3"):
        assert printed.count(word) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_in_one_line_and_the_rest_can_be_made_later(root, ckpts, tmp_path):
    for number in range(3, 40):
        save(root / TEST / LR, f"image_600px_{number}.png", shrunk(photograph(number)[:96, :128]))
    slice_all(root, "--tiles", 3)
    testing = Launched(tmp_path / "log", command, "test", "--root", root, "--ckpts", ckpts)
    while testing.processes[0].is_alive() and not (output(root) / "0_03_03.png").exists():
        time.sleep(0.01)
    os.kill(testing.processes[0].pid, signal.SIGINT)
    statuses, printed = testing.wait()
    assert statuses == [130] and "Traceback" not in printed
    assert printed.splitlines()[-1] == "Interrupted."
    before = len(tiles(root))
    assert 9 <= before < 40 * 9 and not list(output(root).rglob(".*"))
    run_test(root, ckpts)
    assert len(tiles(root)) == 40 * 9


# The command line -----------------------------------------------------------------------------


def script(text, folder):
    """Runs a copy of main.py that lies beside the others; returns exit status and output."""
    copy = folder / "repository"
    if not copy.exists():
        copy.mkdir()
        for module in REPOSITORY.glob("*.py"):
            shutil.copy(module, copy)
    (copy / "main.py").write_text(text)
    (status,), printed = Launched(folder / "log", run_copy, copy, folder).wait()
    return status, printed


def run_copy(copy, folder):
    os.chdir(folder)
    for module in copy.glob("*.py"):
        sys.modules.pop(module.stem, None)
    sys.path.insert(0, str(copy))
    sys.argv = [str(copy / "main.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_main_runs_what_its_last_lines_leave_uncommented(root, ckpts, tmp_path):
    text = (REPOSITORY / "main.py").read_text()
    lines = re.findall(r"^ {8,}(# )?(\w+)\(.*\)$", text, re.MULTILINE)[-6:]
    names = ["train_edges", "pretrain", "train", "test", "evaluate", "upscale"]
    assert [name for _, name in lines] == names
    assert [name for mark, name in lines if not mark] == ["test"]
    status, printed = script(text, tmp_path)  # its own folders, which are empty
    (line,) = printed.splitlines()
    assert status == 1 and str(tmp_path / "repository" / TEST / LR) in line
    assert "slice_images_w_overlapping.py" in line and "main.py upscale" in line
    shutil.copy(lr_image(root, 1), tmp_path / "holiday.jpg")
    where, networks = f"root={str(root)!r}", f"ckpts={str(ckpts)!r}"
    join = f"import join_slice_images; join_slice_images.main(['--root', {str(root)!r}])"
    for line, other in {
        " test()": f" test({where}, {networks}); {join}",
        "# evaluate()": f"evaluate({where})",
        '# upscale("holiday.jpg")': f'upscale("holiday.jpg", {networks})',
    }.items():
        assert line in text
        text = text.replace(line, other)
    status, printed = script(text, tmp_path)
    assert status == 0 and "Tested 3" in printed
    assert "metrics.csv" in printed and "Upscaled 1" in printed
    assert read_image(tmp_path / "holiday_x4.png").shape == (96, 128, 3)


def lines_of(capsys, *argv):
    """Runs a command line; returns its exit status and the lines it printed."""
    status = status_of(main.run, [str(each) for each in argv])
    printed = capsys.readouterr()
    return status, (printed.out + printed.err).splitlines()


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_help_shows_every_option_with_its_default(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    status, lines = lines_of(capsys, name, "--help")
    text = "\n".join(lines)
    assert not status and "None" not in text
    defaults = vars(main.parser_of(name).parse_args([]))
    entries = re.split(r"\n  (?=--|-h)", text.partition("options:")[2])
    shown = {re.match(r"(?:-h, )?--([a-z-]+)", each)[1]: each for each in entries if each.strip()}
    assert shown.keys() >= {key.replace("_", "-") for key in defaults} - {"images"}
    for key, value in defaults.items():
        if value not in (None, False, []):
            assert f"(default: {value})" in " ".join(shown[key.replace("_", "-")].split())
    if name in main.TRAINS:
        import stages  # noqa: PLC0415

        for each in main.TRAINS[name]:
            assert f"{stages.STAGES[each].recipe.steps:g}" in shown["steps"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tset"], ["tset", "mean test"]),
        (["photo.jpg"], ["photo.jpg", "upscale photo.jpg"]),
        (["dance"], ["dance", "--help"]),
        (["--root", ".", "test"], ["--root", "first"]),
        (["test", "--ckpt", "a"], ["--ckpt", "--ckpts"]),
        (["test", "image.png"], ["image.png"]),
        (["upscale", ""], ["images", "empty"]),
        *((["train", option, "0"], [option]) for option in ("--epochs", "--steps", "--batch-size")),
        *((["train", "--learning-rate", x], ["--learning-rate"]) for x in ("nan", "-1e-4", "fast")),
        *((["train", "--seed", x], ["--seed"]) for x in ("-1", "x", "9" * 20)),
        *((["train", "--jpeg", x], ["--jpeg"]) for x in ("1.5", "-0.1", "nan")),
        (["train", "--workers", "-1"], ["--workers"]),
        (["train", "--held-out", "-3"], ["--held-out"]),
        (["train", "--crop", "7"], ["--crop"]),
        (["train", "--checkpoint-every", "0"], ["--checkpoint-every"]),
        (["train", "--stage", "PreModel"], ["--stage"]),
        (["train", "--fast"], ["--fast"]),
        (["test", "--output", "a"], ["--output"]),
        (["test", "--device", "tpu"], ["--device"]),
        (["test", "--precision", "fp8"], ["--precision"]),
        (["test", "--model", "gan"], ["--model"]),
        (["test", "--texture", "1.5"], ["--texture"]),
        (["evaluate", "--root", "nowhere"], ["nowhere"]),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_exit_with_2(capsys, argv, words):
    status, lines = lines_of(capsys, *argv)
    assert status == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words)


HEAVY = ["torch", "torchvision", "tensorboard"]
IMPORTS = """
import sys, main
try:
    main.run(sys.argv[1:])
finally:
    print("imported", *(name for name in {} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (["--help"], []),
        (["test", "--help"], []),
        (["train", "--stepz"], []),
        (["upscale"], HEAVY[:1]),
    ],
    ids=str,
)
def test_a_command_imports_what_it_needs(argv, allowed, ckpts, tmp_path):
    if argv == ["upscale"]:
        save(tmp_path, "a.png", photograph(0, 12))
        argv = ["upscale", tmp_path / "a.png", "--ckpts", ckpts, "--fast"]
    given = [sys.executable, "-c", IMPORTS.format(HEAVY), *map(str, argv)]
    done = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].split()[1:] == allowed, done.stderr


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("main.py", "upscale"),
        ("main.py upscale", "--root"),
        ("slice_images_w_overlapping.py", "--root"),
        ("join_slice_images.py", "--root"),
        ("demo.py", "--help"),
    ],
)
def test_help_works_without_docstrings(script, word):
    given = [sys.executable, "-OO", *script.split(), "--help"]
    done = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert word in done.stdout and "None" not in done.stdout


def test_general_help_names_every_command(capsys):
    status, lines = lines_of(capsys, "--help")
    assert not status
    for name, call in main.COMMANDS.items():
        assert any(name in line and call.__doc__.split(".")[0] in line for line in lines)


@pytest.mark.parametrize("name", ["test", "edges", "evaluate", "upscale"])
def test_first_time_paths_answer_with_what_to_do(tmp_path, ckpts, capsys, name):
    given = [] if name == "evaluate" else ["--ckpts", ckpts]
    (line,) = failing(capsys, command, name, "--root", tmp_path, *given).splitlines()
    assert str(tmp_path) in line or "main.py upscale IMAGE" in line


def test_missing_weights_are_named(root, tmp_path, capsys):
    line = failing(capsys, run_test, root, tmp_path / "none").splitlines()[-1]
    assert str(tmp_path / "none" / "SRModel_gen.pth") in line


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--edges", ".", "--fast"], "--edges"),
        (["--texture", "0.5"], "--texture"),
        (["--texture", "0.5", "--model", "srresnet"], "--texture"),
        (["--steps", "1", "--epochs", "1"], "--epochs"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(root, capsys, given, word):
    name, remedy = ("train", "--steps") if word == "--epochs" else ("test", "--model")
    (line,) = failing(capsys, command, name, "--root", root, *given).splitlines()
    assert line.startswith(word) and remedy in line
