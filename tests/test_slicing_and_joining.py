import os
import shutil

import numpy as np
import pytest
from conftest import photograph, save, shrunk
from PIL import Image

import join_slice_images
import slice_images_w_overlapping
from tiles import HR, JOINED, LR, OUTPUT, SCALE, TEST, TILES, TRAINING, Grid, cut, read_picture


def slice_all(root, *options):
    return slice_images_w_overlapping.main(["--root", str(root), "--workers", "1", *options])


def join_all(root, *options):
    return join_slice_images.main(["--root", str(root), "--workers", "1", *options])


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def pair(tmp_path):
    """A root with one training pair of 60 x 48 LR pixels."""
    hr = photograph(0)[:192, :240]
    save(tmp_path / TRAINING / HR, "image_2400px_0006.png", hr)
    save(tmp_path / TRAINING / LR, "image_600px_0006.png", shrunk(hr))
    return tmp_path


def test_tiles_are_those_of_the_grid(pair):
    assert slice_all(pair) == 0
    lr, hr = (pair / TRAINING / size / TILES for size in (LR, HR))
    assert len(list(lr.iterdir())) == len(list(hr.iterdir())) == 36
    picture = read_picture(pair / TRAINING / LR / "image_600px_0006.png")
    parts = cut(picture, Grid(48, 60))
    assert (read_picture(lr / "0006_02_06.png") == parts[2, 6]).all()
    assert read_picture(hr / "0006_02_06.png").shape == (64, 72, 3)


def test_nothing_is_done_twice_and_changes_are_seen(pair):
    folder = pair / TRAINING / LR / TILES
    slice_all(pair)
    first = times(folder)
    slice_all(pair)
    assert times(folder) == first
    path = pair / TRAINING / LR / "image_600px_0006.png"
    picture = 255 - read_picture(path)
    Image.fromarray(picture).save(path)
    os.utime(path, (0, 0))  # older than its tiles, and yet another picture
    slice_all(pair)
    assert (read_picture(folder / "0006_01_01.png") == cut(picture, Grid(48, 60))[1, 1]).all()


@pytest.mark.parametrize("name", ["фото.png", "trip_2400px.png"])
def test_any_file_name_will_do(tmp_path, name):
    save(tmp_path / TRAINING / HR, name, photograph(0, 96))
    assert slice_all(tmp_path) == 0
    folders = [tmp_path / TRAINING / size / TILES for size in (LR, HR)]
    first = [times(folder) for folder in folders]
    assert first[0].keys() == first[1].keys()
    assert slice_all(tmp_path) == 0
    assert [times(folder) for folder in folders] == first


def test_other_numbers_of_tiles_leave_no_old_ones(pair):
    slice_all(pair)
    slice_all(pair, "--tiles", "2")
    assert len(list((pair / TRAINING / LR / TILES).iterdir())) == 4


def test_missing_lr_picture_is_made_by_bicubic(tmp_path, capsys):
    hr = photograph(1)[:193, :242]  # no multiple of four
    path = save(tmp_path / TRAINING / HR, "image_2400px_0001.png", hr)
    assert slice_all(tmp_path) == 0
    assert "bicubic" in capsys.readouterr().out
    made = tmp_path / TRAINING / LR / "image_600px_0001.png"
    assert (read_picture(made) == shrunk(hr[:192, :240])).all()
    assert slice_all(tmp_path) == 0  # the made picture and its HR still fit each other
    Image.fromarray(hr[::-1]).save(path)
    assert slice_all(tmp_path) == 0
    assert (read_picture(made) == shrunk(hr[::-1][:192, :240])).all()


def test_useless_pictures_are_named_and_the_others_cut(pair, capsys):
    save(pair / TRAINING / LR, "alone.png", photograph(1, 60))
    save(pair / TRAINING / LR, "odd.png", photograph(1, 60))
    save(pair / TRAINING / HR, "odd.png", photograph(1, 239))
    (pair / TEST / LR).mkdir(parents=True)
    (pair / TEST / LR / "broken.jpg").write_text("no")
    path = save(pair / TEST / LR, "cut.png", photograph(1, 100))
    path.write_bytes(path.read_bytes()[:3000])
    assert slice_all(pair) == 1
    complaints = capsys.readouterr().err
    assert all(name in complaints for name in ("alone.png", "odd.png", "broken.jpg", "cut.png"))
    assert len(list((pair / TRAINING / LR / TILES).iterdir())) == 36


@pytest.fixture
def tested(tmp_path):
    """A root whose test output holds the tiles of a 240 x 192 picture; and that picture."""
    hr = photograph(2)[:192, :240]
    save(tmp_path / TEST / LR, "image_600px_1490.png", shrunk(hr))
    for (row, col), tile in cut(hr, Grid(48, 60), SCALE).items():
        save(tmp_path / TEST / LR / OUTPUT, f"1490_{row:02d}_{col:02d}.png", tile)
    return tmp_path, hr


def test_joining_gives_the_picture_back(tested):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for _ in range(2):  # the second time from the tiles that were moved
        assert join_all(root) == 0
        assert (read_picture(output / JOINED / "candidate_1490.png") == hr).all()
        assert len(list((output / "1490").iterdir())) == 36
        assert not list(output.glob("*.png"))


def test_incomplete_pictures_are_named_and_the_others_joined(tested, capsys):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for name, spoil in {
        "lacking": lambda folder: (folder / "lacking_03_04.png").unlink(),
        "strange": lambda folder: save(folder, "strange_07_01.png", hr[:40, :40]),
        "resized": lambda folder: save(folder, "resized_01_01.png", hr[:40, :40]),
    }.items():
        save(root / TEST / LR, f"{name}.png", shrunk(hr))
        for path in output.glob("1490_*.png"):
            shutil.copy(path, output / path.name.replace("1490", name))
        spoil(output)
    save(output, "nobody_01_01.png", hr[:40, :40])
    assert join_all(root) == 1
    complaints = capsys.readouterr().err
    expected = ("lacking_03_04.png", "strange_07_01.png", "resized_01_01.png", "nobody_01_01.png")
    assert all(name in complaints for name in expected)
    assert [path.name for path in (output / JOINED).iterdir()] == ["candidate_1490.png"]
    assert (output / "lacking_01_01.png").exists()


def test_seams_vanish_where_neighbours_differ(tested):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    flat = np.full_like(hr, 100)
    for (row, col), tile in cut(flat, Grid(48, 60), SCALE).items():
        save(output, f"1490_{row:02d}_{col:02d}.png", tile + np.uint8(20 * ((row + col) % 2)))
    join_all(root)
    joined = read_picture(output / JOINED / "candidate_1490.png").astype(int)
    assert np.abs(np.diff(joined, axis=0)).max() <= 1
    assert np.abs(np.diff(joined, axis=1)).max() <= 1
