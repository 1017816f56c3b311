import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, photograph, save, shrunk, status_of
from PIL import Image, ImageCms

import join_slice_images
import slice_images_w_overlapping
from images import image_size, read_image, read_photo, write_png
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
    cut,
    find_images,
    find_tiles,
    tile_name,
    tile_stamp,
)


def slice_all(root, *options):
    slice_images_w_overlapping.main(["--root", str(root), "--workers", "1", *options])


def join_all(root, *options):
    join_slice_images.main(["--root", str(root), "--workers", "1", *options])


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def put_hr_tiles(root, name, hr, weights="w1"):
    """Writes the tiles that `main.py test` would have made of an image, if `hr` came out."""
    path = find_images(root / TEST / LR)[0][name]
    grid, output = Grid.of(path, 6, 8), root / TEST / LR / OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    for folder in (output, output / name):
        for tile in find_tiles(folder).get(name, {}).values():
            tile.unlink()
    for at, tile in cut(hr, grid, SCALE).items():
        stamp = f"{tile_stamp(path, grid)} | {weights}"
        write_png(output / tile_name(name, *at), tile, stamp)


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


def test_tiles_are_those_of_the_grid(pair):
    slice_all(pair)
    lr, hr = (pair / TRAINING / size / TILES for size in (LR, HR))
    assert len(list(lr.iterdir())) == len(list(hr.iterdir())) == 36
    image = read_image(pair / TRAINING / LR / "image_600px_0006.png")
    parts = cut(image, Grid(48, 60))
    assert (read_image(lr / "0006_02_06.png") == parts[2, 6]).all()
    assert read_image(hr / "0006_02_06.png").shape == (64, 72, 3)


def test_nothing_is_done_twice_and_changes_are_seen(pair):
    folder = pair / TRAINING / LR / TILES
    slice_all(pair)
    first = times(folder)
    slice_all(pair)
    assert times(folder) == first
    path = pair / TRAINING / LR / "image_600px_0006.png"
    image = 255 - read_image(path)
    Image.fromarray(image).save(path)
    os.utime(path, (0, 0))  # older than its tiles, and yet another image
    slice_all(pair)
    assert (read_image(folder / "0006_01_01.png") == cut(image, Grid(48, 60))[1, 1]).all()


def other_file_names():
    names = ["фото.png", "trip_2400px.png", "n" * 241 + ".png", "a\nb[1].png", "final.png"]
    return [*names, os.fsdecode(b"caf\xe9.png")]


@pytest.mark.parametrize("name", other_file_names(), ids=range(len(other_file_names())))
def test_any_file_name_will_do(tmp_path, name):
    hr = photograph(0, 96)
    try:
        save(tmp_path / TRAINING / HR, name, hr)
    except OSError:
        pytest.skip("this file system does not take such names")
    save(tmp_path / TEST / HR, name, hr)
    slice_all(tmp_path)
    folders = [tmp_path / TRAINING / size / TILES for size in (LR, HR)]
    first = [times(folder) for folder in folders]
    assert first[0].keys() == first[1].keys() and len(first[0]) == 36
    slice_all(tmp_path)
    assert [times(folder) for folder in folders] == first
    put_hr_tiles(tmp_path, name[:-4], hr)
    for _ in range(2):
        join_all(tmp_path)
        assert (read_image(joined(tmp_path, name[:-4])) == hr).all()


def test_other_numbers_of_tiles_leave_no_old_ones(pair):
    slice_all(pair)
    slice_all(pair, "--tiles", "2")
    folder = pair / TRAINING / LR / TILES
    assert len(list(folder.iterdir())) == 4
    shutil.copy(folder / "0006_01_01.png", folder / "0006_03_01.png")  # as after an interruption
    slice_all(pair, "--tiles", "2")
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("subset", [TRAINING, TEST])
def test_missing_lr_image_is_made_by_bicubic(tmp_path, capsys, subset):
    hr = photograph(1)[:193, :242]  # no multiple of four
    path = save(tmp_path / subset / HR, "image_2400px_0001.png", hr)
    slice_all(tmp_path)
    assert "bicubic" in capsys.readouterr().out
    made = tmp_path / subset / LR / "image_600px_0001.png"
    assert (read_image(made) == shrunk(hr[:192, :240])).all()
    slice_all(tmp_path)  # the made image and its HR still fit each other
    Image.fromarray(hr[::-1]).save(path)
    slice_all(tmp_path)
    assert (read_image(made) == shrunk(hr[::-1][:192, :240])).all()
    tile = read_image(tmp_path / subset / LR / TILES / "0001_01_01.png")
    assert (tile == cut(shrunk(hr[::-1][:192, :240]), Grid(48, 60))[1, 1]).all()


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
        expected = cut(hr[:192, :240], Grid(48, 60), SCALE)
        for at, path in find_tiles(tmp_path / subset / HR / TILES)["0001"].items():
            assert (read_image(path) == expected[at]).all()
    else:
        put_hr_tiles(tmp_path, "0001", hr[:192, :240])
        join_all(tmp_path)
        assert (read_image(joined(tmp_path, "0001")) == hr[:192, :240]).all()


def test_what_cannot_be_read_is_named_and_the_others_cut(pair, capsys):
    save(pair / TRAINING / LR, "alone.png", photograph(1, 60))
    save(pair / TRAINING / LR, "odd.png", photograph(1, 60))
    save(pair / TRAINING / HR, "odd.png", photograph(1, 239))
    save(pair / TRAINING / HR, "dot.png", photograph(1, 3))
    save(pair / TEST / LR, "speck.png", photograph(1, 2))
    (pair / TEST / LR / "broken.jpg").write_text("no")
    (pair / TEST / LR / "folder.png").mkdir()
    (pair / TEST / LR / "empty.png").touch()
    (pair / TEST / LR / "link.png").symlink_to("nowhere.png")
    (pair / TRAINING / HR / "link.png").symlink_to("nowhere.png")
    (pair / TRAINING / LR / "linked.png").symlink_to("nowhere.png")
    save(pair / TRAINING / HR, "linked.png", photograph(1, 96))
    path = save(pair / TEST / LR, "cut.png", photograph(1, 100))
    path.write_bytes(path.read_bytes()[:3000])
    assert status_of(slice_all, pair) == 1
    printed = capsys.readouterr()
    skipped = [line for line in printed.err.splitlines() if line.startswith("Left out ")]
    expected = ["alone.png", f"{HR}/odd.png", "dot.png", "speck.png", "broken.jpg", "folder.png"]
    expected += ["empty.png", f"{TEST}/{LR}/link.png", f"{HR}/link.png", "linked.png", "cut.png"]
    assert len(skipped) == len(expected)
    assert all(any(name in line for line in skipped) for name in expected)
    assert len(list((pair / TRAINING / LR / TILES).iterdir())) == 36
    assert (pair / TRAINING / LR / "linked.png").is_symlink()
    assert "Sliced: 1 image, 11 left out, in " in printed.out.splitlines()[-1]


def test_too_long_a_name_is_named(tmp_path, capsys):
    save(tmp_path / TEST / LR, "n" * 250 + ".png", photograph(0, 60))
    save(tmp_path / TEST / LR, "short.png", photograph(0, 60))
    assert status_of(slice_all, tmp_path) == 1
    assert "name too long" in capsys.readouterr().err
    assert len(list((tmp_path / TEST / LR / TILES).iterdir())) == 36


def test_silent_changes_get_a_sentence_each_and_cost_nothing_else(tmp_path, capsys):
    (tmp_path / TEST / LR).mkdir(parents=True)
    deep = photograph(0, 60)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / TEST / LR / "deep.png")
    cmyk = Image.fromarray(photograph(1, 60)).convert("CMYK")
    cmyk.save(tmp_path / TEST / LR / "print.tif")
    frames = [Image.fromarray(photograph(number, 60)) for number in range(2)]
    frames[0].save(tmp_path / TEST / LR / "film.gif", save_all=True, append_images=frames[1:])
    exif = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xffbroken"}
    Image.fromarray(photograph(0, 60)).save(tmp_path / TEST / LR / "camera.jpg", **exif)
    slice_all(tmp_path)
    warnings = capsys.readouterr().err
    for file, word in {"deep.png": "8 bits", "print.tif": "CMYK", "film.gif": "first"}.items():
        assert re.search(f"{re.escape(file)}: .*{word}", warnings)
    assert len(list((tmp_path / TEST / LR / TILES).iterdir())) == 4 * 36


def test_two_processes_do_not_disturb_each_other(pair):
    for number in range(8):
        save(pair / TRAINING / HR, f"{number}.png", photograph(number, 200))
    command = [sys.executable, str(REPOSITORY / "slice_images_w_overlapping.py"), "--root"]
    processes = [subprocess.Popen([*command, str(pair)]) for _ in range(2)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    for size, scale in ((LR, 1), (HR, SCALE)):
        images = find_images(pair / TRAINING / size)[0]
        for name, found in find_tiles(pair / TRAINING / size / TILES).items():
            image = read_image(images[name])
            grid = Grid.of(find_images(pair / TRAINING / LR)[0][name], 6, 8)
            parts = cut(image, grid, scale)
            assert found.keys() == parts.keys()
            assert all((read_image(path) == parts[at]).all() for at, path in found.items())
        assert not list((pair / TRAINING / size / TILES).glob(".*"))


# Joining --------------------------------------------------------------------------------------


def test_joining_gives_the_image_back(tested, capsys):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for _ in range(2):  # the second time from the tiles that were moved
        join_all(root)
        assert (read_image(joined(root)) == hr).all()
        assert len(list((output / "1490").iterdir())) == 36
        assert not list(output.glob("*.png"))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("Joined: 1 image, in ")
        assert last.endswith(f" s: {output / JOINED}")


def test_incomplete_images_are_named_and_the_others_joined(tested, capsys):
    root, hr = tested
    output = root / TEST / LR / OUTPUT
    for name, spoil in {
        "lacking": lambda tile: tile.with_name("lacking_03_04.png").unlink(),
        "strange": lambda tile: shutil.copy(tile, tile.with_name("strange_07_01.png")),
        "resized": lambda tile: write_png(tile, hr[:40, :40], stamp("resized")),
        "halved": lambda tile: tile.write_bytes(tile.read_bytes()[:1000]),
        "foreign": lambda tile: save(tile.parent, tile.name, read_image(tile)),
        "untested": lambda tile: [path.unlink() for path in output.glob("untested_*")],
    }.items():
        save(root / TEST / LR, f"{name}.png", shrunk(hr))
        put_hr_tiles(root, name, hr)

        def stamp(name):
            path = root / TEST / LR / f"{name}.png"
            return f"{tile_stamp(path, Grid(48, 60))} | w1"

        spoil(output / f"{name}_01_01.png")
    save(output, "nobody_01_01.png", hr[:40, :40])
    (root / TEST / LR / "link.png").symlink_to("nowhere.png")
    assert status_of(join_all, root) == 1
    printed = capsys.readouterr()
    left_out = [line for line in printed.err.splitlines() if line.startswith("Left out ")]
    expected = ["lacking_03_04.png", "strange_07_01.png", "resized_01_01.png", "halved_01_01.png"]
    expected += ["foreign_01_01.png", "untested: ", "nobody_01_01.png", "link.png"]
    assert len(left_out) == len(expected)
    assert all(any(name in line for line in left_out) for name in expected)
    assert [path.name for path in (output / JOINED).iterdir()] == ["candidate_1490.png"]
    assert (output / "lacking_01_01.png").exists()
    assert "Joined: 1 image, 8 left out, in " in printed.out


def test_seams_vanish_where_neighbours_differ(tested):
    root, hr = tested
    stamps = f"{tile_stamp(root / TEST / LR / 'image_600px_1490.png', Grid(48, 60))} | w1"
    flat = np.full_like(hr, 100)
    for (row, col), tile in cut(flat, Grid(48, 60), SCALE).items():
        path = root / TEST / LR / OUTPUT / tile_name("1490", row, col)
        write_png(path, tile + np.uint8(20 * ((row + col) % 2)), stamps)
    join_all(root)
    result = read_image(joined(root)).astype(int)
    assert np.abs(np.diff(result, axis=0)).max() <= 1
    assert np.abs(np.diff(result, axis=1)).max() <= 1


def display_p3():
    """A profile that is not sRGB, of RGB colours."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB", 5000)).tobytes()


def test_joining_takes_over_what_tiles_cannot_hold(tmp_path):
    hr = photograph(2)[:192, :240]
    lr = np.dstack([shrunk(hr), np.full((48, 60), 255, np.uint8)])
    lr[:10, :, 3] = 0
    image = Image.fromarray(lr)
    exif = image.getexif()
    exif[0x010F] = "a camera"
    (tmp_path / TEST / LR).mkdir(parents=True)
    profile = display_p3()
    path = tmp_path / TEST / LR / "logo.png"
    image.save(path, icc_profile=profile, exif=exif, dpi=(300, 300))
    put_hr_tiles(tmp_path, "logo", hr)
    slice_all(tmp_path)
    join_all(tmp_path)
    with Image.open(joined(tmp_path, "logo")) as result:
        assert result.mode == "RGBA" and result.size == (240, 192)
        assert result.info["icc_profile"] == profile
        assert result.getexif()[0x010F] == "a camera"
        assert [round(each) for each in result.info["dpi"]] == [300, 300]
        pixels = np.array(result)
    assert (pixels[..., :3] == hr).all()
    assert (pixels[:32, :, 3] == 0).all() and (pixels[48:, :, 3] == 255).all()


def test_grey_comes_back_grey(tmp_path):
    lr = shrunk(photograph(0)[:192, :240])[..., 0]
    save(tmp_path / TEST / LR, "scan.png", lr)
    put_hr_tiles(tmp_path, "scan", photograph(0)[:192, :240])  # colourful, as networks may be
    join_all(tmp_path)
    with Image.open(joined(tmp_path, "scan")) as result:
        assert result.mode == "L"


def test_broken_metadata_do_not_keep_an_image_from_being_joined(tmp_path):
    hr = photograph(2)[:192, :240]
    (tmp_path / TEST / LR).mkdir(parents=True)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\7\0\0\xff\xff\0\0\0\0broken"
    Image.fromarray(shrunk(hr)).save(tmp_path / TEST / LR / "camera.jpg", exif=exif)
    put_hr_tiles(tmp_path, "camera", hr)
    slice_all(tmp_path)
    join_all(tmp_path)
    assert (read_image(joined(tmp_path, "camera")) == hr).all()


# Nothing stale passes -------------------------------------------------------------------------


def refused(root, capsys, *words):
    """Whether joining leaves an image out, with all the words in its line, and writes nothing."""
    kept = joined(root).read_bytes() if joined(root).exists() else None
    assert status_of(join_all, root) == 1
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("Left out "))
    assert all(word in line for word in (*words, "main.py test")), line
    return kept == (joined(root).read_bytes() if joined(root).exists() else None)


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("joining", [False, True])
def test_tiles_of_an_image_that_was_replaced_are_refused(tested, capsys, slicing, joining):
    root, hr = tested
    if joining:
        join_all(root)
    save(root / TEST / LR, "image_600px_1490.png", shrunk(hr[::-1]))
    if slicing:  # and not tested again
        slice_all(root)
    assert refused(root, capsys, "1490_01_01.png", "as it is now")
    put_hr_tiles(root, "1490", hr[::-1])
    join_all(root)
    assert (read_image(joined(root)) == hr[::-1]).all()


def test_tiles_of_two_sets_of_weights_are_refused(tested, capsys):
    root, hr = tested
    earlier = {path: path.read_bytes() for path in (root / TEST / LR / OUTPUT).glob("*.png")}
    put_hr_tiles(root, "1490", hr, weights="w2")
    for path in list(earlier)[20:]:  # as if the second test had been interrupted
        path.write_bytes(earlier[path])
    assert refused(root, capsys, "weights")
    put_hr_tiles(root, "1490", hr, weights="w2")
    join_all(root)
    for path in list(earlier)[:20]:  # fresh ones beside those that were moved
        path.write_bytes(earlier[path])
    assert refused(root, capsys, "weights")


def test_tiles_of_another_image_of_the_same_size_are_refused(tested, capsys):
    root, hr = tested
    save(root / TEST / LR, "other.png", shrunk(hr[::-1]))
    put_hr_tiles(root, "other", hr[::-1])
    for path in (root / TEST / LR / OUTPUT).glob("other_*.png"):
        path.replace(path.with_name(path.name.replace("other", "1490")))
    assert refused(root, capsys, "1490_01_01.png", "as it is now")


def test_result_tells_what_it_was_made_from(tested):
    root, _ = tested
    join_all(root)
    with Image.open(joined(root)) as image:
        assert image.info["Source"].startswith("image_600px_1490.png ")
        assert image.info["Source"].endswith("6x6 pad 8 | w1")


# Errors of the whole run, Ctrl-C, manners -----------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["write_bytes", "mkdir"])
@pytest.mark.parametrize("run", [slice_all, join_all])
def test_run_stops_at_once_when_nothing_can_be_written(
    tested, capsys, monkeypatch, run, where, code
):
    root, hr = tested
    for number in range(5):
        save(root / TEST / LR, f"{number}.png", shrunk(hr))
        put_hr_tiles(root, str(number), hr)
    calls = []

    def fail(path, *_, **__):
        calls.append(path)
        time.sleep(0.05)  # the others have the time to hear of it
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, where, fail)
    with pytest.raises(SystemExit) as end:
        run(root)
    monkeypatch.undo()
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    folder = TILES if run is slice_all else OUTPUT
    assert folder in last and os.strerror(code) in last and "; " in last
    assert len(calls) <= 2  # one job may have begun before the first was known to fail
    assert not list(root.rglob(".*.tmp"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_folder_is_named(pair, capsys):
    folder = pair / TRAINING / LR
    folder.chmod(0o500)
    with pytest.raises(SystemExit) as end:
        slice_all(pair)
    folder.chmod(0o700)
    assert end.value.code == 1
    assert str(folder) in capsys.readouterr().err


@pytest.mark.parametrize(("script", "run"), [
    (slice_images_w_overlapping, slice_all), (join_slice_images, join_all),
])  # fmt: skip
def test_ctrl_c_ends_in_one_line(tested, capsys, monkeypatch, script, run):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "read_photo", interrupt)
    with pytest.raises(SystemExit) as end:
        run(tested[0])
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_slicing_goes_on_after_a_real_ctrl_c(tmp_path):
    for number in range(20):
        save(tmp_path / TRAINING / HR, f"{number}.png", photograph(number))
    command = [sys.executable, str(REPOSITORY / "slice_images_w_overlapping.py")]
    command += ["--workers", "1", "--root", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / TRAINING / HR / TILES).exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "Interrupted." and "Traceback" not in printed
    assert not list(tmp_path.rglob(".*"))
    slice_all(tmp_path)
    for size in (LR, HR):
        assert len(list((tmp_path / TRAINING / size / TILES).iterdir())) == 20 * 36


def test_summary_tells_how_many_how_long_and_where(pair, capsys):
    slice_all(pair)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"Sliced: 1 image, in \d+\.\d s: {re.escape(str(pair))}/.*/{TILES}", last)


def test_empty_folders_tell_what_to_do(tmp_path, capsys):
    for run, word in ((slice_all, f"{TEST}/{LR}"), (join_all, "slice and test")):
        with pytest.raises(SystemExit) as end:
            run(tmp_path)
        assert end.value.code == 1
        assert word in capsys.readouterr().err


COMMON = [("--workers", "-1"), ("--root", "nowhere")]
GRIDS = [("--tiles", "0"), *(("--pad", value) for value in ("7", "-2", "2.0", "nan", ""))]


@pytest.mark.parametrize(
    ("run", "options"), [*product([slice_all, join_all], COMMON), *product([slice_all], GRIDS)]
)
def test_odd_values_are_refused_by_the_parser(tmp_path, capsys, run, options):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_damaged_profile_is_left_out_with_a_sentence(tmp_path):
    hr = photograph(2)[:192, :240]
    (tmp_path / TEST / LR).mkdir(parents=True)
    path = tmp_path / TEST / LR / "a.png"
    Image.fromarray(shrunk(hr)).save(path, icc_profile=b"no profile")
    put_hr_tiles(tmp_path, "a", hr)
    assert read_photo(path).notes
    join_all(tmp_path)
