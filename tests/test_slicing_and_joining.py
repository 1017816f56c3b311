import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    REPOSITORY,
    failing,
    join_all,
    photograph,
    save,
    shrunk,
    skipped,
    slice_all,
    status_of,
)
from PIL import Image, ImageCms

import files
from images import image_size, read_image, write_png
from pipeline import Stamp
from tiles import (
    HR,
    JOINED,
    LR,
    OUTPUT,
    SCALE,
    TEST,
    TILES,
    TRAINING,
    Grid,
    cut_tile,
    find_images,
    find_tiles,
    tile_name,
)

SCRIPTS = ["slice_images_w_overlapping.py", "join_slice_images.py"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_hr_tiles(root, name, hr, weights="w1", tiles=6, pad=8, naming=tile_name):
    """Writes the tiles that `main.py test` would have made of an image, if `hr` came out.

    Args:
        weights: that made them; None: another program, which knows no stamps.
    """
    path = find_images(root / TEST / LR)[0][name]
    grid, output = Grid(*image_size(path), tiles, pad), root / TEST / LR / OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    for folder in (output, output / name):
        for tile in find_tiles(folder).get(name, {}).values():
            tile.unlink()
    stamp = "" if weights is None else str(Stamp(files.digest(path), str(grid), weights))
    for at in grid:
        write_png(output / naming(name, *at), cut_tile(hr, grid, *at, SCALE), stamp)


def joined(root, name="1490"):
    return root / TEST / LR / OUTPUT / JOINED / f"candidate_{name}.png"


@pytest.fixture
def pair(tmp_path):
    """A root with one training pair of 60 x 48 LR pixels."""
    hr = photograph(0)[:192, :240]
    save(tmp_path / TRAINING / HR, "image_2400px_0006.png", hr)
    save(tmp_path / TRAINING / LR, "image_600px_0006.png", shrunk(hr))
    return tmp_path


@pytest.fixture
def tested(tmp_path):
    """A root whose test output holds the tiles of a 240 x 192 image; and that image."""
    hr = photograph(2)[:192, :240]
    save(tmp_path / TEST / LR, "image_600px_1490.png", shrunk(hr))
    put_hr_tiles(tmp_path, "1490", hr)
    return tmp_path, hr


# Slicing --------------------------------------------------------------------------------------


def test_tiles_are_those_of_the_image_as_it_is(pair, capsys):
    lr, hr = (pair / TRAINING / size / TILES for size in (LR, HR))
    path = pair / TRAINING / LR / "image_600px_0006.png"
    for change in (lambda image: image, lambda image: 255 - image):
        save(path.parent, path.name, change(read_image(path)))
        os.utime(path, (0, 0))
        slice_all(pair)
        assert len(content(lr)) == len(content(hr)) == 36
        tile = cut_tile(read_image(path), Grid(48, 60), 2, 6)
        assert (read_image(lr / "0006_02_06.png") == tile).all()
        assert read_image(hr / "0006_02_06.png").shape == (64, 72, 3)
    assert str(lr) in capsys.readouterr().out


def test_other_grids_leave_no_old_tiles_but_those_of_other_images(tmp_path):
    for name in ("1", "1_2", "a", "a_b"):
        save(tmp_path / TRAINING / HR, f"{name}.png", photograph(0, 96))
    slice_all(tmp_path)
    folder = tmp_path / TRAINING / LR / TILES
    before = content(folder)
    assert len(before) == 4 * 36
    for name in ("1_2", "a_b"):
        (tmp_path / TRAINING / HR / f"{name}.png").unlink()
        (tmp_path / TRAINING / LR / f"{name}.png").unlink()
    for _ in range(2):
        slice_all(tmp_path, "--tiles", 2)
        after = content(folder)
        assert len(after) == 2 * 36 + 2 * 4
        assert all(after[name] == before[name] for name in after if name[:3] in ("1_2", "a_b"))
        shutil.copy(folder / "a_01_01.png", folder / "a_03_01.png")  # as after an interruption


def other_file_names():
    names = ["фото.png", "trip_2400px.png", "n" * 241 + ".png", "a\nb[1].png", "final.png"]
    return [*names, "50% {id}.png", os.fsdecode(b"caf\xe9.png")]


@pytest.mark.parametrize("name", other_file_names(), ids=range(len(other_file_names())))
def test_any_file_name_will_do(tmp_path, name):
    hr = photograph(0, 96)
    try:
        save(tmp_path / TRAINING / HR, name, hr)
    except OSError:
        pytest.skip("this file system does not take such names")
    save(tmp_path / TEST / HR, name, hr)
    for _ in range(2):
        slice_all(tmp_path)
        folders = [tmp_path / TRAINING / size / TILES for size in (LR, HR)]
        assert content(folders[0]).keys() == content(folders[1]).keys()
        assert len(content(folders[0])) == 36
    put_hr_tiles(tmp_path, name[:-4], hr)
    for _ in range(2):
        join_all(tmp_path)
        assert (read_image(joined(tmp_path, name[:-4])) == hr).all()


@pytest.mark.parametrize("subset", [TRAINING, TEST])
def test_missing_lr_image_is_made_by_bicubic(tmp_path, capsys, subset):
    hr = photograph(1)[:193, :242]  # no multiple of four
    path = save(tmp_path / subset / HR, "image_2400px_0001.png", hr)
    slice_all(tmp_path)
    assert "bicubic" in capsys.readouterr().out
    made = tmp_path / subset / LR / "image_600px_0001.png"
    assert (read_image(made) == shrunk(hr[:192, :240])).all()
    Image.fromarray(hr[::-1]).save(path)
    slice_all(tmp_path)  # the made image and its HR still fit each other
    expected = shrunk(hr[::-1][:192, :240])
    assert (read_image(made) == expected).all()
    tile = read_image(tmp_path / subset / LR / TILES / "0001_01_01.png")
    assert (tile == cut_tile(expected, Grid(48, 60), 1, 1)).all()


def test_an_lr_image_of_the_users_own_is_kept(pair):
    path = save(pair / TRAINING / LR, "image_600px_0006.png", photograph(1)[:48, :60])
    before = path.read_bytes()
    slice_all(pair)
    assert path.read_bytes() == before


def test_a_made_lr_image_that_was_edited_is_kept(tmp_path):
    save(tmp_path / TEST / HR, "a.png", photograph(1, 96))
    slice_all(tmp_path)
    path = tmp_path / TEST / LR / "a.png"
    with Image.open(path) as made:
        made.transpose(Image.Transpose.ROTATE_180).save(path, exif=made.getexif())
    before = path.read_bytes()
    slice_all(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("subset", [TRAINING, TEST])
def test_benchmark_names_and_sizes_that_are_no_multiple_of_four(tmp_path, capsys, subset):
    hr = photograph(1)[:195, :242]
    save(tmp_path / subset / HR, "0001.png", hr)
    save(tmp_path / subset / LR, "0001x4.png", shrunk(hr[:192, :240]))
    slice_all(tmp_path)
    assert "bicubic" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / subset / LR).glob("*.png")] == ["0001x4.png"]
    lr_tiles = find_tiles(tmp_path / subset / LR / TILES)
    assert lr_tiles.keys() == {"0001"}
    assert image_size(lr_tiles["0001"][6, 6]) == (16, 18)
    if subset == TRAINING:
        grid = Grid(48, 60)
        for at, path in find_tiles(tmp_path / subset / HR / TILES)["0001"].items():
            assert (read_image(path) == cut_tile(hr[:192, :240], grid, *at, SCALE)).all()
    else:
        put_hr_tiles(tmp_path, "0001", hr[:192, :240])
        join_all(tmp_path)
        assert (read_image(joined(tmp_path, "0001")) == hr[:192, :240]).all()


def test_what_cannot_be_used_is_named_and_the_others_cut(pair, capsys):
    training, test = pair / TRAINING, pair / TEST / LR
    save(training / LR, "alone.png", photograph(1, 60))
    save(training / LR, "odd.png", photograph(1, 60))
    save(training / HR, "odd.png", photograph(1, 239))
    save(training / HR, "dot.png", photograph(1, 3))
    save(test, "speck.png", photograph(1, 2))
    save(test, "n" * 250 + ".png", photograph(0, 60))
    (test / "broken.jpg").write_text("no")
    (test / "folder.png").mkdir()
    (test / "empty.png").touch()
    for folder in (test, training / HR):
        (folder / "link.png").symlink_to("nowhere.png")
    (training / LR / "linked.png").symlink_to("nowhere.png")
    save(training / HR, "linked.png", photograph(1, 96))
    deep = photograph(0, 60)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(test / "deep.png")
    printed = failing(capsys, slice_all, pair)
    expected = ["alone.png", f"{HR}/odd.png", "dot.png", "speck.png", "broken.jpg", "folder.png"]
    expected += ["empty.png", f"{TEST}/{LR}/link.png", f"{HR}/link.png", "linked.png", "nnn"]
    assert len(skipped(printed)) == len(expected)
    assert all(any(name in line for line in skipped(printed)) for name in expected)
    assert "deep.png: reduced to 8 bits" in printed  # noted, not skipped
    assert len(content(pair / TRAINING / LR / TILES)) == len(content(test / TILES)) == 36
    assert (training / LR / "linked.png").is_symlink()
    assert "Sliced 2 images, 11 skipped" in printed.splitlines()[-1]


def test_two_processes_do_not_disturb_each_other(pair):
    for number in range(8):
        save(pair / TRAINING / HR, f"{number}.png", photograph(number, 200))
    given = [sys.executable, str(REPOSITORY / SCRIPTS[0]), "--root", str(pair)]
    processes = [subprocess.Popen(given) for _ in range(2)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    for size, scale in ((LR, 1), (HR, SCALE)):
        sources = find_images(pair / TRAINING / size)[0]
        for name, found in find_tiles(pair / TRAINING / size / TILES).items():
            image, grid = read_image(sources[name]), Grid(*image_size(sources[name]))
            grid = Grid(grid.height // scale, grid.width // scale)
            assert set(found) == set(grid)
            for at, path in found.items():
                assert (read_image(path) == cut_tile(image, grid, *at, scale)).all()
        assert not list((pair / TRAINING / size / TILES).glob(".*"))


# Joining --------------------------------------------------------------------------------------


def test_joining_gives_the_image_back_and_tells_what_it_was_made_from(tested, capsys):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for _ in range(2):  # the second time from the tiles that were moved
        join_all(root)
        assert (read_image(joined(root)) == hr).all()
        assert len(content(output / "1490")) == 36 and not list(output.glob("*.png"))
        assert str(output / JOINED) in capsys.readouterr().out
    lr = root / TEST / LR / "image_600px_1490.png"
    assert Stamp.read(joined(root)) == Stamp(files.digest(lr), "6x6+8", "w1")


@pytest.mark.parametrize("weights", ["w1", None], ids=["own", "foreign"])
@pytest.mark.parametrize("grid", [(6, 8), (2, 40), (5, 7), (6, 0), (1, 0)], ids=str)
def test_the_tiles_alone_tell_grid_and_overlap(tested, capsys, grid, weights):
    root, hr = tested
    naming = tile_name if weights else lambda name, row, col: f"{name}_{row}_{col}.png"
    put_hr_tiles(root, "1490", hr, weights, *grid, naming)
    join_all(root)
    assert (read_image(joined(root)) == hr).all()
    note = "1490.png: " in capsys.readouterr().err
    assert note is (weights is None)
    assert (Stamp.read(joined(root)) == Stamp()) is (weights is None)


def test_incomplete_images_are_named_and_the_others_joined(tested, capsys):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for name, spoil in {
        "lacking": lambda tile: tile.with_name("lacking_03_04.png").unlink(),
        "strange": lambda tile: shutil.copy(tile, tile.with_name("strange_07_01.png")),
        "resized": lambda tile: save(tile.parent, tile.name, hr[:44, :44]),
        "halved": lambda tile: tile.write_bytes(tile.read_bytes()[:1000]),
        "untested": lambda tile: [path.unlink() for path in output.glob("untested_*")],
    }.items():
        save(root / TEST / LR, f"{name}.png", shrunk(hr))
        put_hr_tiles(root, name, hr)
        spoil(output / f"{name}_01_01.png")
    save(output, "nobody_01_01.png", hr[:40, :40])
    (root / TEST / LR / "link.png").symlink_to("nowhere.png")
    printed = failing(capsys, join_all, root)
    expected = ["lacking.png", "strange.png", "resized", "halved", "untested", "nobody_01", "link"]
    assert len(skipped(printed)) == len(expected)
    assert all(any(name in line for line in skipped(printed)) for name in expected)
    assert list(content(output / JOINED)) == ["candidate_1490.png"]
    assert (output / "lacking_01_01.png").exists()
    assert "Joined 1 image, 7 skipped" in printed


def test_ids_that_begin_alike_are_kept_apart(tmp_path):
    hr = {name: photograph(n)[:96, :128] for n, name in enumerate(["a", "a_1", "1", "1_1_1"])}
    for name, image in hr.items():
        save(tmp_path / TEST / LR, f"{name}.png", shrunk(image))
        put_hr_tiles(tmp_path, name, image, f"weights-of-{name}", tiles=2)
    for _ in range(2):
        join_all(tmp_path)
        for name, image in hr.items():
            assert (read_image(joined(tmp_path, name)) == image).all()
            assert len(content(tmp_path / TEST / LR / OUTPUT / name)) == 4


def test_seams_vanish_where_neighbours_differ(tested):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    put_hr_tiles(root, "1490", np.full_like(hr, 100), None)
    for (row, col), path in find_tiles(output)["1490"].items():
        write_png(path, read_image(path) + np.uint8(20 * ((row + col) % 2)))
    join_all(root)
    result = read_image(joined(root)).astype(int)
    assert np.abs(np.diff(result, axis=0)).max() == np.abs(np.diff(result, axis=1)).max() == 1


def test_joining_takes_over_what_tiles_cannot_hold(tmp_path):
    hr = photograph(2)[:192, :240]
    lr = np.dstack([shrunk(hr), np.full((48, 60), 255, np.uint8)])
    lr[:10, :, 3] = 0
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB", 5000)).tobytes()
    image = Image.fromarray(lr)
    exif = image.getexif()
    exif[0x010F] = "a camera"
    (tmp_path / TEST / LR).mkdir(parents=True)
    path = tmp_path / TEST / LR / "logo.png"
    image.save(path, icc_profile=profile, exif=exif, dpi=(300, 300))
    save(tmp_path / TEST / LR, "scan.png", shrunk(hr)[..., 0])
    for name in ("logo", "scan"):
        put_hr_tiles(tmp_path, name, hr)  # colourful, as networks may be
    join_all(tmp_path)
    with Image.open(joined(tmp_path, "logo")) as result:
        assert result.mode == "RGBA" and result.info["icc_profile"] == profile
        assert result.getexif()[0x010F] == "a camera"
        assert [round(each) for each in result.info["dpi"]] == [300, 300]
        pixels = np.array(result)
    assert (pixels[..., :3] == hr).all()
    assert (pixels[:32, :, 3] == 0).all() and (pixels[48:, :, 3] == 255).all()
    with Image.open(joined(tmp_path, "scan")) as result:
        assert result.mode == "L"


def refused(root, capsys):
    """Whether joining skips 1490, says what to do, and leaves the joined image as it was."""
    kept = joined(root).read_bytes() if joined(root).exists() else None
    (line,) = skipped(failing(capsys, join_all, root))
    assert "1490" in line and "main.py test" in line
    return kept == (joined(root).read_bytes() if joined(root).exists() else None)


@pytest.mark.parametrize("earlier", [False, True], ids=["", "joined before"])
def test_tiles_of_an_image_that_was_replaced_are_refused(tested, capsys, earlier):
    root, hr = tested
    if earlier:
        join_all(root)
    save(root / TEST / LR, "image_600px_1490.png", shrunk(hr[::-1]))
    assert refused(root, capsys)
    put_hr_tiles(root, "1490", hr[::-1])
    join_all(root)
    assert (read_image(joined(root)) == hr[::-1]).all()


def test_tiles_of_two_sets_of_weights_are_refused(tested, capsys):
    root, hr = tested
    earlier = {path: path.read_bytes() for path in (root / TEST / LR / OUTPUT).glob("*.png")}
    put_hr_tiles(root, "1490", hr, weights="w2")
    for path in list(earlier)[20:]:  # as if the second test had been interrupted
        path.write_bytes(earlier[path])
    assert refused(root, capsys)
    put_hr_tiles(root, "1490", hr, weights="w2")
    join_all(root)
    for path in list(earlier)[:20]:  # fresh ones beside those that were moved
        path.write_bytes(earlier[path])
    assert refused(root, capsys)


# Both scripts ---------------------------------------------------------------------------------


def test_empty_folders_tell_what_to_do(tmp_path, capsys):
    for run, word in ((slice_all, f"{TEST}/{LR}"), (join_all, SCRIPTS[0])):
        (line,) = failing(capsys, run, tmp_path).splitlines()
        assert word in line


@pytest.mark.parametrize("given", [("--pad", "7"), ("--pad", "-2"), ("--tiles", "0")])
def test_odd_grids_are_refused_by_the_parser(tmp_path, capsys, given):
    assert status_of(slice_all, tmp_path, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert given[0] in line
