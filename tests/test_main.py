import csv
import os
import re
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Launched, command, photograph, save, shrunk, status_of
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import ablation
import join_slice_images
import main
import slice_images_w_overlapping
from images import read_image, write_png
from inference import Enlarger
from models import EdgeGenerator, Generator, SRResNet, save_network
from tiles import HR, JOINED, LR, OUTPUT, SCALE, TEST, TILES


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Has tiny networks not wait for other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def root(tmp_path):
    """A root with three sliced test images, two of them with their ground truth."""
    folder = tmp_path / "root"
    for number in range(3):
        hr = photograph(number)[:96, :128]
        save(folder / TEST / LR, f"image_600px_{number}.png", shrunk(hr))
        if number < 2:
            save(folder / TEST / HR, f"image_2400px_{number}.png", hr)
    slice_all(folder)
    return folder


@pytest.fixture
def other(tmp_path):
    """A file with another generator's weights."""
    torch.manual_seed(5)
    save_network(Generator(8, 4), tmp_path / "other.pth")
    return tmp_path / "other.pth"


def slice_all(root, tiles=3, *more):
    slice_images_w_overlapping.main(["--root", str(root), "--tiles", str(tiles), *more])


def join_all(root):
    join_slice_images.main(["--root", str(root)])


def test_all(root, ckpts, *more, name="test"):
    command(name, "--root", root, "--ckpts", ckpts, *more)


test_all.__test__ = False


def evaluate(root):
    command("evaluate", "--root", root)


def fails(capsys, function, *arguments, **options):
    """Calls a function, which must exit with 1, and returns what it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        function(*arguments, **options)
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in printed
    return printed


def left_out(printed):
    return [line for line in printed.splitlines() if line.startswith("Left out ")]


def output(root):
    return root / TEST / LR / OUTPUT


def joined(root, name):
    return output(root) / JOINED / f"candidate_{name}.png"


def lr_image(root, name):
    return root / TEST / LR / f"image_600px_{name}.png"


def tiles(root):
    """{name: (time of change, bytes)} of all HR tiles."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in output(root).rglob("*_??_??.png")
    }


def stop_writing_at(monkeypatch, name):
    """Has the test be interrupted when it comes to write a tile."""

    def interrupted(path, *given):
        if path.name == name:
            raise KeyboardInterrupt
        write_png(path, *given)

    monkeypatch.setattr(main, "write_png", interrupted)


# The whole way --------------------------------------------------------------------------------


def test_from_tiles_to_joined_images_and_metrics(root, ckpts, capsys):
    test_all(root, ckpts)
    assert len(list(output(root).glob("*.png"))) == 27
    assert read_image(output(root) / "2_01_03.png").shape == (64, 76, 3)
    join_all(root)
    assert read_image(joined(root, 1)).shape == (96, 128, 3)
    capsys.readouterr()
    evaluate(root)
    printed = capsys.readouterr().out
    with (output(root) / JOINED / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0", "1", "mean"]
    assert "bicubic" in printed and re.search(r"^1 .*$", printed, re.MULTILINE)

    sr = read_image(joined(root, 1))
    hr = read_image(root / TEST / HR / "image_2400px_1.png")
    lr = read_image(lr_image(root, 1))
    bicubic = np.asarray(Image.fromarray(lr).resize((128, 96), Image.Resampling.BICUBIC))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for suffix, image in (("", sr), (" bicubic", bicubic)):
        a, b = (rgb2ycbcr(each)[4:-4, 4:-4, 0] for each in (image, hr))
        original = structural_similarity(
            image / 127.5 - 1, hr / 127.5 - 1, data_range=2, channel_axis=2, **how
        )
        metrics = {
            "PSNR": peak_signal_noise_ratio(b, a, data_range=255),
            "SSIM": structural_similarity(a, b, data_range=255, **how),
            "L1": np.abs(image / 127.5 - hr / 127.5).mean(),
            "SSIM original": original,
        }
        for key, value in metrics.items():
            assert float(rows[1][key + suffix]) == pytest.approx(value, rel=1e-3)
            mean = (float(rows[0][key + suffix]) + float(rows[1][key + suffix])) / 2
            assert float(rows[2][key + suffix]) == pytest.approx(mean)


def test_upscaling_in_memory_gives_the_same_image(root, ckpts):
    test_all(root, ckpts)
    join_all(root)
    command("upscale", lr_image(root, 1), "--ckpts", ckpts)
    result = read_image(lr_image(root, 1).with_name("image_600px_1_x4.png")).astype(int)
    assert np.abs(result - read_image(joined(root, 1))).max() <= 1


def test_summary_tells_how_many_how_long_and_where(root, ckpts, capsys):
    for words in ("3 images", "0 images, 3 there already"):
        test_all(root, ckpts)
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(rf"Tested: {words}, in \d+\.\d s: {re.escape(str(output(root)))}", last)


# Nothing is done twice, nothing stale passes --------------------------------------------------


def test_finished_images_are_not_made_again(root, ckpts, other):
    test_all(root, ckpts)
    first = tiles(root)
    (output(root) / "1_02_02.png").unlink()
    test_all(root, ckpts)
    second = tiles(root)
    assert {name for name in first if second[name] == first[name]} == {
        name for name in first if not name.startswith("1_")
    }
    assert {k: v for k, (_, v) in first.items()} == {k: v for k, (_, v) in second.items()}
    join_all(root)
    test_all(root, ckpts)
    assert tiles(root) == second
    test_all(root, ckpts, "--generator", other)
    third = tiles(root)
    assert third.keys() == first.keys()
    assert not any(third[name][1] == first[name][1] for name in first)


def test_tiles_of_another_geometry_are_replaced(root, ckpts):
    test_all(root, ckpts)
    join_all(root)
    slice_all(root, 2, "--pad", "4")
    test_all(root, ckpts)
    assert len(tiles(root)) == 3 * 4
    join_all(root)


def test_image_replaced_since_it_was_sliced_is_named(root, ckpts, capsys):
    test_all(root, ckpts)
    join_all(root)
    first = tiles(root)
    path = lr_image(root, 1)
    save(path.parent, path.name, read_image(path)[::-1])
    (line,) = left_out(fails(capsys, test_all, root, ckpts))
    assert "1_01_01.png" in line and "slice_images_w_overlapping.py" in line
    assert tiles(root) == first
    slice_all(root)
    test_all(root, ckpts)
    join_all(root)
    lr = read_image(path)
    with main.open_device("cpu") as device:
        paths = ckpts / "SRModel_gen.pth", ckpts / "EdgeModel_gen.pth"
        expected = Enlarger.load(*paths, device)(lr).astype(int)
    assert np.abs(read_image(joined(root, 1)) - expected).max() <= 1
    assert tiles(root)["0_01_01.png"] == first["0_01_01.png"]


def test_interrupted_test_with_other_weights_does_not_pass(root, ckpts, other, monkeypatch, capsys):
    test_all(root, ckpts)
    join_all(root)
    old = read_image(joined(root, 1))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        stop_writing_at(patch, "1_02_01.png")
        test_all(root, ckpts, "--generator", other)
    assert ended.value.code == 130
    capsys.readouterr()
    assert status_of(join_all, root) == 1  # not half of either generator
    (line,) = left_out(capsys.readouterr().err)
    assert "1_" in line and "main.py test" in line
    assert (read_image(joined(root, 1)) == old).all()
    test_all(root, ckpts, "--generator", other)
    join_all(root)
    assert (read_image(joined(root, 1)) != old).any()


@pytest.mark.parametrize("where", ["fresh", "moved"])
def test_foreign_tile_is_removed_once(root, ckpts, where):
    test_all(root, ckpts)
    if where == "moved":
        join_all(root)
    folder = output(root) / "1" if where == "moved" else output(root)
    shutil.copy(folder / "1_01_01.png", folder / "1_07_07.png")
    test_all(root, ckpts)
    second = tiles(root)
    assert "1_07_07.png" not in second and len(second) == 27
    test_all(root, ckpts)
    assert tiles(root) == second
    join_all(root)


def test_foreign_lr_tile_is_named_and_sliced_away(root, ckpts, capsys):
    folder = root / TEST / LR / TILES
    shutil.copy(folder / "1_01_01.png", folder / "1_07_07.png")
    (line,) = left_out(fails(capsys, test_all, root, ckpts))
    assert "1_07_07.png" in line and "slice_images_w_overlapping.py" in line
    slice_all(root)
    test_all(root, ckpts)
    assert len(tiles(root)) == 27


def test_images_that_cannot_be_made_are_named_and_the_others_made(root, ckpts, capsys):
    folder = root / TEST / LR
    (folder / TILES / "0_02_02.png").unlink()
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "camera.heic").touch()
    printed = fails(capsys, test_all, root, ckpts)
    lines = left_out(printed)
    assert all(any(name in line for line in lines) for name in ("0_02_02.png", "link.png"))
    assert any("broken.png" in line for line in lines)
    assert len(tiles(root)) == 18


def test_tiles_cut_short_are_made_again(root, ckpts):
    test_all(root, ckpts)
    before = tiles(root)
    (output(root) / "1_01_01.png").write_bytes(b"")
    test_all(root, ckpts)
    assert tiles(root)["1_01_01.png"][1] == before["1_01_01.png"][1]


# Edges by hand --------------------------------------------------------------------------------


def test_predicted_edges_given_back_give_the_same_image(root, ckpts, capsys):
    test_all(root, ckpts)
    first = tiles(root)
    test_all(root, ckpts, name="edges")
    folder = output(root) / main.EDGES
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "2.png"]
    assert "Edges predicted: 3 images, in " in capsys.readouterr().out
    test_all(root, ckpts, "--edges", folder)
    given = tiles(root)
    for name, (changed, _) in given.items():
        tile = read_image(output(root) / name)
        assert changed != first[name][0]
        (output(root) / name).write_bytes(first[name][1])
        assert (tile == read_image(output(root) / name)).all()


def test_edited_edges_change_the_image_and_are_known_again(root, ckpts):
    folder = output(root) / main.EDGES
    test_all(root, ckpts, name="edges")
    test_all(root, ckpts, "--edges", folder)
    first = tiles(root)
    test_all(root, ckpts, "--edges", folder)
    assert tiles(root) == first
    edited = 255 - read_image(folder / "1.png")
    save(folder, "1.png", edited[..., 0])  # as grey, which drawing programs write
    test_all(root, ckpts, "--edges", folder)
    second = tiles(root)
    for name, kept in first.items():
        assert (second[name] == kept) is not name.startswith("1_")
    join_all(root)
    test_all(root, ckpts)  # predicted ones again
    assert all(tiles(root)[name][1] != kept[1] for name, kept in first.items())


def test_edges_that_are_missing_or_of_another_size_are_named(root, ckpts, tmp_path, capsys):
    save(tmp_path / "drawn", "0.png", np.zeros((96, 128), np.uint8))
    save(tmp_path / "drawn", "1.png", np.zeros((24, 32), np.uint8))
    lines = left_out(fails(capsys, test_all, root, ckpts, "--edges", tmp_path / "drawn"))
    assert len(lines) == 2
    assert "drawn/1.png: 32x24 pixels instead of 128x96" in lines[0]
    assert "drawn/2.png: missing" in lines[1] and "main.py edges" in lines[1]
    assert len(tiles(root)) == 9


def test_edges_that_are_there_are_the_users_own(root, ckpts, capsys):
    test_all(root, ckpts, name="edges")
    drawn = output(root) / main.EDGES / "1.png"
    save(drawn.parent, drawn.name, np.zeros((96, 128, 3), np.uint8))
    (output(root) / main.EDGES / "2.png").unlink()
    before = drawn.read_bytes()
    test_all(root, ckpts, name="edges")
    assert drawn.read_bytes() == before
    assert "Edges predicted: 1 image, 2 there already, in" in capsys.readouterr().out


def test_edges_of_an_image_replaced_since_are_named(root, ckpts, capsys):
    test_all(root, ckpts, name="edges")
    path = lr_image(root, 1)
    save(path.parent, path.name, read_image(path)[::-1])
    slice_all(root)
    for name, more in (("edges", ()), ("test", ("--edges", output(root) / main.EDGES))):
        (line,) = left_out(fails(capsys, test_all, root, ckpts, *more, name=name))
        assert "edges/1.png" in line and "remove it" in line
    (output(root) / main.EDGES / "1.png").unlink()
    test_all(root, ckpts, name="edges")
    test_all(root, ckpts, "--edges", output(root) / main.EDGES)


# Evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def evaluated(root, ckpts, capsys):
    test_all(root, ckpts)
    join_all(root)
    capsys.readouterr()
    return root


def rows(root):
    path = output(root) / JOINED / "metrics.csv"
    return [row["image"] for row in csv.DictReader(path.open(encoding="utf-8"))]


def test_missing_joined_image_is_named_and_the_others_compared(evaluated, capsys):
    joined(evaluated, 0).unlink()
    (line,) = left_out(fails(capsys, evaluate, evaluated))
    assert "image_600px_0.png" in line and "join_slice_images.py" in line
    assert rows(evaluated) == ["1", "mean"]


def test_a_copy_of_a_joined_image_is_not_in_its_way(evaluated):
    Image.open(joined(evaluated, 0)).convert("RGB").save(joined(evaluated, 0).with_suffix(".jpg"))
    evaluate(evaluated)
    assert rows(evaluated) == ["0", "1", "mean"]


def test_joined_image_of_an_image_replaced_since_is_not_compared(evaluated, capsys):
    path = lr_image(evaluated, 0)
    save(path.parent, path.name, read_image(path)[::-1])
    (line,) = left_out(fails(capsys, evaluate, evaluated))
    assert str(joined(evaluated, 0)) in line and "slice, test and join again" in line


def test_new_tiles_are_not_evaluated_before_they_are_joined(evaluated, ckpts, other, capsys):
    test_all(evaluated, ckpts, "--generator", other)
    lines = left_out(fails(capsys, evaluate, evaluated))
    assert len(lines) == 2 and all("join_slice_images.py" in line for line in lines)


def test_lr_image_made_from_a_ground_truth_replaced_since_is_named(tmp_path, ckpts, capsys):
    root = tmp_path / "root"
    for number in range(2):
        save(root / TEST / HR, f"{number}.png", photograph(number)[:96, :128])
    slice_all(root)
    test_all(root, ckpts)
    join_all(root)
    save(root / TEST / HR, "0.png", photograph(3)[:96, :128])
    for step in (lambda: test_all(root, ckpts), lambda: evaluate(root)):
        (line,) = left_out(fails(capsys, step))
        assert "0.png" in line and "slice_images_w_overlapping.py" in line


def test_names_that_are_not_utf_8_are_evaluated(evaluated, ckpts):
    for path in [*evaluated.rglob("image_*_0.png"), *evaluated.rglob("0_*.png")]:
        path.unlink()
    name = os.fsdecode(b"caf\xe9.png")
    hr = photograph(0)[:96, :128]
    try:
        save(evaluated / TEST / HR, name, hr)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    save(evaluated / TEST / LR, name, shrunk(hr))
    slice_all(evaluated)
    test_all(evaluated, ckpts)
    join_all(evaluated)
    evaluate(evaluated)
    assert rows(evaluated) == ["1", "caf\\udce9", "mean"]


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
    lines = left_out(fails(capsys, evaluate, evaluated))
    assert len(lines) == 1 and path.name in lines[0]
    assert rows(evaluated) == ["1", "mean"]


def test_no_ground_truth_at_all_is_said(evaluated, capsys):
    shutil.rmtree(evaluated / TEST / HR)
    (line,) = fails(capsys, evaluate, evaluated).splitlines()
    assert str(evaluated / TEST / HR) in line and "no ground truth" in line


def test_table_is_on_disk_before_it_is_printed(evaluated, monkeypatch):
    def closed(_):
        raise BrokenPipeError("as if the terminal were gone")

    monkeypatch.setattr(main, "print_table", closed)
    with pytest.raises(SystemExit):
        evaluate(evaluated)
    assert rows(evaluated) == ["0", "1", "mean"]


def test_every_part_of_the_network_is_measured(root, tmp_path, monkeypatch, capsys):
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
    test_all(root, ckpts)
    join_all(root)
    evaluate(root)
    path = output(root) / JOINED / "metrics.csv"
    mean = list(csv.DictReader(path.open(encoding="utf-8")))[-1]
    for row, suffix in (("SRModel, predicted edges", ""), ("bicubic", " bicubic")):
        cells = re.search(rf"^{row} +(.*)$", printed, re.MULTILINE)[1].split()
        expected = [float(mean[key + suffix]) for key in ("PSNR", "SSIM", "L1", "SSIM original")]
        assert [float(each) for each in cells[:4]] == pytest.approx(expected, abs=1e-4)
    assert re.search(r"^PreModel, true edges +\d", printed, re.MULTILINE)
    assert re.search(r"^SRModel, no edges +\d", printed, re.MULTILINE)


# Processes, Ctrl-C ----------------------------------------------------------------------------


def test_processes_share_the_images_out(root, ckpts, tmp_path):
    given = ["test", "--root", root, "--ckpts", ckpts]
    _, printed = Launched(tmp_path / "log", command, *given, processes=2).wait()
    assert len(list(output(root).glob("*.png"))) == 27
    assert printed.count("Tested: 3 images") == 1


def test_messages_of_several_processes_are_printed_once(root, ckpts, tmp_path):
    for name in (0, 1):  # an image of either process
        (root / TEST / LR / TILES / f"{name}_02_02.png").unlink()
    (root / TEST / LR / "camera.heic").touch()
    given = ["test", "--root", root, "--ckpts", ckpts]
    statuses, printed = Launched(tmp_path / "log", command, *given, processes=2).wait()
    assert 1 in statuses
    assert len(list(output(root).glob("*.png"))) == 9
    for word in ("0_02_02.png", "1_02_02.png", "camera.heic", "Tested: 1 image, 3"):
        assert printed.count(word) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_in_one_line_and_the_rest_can_be_made_later(root, ckpts, tmp_path):
    for number in range(3, 40):
        save(root / TEST / LR, f"image_600px_{number}.png", shrunk(photograph(number)[:96, :128]))
    slice_all(root)
    given = ["test", "--root", root, "--ckpts", ckpts]
    testing = Launched(tmp_path / "log", command, *given)
    while testing.processes[0].is_alive() and not (output(root) / "0_03_03.png").exists():
        time.sleep(0.01)
    os.kill(testing.processes[0].pid, signal.SIGINT)
    statuses, printed = testing.wait()
    assert statuses == [130] and "Traceback" not in printed
    assert printed.splitlines()[-1] == "Interrupted."
    before = len(tiles(root))
    assert 9 <= before < 40 * 9
    assert not list(output(root).rglob(".*"))
    test_all(root, ckpts)
    assert len(tiles(root)) == 40 * 9


# The command line -----------------------------------------------------------------------------


def script(text, folder, *options):
    """Runs a copy of main.py that lies beside the others; returns exit status and output."""
    copy = folder / "repository"
    if not copy.exists():
        copy.mkdir()
        for module in REPOSITORY.glob("*.py"):
            shutil.copy(module, copy)
    (copy / "main.py").write_text(text)
    (status,), printed = Launched(folder / "log", run_copy, copy, folder, options).wait()
    return status, printed


def run_copy(copy, folder, options):
    os.chdir(folder)
    for module in copy.glob("*.py"):
        sys.modules.pop(module.stem, None)
    sys.path.insert(0, str(copy))
    sys.argv = [str(copy / "main.py"), *map(str, options)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_main_runs_what_its_last_lines_leave_uncommented(root, ckpts, tmp_path):
    text = (REPOSITORY / "main.py").read_text()
    lines = re.findall(r"^ {8,}(# )?(\w+)\(.*\)$", text, re.MULTILINE)[-6:]
    names = ["train_edges", "pretrain", "train", "test", "evaluate", "upscale"]
    assert [name for _, name in lines] == names
    assert [name for mark, name in lines if not mark] == ["test"]
    options = ["--root", root, "--ckpts", ckpts]
    assert script(text, tmp_path, *options)[0] == 0
    assert len(list(output(root).glob("*.png"))) == 27
    join_all(root)
    shutil.copy(lr_image(root, 1), tmp_path / "holiday.jpg")
    text = text.replace("            test()\n", "            # test()\n")
    for name, word in (
        ("# evaluate()", "metrics.csv"),
        ('# upscale("holiday.jpg")', "Upscaled: 1"),
    ):
        assert name in text
        status, printed = script(text.replace(name, name[2:]), tmp_path, *options)
        assert status == 0 and word in printed
    assert read_image(tmp_path / "holiday_x4.png").shape == (96, 128, 3)
    lr_image(root, 0).write_bytes(b"no image")  # what one line leaves out does not stop the next
    text = text.replace("# test()", "test()").replace("# evaluate()", "evaluate()")
    status, printed = script(text, tmp_path, *options)
    assert status == 1 and "Tested: " in printed and "Evaluated: " in printed


def test_a_folder_without_images_is_named(tmp_path, ckpts):
    status, printed = script(
        (REPOSITORY / "main.py").read_text(), tmp_path, "test", "--ckpts", ckpts
    )
    (line,) = printed.splitlines()
    assert status == 1
    assert str(tmp_path / "repository" / TEST / LR) in line
    assert "slice_images_w_overlapping.py" in line and "main.py upscale" in line


@pytest.mark.parametrize("name", ["test", "edges", "evaluate", "upscale"])
def test_first_time_paths_answer_with_what_to_do(tmp_path, ckpts, capsys, name):
    (line,) = fails(capsys, command, name, "--root", tmp_path, "--ckpts", ckpts).splitlines()
    assert str(tmp_path) in line or "main.py upscale IMAGE" in line


def test_missing_weights_are_named(root, tmp_path, capsys):
    line = fails(capsys, test_all, root, tmp_path / "none").splitlines()[-1]
    assert str(tmp_path / "none" / "SRModel_gen.pth") in line


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main.parse_options(list(arguments))
    return ended.value.code, capsys.readouterr()


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, printed = shown(capsys, "--help")
    assert status == 0
    entries = re.split(r"\n  (?=--)", printed.out)[1:]
    options = vars(main.parse_options([]))
    seen = set()
    for entry in entries:
        text = " ".join(entry.split())
        name = re.match(r"--([a-z-]+)", text)[1].replace("-", "_")
        default = options[name]
        seen.add(name)
        assert f"(default: {default})" in text, text
    assert seen == options.keys() - {"command", "images"}
    for stage in main.all_stages():  # what "see below" means
        row = re.search(rf"^ +{stage.name} +(.*)$", printed.out, re.MULTILINE)[1].split()
        assert row[0] == str(stage.recipe.steps) and str(stage.recipe.learning_rate) in row


@pytest.mark.parametrize(
    "given",
    [
        *(["--epochs", value] for value in ("nan", "inf", "0", "-1")),
        *(["--learning-rate", value] for value in ("nan", "-1e-4", "fast")),
        *(["--steps", value] for value in ("0", "-5", "1.5")),
        *(["--seed", value] for value in ("-1", "x", "9" * 20)),
        *(["--workers", "-1"], ["--held-out", "-3"], ["--batch-size", "0"]),
        *(["--crop", value] for value in ("1", "0", "-16")),
        *(["--checkpoint-every", "0"], ["--ckpt", "other.pth"]),  # once a name, not --ckpts
        *(["--jpeg", value] for value in ("1.5", "-0.1", "nan")),
        *(["--device", "tpu"], ["--precision", "fp8"], ["--stage", "All"]),
        *(["--root", "nowhere"], ["dance"], ["test", "image.png"]),
        ["--epochs", "1", "--steps", "1"],
        *(["train", "--fast"], ["edges", "--generator", "a.pth"], ["test", "--output", "a"]),
    ],
    ids=" ".join,
)
def test_odd_values_are_refused_by_the_parser(capsys, given):
    status, printed = shown(capsys, *given)
    assert status == 2
    words = [each for each in given if each.startswith("-")] or given
    assert words[0].lstrip("-") in printed.err.splitlines()[-1] or given[-1] in printed.err


@pytest.mark.parametrize("given", [["--jpeg", "0.00"], ["--jpeg", "1"], ["--held-out", "0"]])
def test_values_at_the_edge_are_taken(given):
    assert vars(main.parse_options(given))[given[0][2:].replace("-", "_")] == float(given[1])


def test_grey_image_comes_back_with_equal_channels(root, ckpts):
    lr = read_image(lr_image(root, 1))
    save(root / TEST / LR, "image_600px_1.png", np.repeat(lr[..., :1], 3, axis=2))
    slice_all(root)
    test_all(root, ckpts)
    join_all(root)
    sr = read_image(joined(root, 1))
    assert (sr == sr[..., :1]).all() and sr.shape == tuple(
        SCALE * side if axis < 2 else side for axis, side in enumerate(lr.shape)
    )
