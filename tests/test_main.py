import csv
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, REPOSITORY, photograph, run, save, shrunk
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import ablation
import join_slice_images
import main
import slice_images_w_overlapping
from models import EdgeGenerator, Generator, SRResNet, save_network
from tiles import HR, JOINED, LR, OUTPUT, TEST, read_picture, write_png


@pytest.fixture
def root(tmp_path):
    """A root with three sliced test pictures, two of them with their truth."""
    for number in range(3):
        hr = photograph(number)[:96, :128]
        save(tmp_path / TEST / LR, f"image_600px_{number}.png", shrunk(hr))
        if number < 2:
            save(tmp_path / TEST / HR, f"image_2400px_{number}.png", hr)
    slice_images_w_overlapping.main(["--root", str(tmp_path), "--tiles", "3"])
    return tmp_path


def command(name, root, ckpts, *more):
    options = ["--root", root, "--ckpts", ckpts, "--tiles", 3, *more]
    main.configure([name, *map(str, options)])()


def test_from_tiles_to_joined_pictures_and_figures(root, ckpts, capsys):
    command("test", root, ckpts)
    output = root / TEST / LR / OUTPUT
    assert len(list(output.glob("*.png"))) == 27
    assert read_picture(output / "2_01_03.png").shape == (64, 76, 3)
    assert join_slice_images.main(["--root", str(root), "--tiles", "3"]) == 0
    assert read_picture(output / JOINED / "candidate_1.png").shape == (96, 128, 3)
    command("evaluate", root, ckpts)
    with (output / JOINED / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["0", "1", "mean"]
    assert "bicubic" in capsys.readouterr().out

    sr = read_picture(output / JOINED / "candidate_1.png")
    hr = read_picture(root / TEST / HR / "image_2400px_1.png")
    lr = read_picture(root / TEST / LR / "image_600px_1.png")
    bicubic = np.asarray(Image.fromarray(lr).resize((128, 96), Image.Resampling.BICUBIC))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for suffix, picture in (("", sr), (" bicubic", bicubic)):
        a, b = (rgb2ycbcr(each)[4:-4, 4:-4, 0] for each in (picture, hr))
        figures = {
            "L1": np.abs(picture / 127.5 - hr / 127.5).mean(),
            "SSIM RGB": structural_similarity(picture, hr, channel_axis=2, **how),
            "PSNR": peak_signal_noise_ratio(b, a, data_range=255),
            "SSIM": structural_similarity(a, b, data_range=255, **how),
        }
        for key, value in figures.items():
            assert float(rows[1][key + suffix]) == pytest.approx(value, rel=1e-3)


def test_finished_pictures_are_not_made_again(root, ckpts, tmp_path, monkeypatch):
    made = []
    enlarge = main.enlarge
    monkeypatch.setattr(main, "enlarge", lambda *given: made.append(1) or enlarge(*given))
    command("test", root, ckpts)
    (root / TEST / LR / OUTPUT / "1_02_02.png").unlink()
    command("test", root, ckpts)
    assert len(made) == 4
    join_slice_images.main(["--root", str(root), "--tiles", "3"])
    command("test", root, ckpts)
    assert len(made) == 4
    save_network(Generator(8, 4), tmp_path / "other.pth")
    command("test", root, ckpts, "--ckpt", tmp_path / "other.pth")
    assert len(made) == 7


def test_tiles_of_another_geometry_or_generator_are_replaced(root, ckpts, tmp_path, monkeypatch):
    output = root / TEST / LR / OUTPUT
    command("test", root, ckpts)
    slice_images_w_overlapping.main(["--root", str(root), "--tiles", "2", "--pad", "4"])
    command("test", root, ckpts, "--tiles", 2, "--pad", 4)
    again = ["--root", str(root), "--tiles", "2", "--pad", "4"]
    assert join_slice_images.main(again) == 0
    save_network(Generator(8, 4), tmp_path / "other.pth")

    def killed(path, *_):
        if path.name == "1_02_01.png":
            raise KeyboardInterrupt
        write_png(path, *_)

    monkeypatch.setattr(main, "write_png", killed)
    with pytest.raises(KeyboardInterrupt):
        command("test", root, ckpts, "--ckpt", tmp_path / "other.pth", "--tiles", 2, "--pad", 4)
    assert join_slice_images.main(again) == 1  # not half of either generator
    assert not (output / "1" / "1_02_02.png").exists()


def test_pictures_that_cannot_be_made_are_named_and_the_others_made(root, ckpts):
    tiles = root / TEST / LR / "croppedoverl"
    (tiles / "0_02_02.png").unlink()
    with pytest.raises(main.PictureError, match="0: its tiles"):
        command("test", root, ckpts)
    assert len(list((root / TEST / LR / OUTPUT).glob("*.png"))) == 18


def test_processes_share_the_pictures_out(root, ckpts):
    run("test", "--root", root, "--ckpts", ckpts, "--tiles", 3, processes=2)
    assert len(list((root / TEST / LR / OUTPUT).glob("*.png"))) == 27


def test_every_part_of_the_network_is_measured(root, tmp_path, monkeypatch, capsys):
    save_network(EdgeGenerator(4, 1), tmp_path / "EdgeModel_gen.pth")
    save_network(SRResNet(8, 4), tmp_path / "SRResNet_gen.pth")
    for name in ("PreModel", "SRModel"):
        save_network(Generator(8, 4), tmp_path / f"{name}_gen.pth")
    given = ["ablation.py", "--root", str(root), "--ckpts", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    ablation.main()
    printed = capsys.readouterr().out
    command("test", root, tmp_path)
    join_slice_images.main(["--root", str(root), "--tiles", "3"])
    command("evaluate", root, tmp_path)
    final = root / TEST / LR / OUTPUT / JOINED / "figures.csv"
    mean = list(csv.DictReader(final.open()))[-1]
    for row, suffix in (("predicted edges", ""), ("bicubic", " bicubic")):
        figures = re.search(rf"^{row} +(.*)$", printed, re.MULTILINE)[1].split()
        expected = [float(mean[key + suffix]) for key in ("L1", "SSIM RGB", "PSNR", "SSIM")]
        assert [float(each) for each in figures] == pytest.approx(expected, abs=1e-4)


def test_the_truth_can_take_the_place_of_the_predicted_edges(root, ckpts):
    batch = {
        "lr": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        "lr_edges": torch.zeros(1, 1, 8, 8),
        "hr_edges": torch.rand(1, 1, 32, 32).round(),
    }
    for options, exact in (([], False), (["--true-edges"], True)):
        main.configure(["pretrain", "--root", str(root), "--ckpts", str(ckpts), *options])
        assert torch.equal(main.EdgeStage(CPU)(batch), batch["hr_edges"]) is exact


def script(text, folder, *options):
    """Runs a copy of main.py that lies beside the others, from another folder."""
    copy = folder / "repository"
    if not copy.exists():
        copy.mkdir()
        for module in REPOSITORY.glob("*.py"):
            shutil.copy(module, copy)
    (copy / "main.py").write_text(text)
    return subprocess.run(
        [sys.executable, copy / "main.py", *map(str, options)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_main_runs_what_its_last_lines_leave_uncommented(root, ckpts, tmp_path):
    text = (REPOSITORY / "main.py").read_text()
    lines = re.findall(r"^ +(# )?(\w+)\(\)$", text, re.MULTILINE)[-5:]
    assert [name for _, name in lines] == ["train_edges", "pretrain", "train", "test", "evaluate"]
    assert [name for mark, name in lines if not mark] == ["test"]
    options = ["--root", root, "--ckpts", ckpts, "--tiles", 3]
    assert script(text, tmp_path, *options).returncode == 0
    assert len(list((root / TEST / LR / OUTPUT).glob("*.png"))) == 27
    join_slice_images.main(["--root", str(root), "--tiles", "3"])
    text = text.replace("        test()\n", "        # test()\n").replace(
        "# evaluate()", "evaluate()"
    )
    assert "figures.csv" in script(text, tmp_path, *options).stdout


def test_a_folder_without_pictures_is_named(tmp_path, ckpts):
    done = script((REPOSITORY / "main.py").read_text(), tmp_path, "test", "--ckpts", ckpts)
    assert done.returncode == 1
    assert (
        str(tmp_path / "repository" / "TestSet") in done.stderr and "Traceback" not in done.stderr
    )
