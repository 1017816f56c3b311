import os
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, command, join_all, photograph, slice_all, status_of
from PIL import Image, ImageCms

import files
import main
from inference import Enlarger
from models import Generator, SRResNet
from pipeline import Stamp
from tiles import JOINED, LR, OUTPUT, TEST
from weights import load_network, save_network

SIDE = 40


@pytest.fixture
def upscale(ckpts, capsys):
    """Runs the command; returns its exit status and what it printed."""

    def run(*arguments):
        given = ["upscale", "--ckpts", str(ckpts), "--precision", "fp32", *map(str, arguments)]
        status = status_of(command, *given)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def image(number=0):
    return Image.fromarray(photograph(number, SIDE))


@pytest.fixture
def a(tmp_path):
    """An image file, a.png."""
    image().save(tmp_path / "a.png")
    return tmp_path / "a.png"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What comes out -------------------------------------------------------------------------------


def test_the_result_is_that_of_slicing_testing_and_joining(upscale, ckpts, tmp_path):
    folder = tmp_path / TEST / LR
    folder.mkdir(parents=True)
    image().save(folder / "a.png")
    slice_all(tmp_path)
    command("test", "--root", tmp_path, "--ckpts", ckpts, "--precision", "fp32")
    join_all(tmp_path)
    assert upscale(folder / "a.png")[0] == 0
    joined = np.asarray(Image.open(folder / OUTPUT / JOINED / "candidate_a.png"))
    alone = np.asarray(Image.open(folder / "a_x4.png"))
    assert alone.shape == (4 * SIDE, 4 * SIDE, 3)
    assert np.abs(joined.astype(int) - alone).max() <= 1


def test_what_an_image_carries_comes_back(upscale, tmp_path):
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[10:30, 10:30] = 255
    Image.fromarray(np.dstack([photograph(0, SIDE), alpha])).save(tmp_path / "logo.png")
    photo = Image.fromarray(photograph(0, SIDE)[:24])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = photo.getexif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    photo.save(tmp_path / "a.jpg", exif=exif, icc_profile=profile, dpi=(300, 300))
    image().convert("CMYK").save(tmp_path / "print.jpg")
    for suffix in ("png", "jpg"):
        status, printed = upscale(tmp_path, "--format", suffix)
        assert status == 0
        assert "print.jpg: converted from CMYK" in printed
        assert ("logo.png: JPEG has no transparency" in printed) is (suffix == "jpg")
        with Image.open(tmp_path / f"a_x4.{suffix}") as result:
            assert result.size == (96, 160) and result.info["icc_profile"] == profile
            assert result.getexif().get(0x010F) == "Maker"
            assert result.getexif().get(0x0112, 1) == 1
            assert round(result.info["dpi"][0]) == 300
    assert Image.open(tmp_path / "logo_x4.png").mode == "RGBA"


ANY_FORMAT = ["png", "jpg", "webp", "tif"]


@pytest.mark.parametrize("by", ["--output", "--format"])
@pytest.mark.parametrize("suffix", ANY_FORMAT)
def test_the_format_is_that_of_output_or_as_asked_for(upscale, tmp_path, a, suffix, by):
    target = tmp_path / (f"b.{suffix}" if by == "--output" else f"a_x4.{suffix}")
    status, printed = upscale(a, by, target if by == "--output" else suffix)
    assert status == 0 and f" s: {target}\n" in printed
    with Image.open(target) as result:
        assert result.format == {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        assert result.size == (4 * SIDE, 4 * SIDE)


# Which network --------------------------------------------------------------------------------


def test_models_have_names_of_their_own(upscale, a, ckpts, tmp_path):
    given = {"": [], "_fast": ["--fast"], "_srgan": ["--model", "srgan"]}
    assert all(upscale(a, *more)[0] == 0 for more in given.values())
    assert names(tmp_path) == sorted(["a.png", *(f"a_x4{ending}.png" for ending in given)])
    network = load_network(ckpts / "SRResNet_gen.pth", SRResNet)  # which needs no edges
    expected = Enlarger(network, None, CPU)(photograph(0, SIDE))
    found = np.asarray(Image.open(tmp_path / "a_x4_fast.png")).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert upscale(a, "--model", "srresnet")[1].count("1 up to date") == 1


def test_a_file_of_weights_can_be_given(upscale, a, tmp_path):
    torch.manual_seed(9)
    save_network(Generator(8, 4), tmp_path / "other.pth")
    assert upscale(a)[0] == 0
    before = (tmp_path / "a_x4.png").read_bytes()
    assert upscale(a, "--generator", tmp_path / "other.pth")[0] == 1
    assert upscale(a, "--generator", tmp_path / "other.pth", "--overwrite")[0] == 0
    assert (tmp_path / "a_x4.png").read_bytes() != before


def test_texture_lies_between_srresnet_and_srgan(a, tmp_path, capsys):
    folder = tmp_path / "own"
    folder.mkdir()
    networks = []
    for seed, name in enumerate(["SRResNet", "SRGAN"]):
        torch.manual_seed(seed)
        networks.append(SRResNet(8, 4))
        save_network(networks[-1], folder / f"{name}_gen.pth")
    parts = [network.state_dict() for network in networks]
    between = SRResNet(8, 4)
    between.load_state_dict(
        {
            k: torch.lerp(v, parts[1][k], 0.25) if v.is_floating_point() else v
            for k, v in parts[0].items()
        }
    )
    targets = [tmp_path / f"{texture}.png" for texture in (0, 0.25, 1)]
    for target in targets:
        given = ["upscale", a, "--ckpts", folder, "--precision", "fp32", "--output", target]
        command(*given, "--model", "srgan", "--texture", target.stem)
        command(*given, "--model", "srgan", "--texture", target.stem)
        assert "1 up to date" in capsys.readouterr().out
    for network, target in zip((networks[0], between, networks[1]), targets, strict=True):
        expected = Enlarger(network.eval(), None, CPU)(photograph(0, SIDE)).astype(int)
        assert np.abs(np.asarray(Image.open(target)) - expected).max() <= 2
    assert status_of(command, *given, "--model", "srgan", "--texture", "0.5") == 1  # another one


def test_edges_can_be_given(upscale, a, tmp_path):
    results = []
    for value in (0, 255):
        Image.new("L", (4 * SIDE, 4 * SIDE), value).save(tmp_path / "edges.png")
        assert upscale(a, "--edges", tmp_path / "edges.png", "--overwrite")[0] == 0
        results.append(np.asarray(Image.open(tmp_path / "a_x4.png")))
    assert (results[0] != results[1]).any()
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "edges.png")
    for wrong in (tmp_path / "edges.png", tmp_path, tmp_path / "none.png"):
        status, printed = upscale(a, "--edges", wrong, "--overwrite")
        assert status in (1, 2) and str(wrong) in printed and "remove" not in printed


def test_transparency_is_enlarged_by_the_network(upscale, ckpts, tmp_path):
    rgb, alpha = photograph(0, SIDE), photograph(1, SIDE)[..., 0]
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "b.png")
    assert upscale(tmp_path / "b.png", "--fast")[0] == 0
    enlarger = Enlarger(load_network(ckpts / "SRResNet_gen.pth"), None, CPU)
    expected = enlarger(np.repeat(alpha[..., None], 3, axis=2))[..., 0]
    found = np.asarray(Image.open(tmp_path / "b_x4_fast.png"))[..., 3]
    assert (found == expected).all()


def test_a_preview_costs_no_second_prediction_of_edges(upscale, a, tmp_path, monkeypatch):
    predicted, original = [], Enlarger.predict_edges

    def predict_edges(*arguments):
        predicted.append(original(*arguments))
        return predicted[-1]

    monkeypatch.setattr(Enlarger, "predict_edges", predict_edges)
    assert upscale(a, "--preview")[0] == 0
    assert names(tmp_path) == ["a.png", "a_x4.png", "a_x4_preview.png"] and len(predicted) == 1


# What is there already ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ANY_FORMAT)
def test_results_are_known_again_whatever_their_format_and_name(upscale, a, tmp_path, suffix):
    target = tmp_path / f"holiday.{suffix}"
    assert upscale(a, "--output", target)[0] == 0
    made = target.read_bytes()
    status, printed = upscale(a, "--output", target)
    assert status == 0 and "1 up to date" in printed and target.read_bytes() == made
    for more in ([], ["--recursive"], ["--output", tmp_path / "large"]):
        assert upscale(tmp_path, *more)[0] == 0
        assert upscale(tmp_path / "*.*", *more)[0] == 0
    assert not list(tmp_path.rglob("holiday_x4*"))
    assert upscale(target, "--fast")[0] == 0  # unless named
    assert (tmp_path / "holiday_x4_fast.png").exists()


def test_nothing_is_overwritten_unasked(upscale, a, tmp_path):
    (tmp_path / "a_x4.png").write_text("mine")
    status, printed = upscale(a)
    assert status == 1 and "a_x4.png" in printed and "--overwrite" in printed
    assert (tmp_path / "a_x4.png").read_text() == "mine"
    assert upscale(a, "--overwrite")[0] == 0
    assert Image.open(tmp_path / "a_x4.png").size == (4 * SIDE, 4 * SIDE)


def test_a_preview_overwrites_nothing_unasked(upscale, a, tmp_path):
    image().save(tmp_path / "cat_preview.png")
    before = (tmp_path / "cat_preview.png").read_bytes()
    given = [tmp_path / "cat_preview.png", "--output", tmp_path / "cat.png", "--preview", "--fast"]
    for more in ([], ["--overwrite"]):  # its own image not even then
        status, printed = upscale(*given, *more)
        assert status == 1 and "cat_preview.png" in printed
        assert (tmp_path / "cat_preview.png").read_bytes() == before
        assert not (tmp_path / "cat.png").exists()
    (tmp_path / "notes_preview.png").write_text("mine")
    assert upscale(a, "--output", tmp_path / "notes.png", "--preview")[0] == 1
    assert (tmp_path / "notes_preview.png").read_text() == "mine"


def test_only_results_of_the_same_image_and_weights_are_up_to_date(upscale, tmp_path):
    one, two, large = (tmp_path / name for name in ("one", "two", "large"))
    for number, folder in enumerate((one, two)):
        folder.mkdir()
        image(number).save(folder / "a.bmp")
        os.utime(folder / "a.bmp", (0, 0))
    output = ["--output", large]
    assert upscale(one, *output)[0] == 0
    assert "1 up to date" in upscale(one, *output)[1]
    for other in ([two], [one, "--precision", "bf16"]):  # of the same size and time
        status, printed = upscale(*other, *output)
        assert status == 1 and "--overwrite" in printed
    before = (large / "a_x4.png").read_bytes()
    assert upscale(one, "--preview", *output)[0] == 0  # only the sheet was missing
    assert (large / "a_x4.png").read_bytes() == before
    assert "1 up to date" in upscale(one, "--preview", *output)[1]
    image().save(large / "a_x4_preview.png")
    status, printed = upscale(one, "--preview", *output)
    assert status == 1 and "a_x4_preview.png" in printed
    assert upscale(two, *output, "--overwrite")[0] == 0
    assert Stamp.read(large / "a_x4.png").source == files.digest(two / "a.bmp")


def test_results_inside_the_folder_are_known_however_it_is_spelled(upscale, a, monkeypatch):
    monkeypatch.chdir(a.parent)
    for _ in range(2):
        assert upscale(a.parent, "--recursive", "--output", "./big", "--fast")[0] == 0
        assert upscale(".", "--recursive", "--output", a.parent / "big", "--fast")[0] == 0
    assert [path.name for path in a.parent.rglob("*_x4*")] == ["a_x4_fast.png"]


# Files and folders ----------------------------------------------------------------------------


def test_bad_files_and_odd_names_cost_no_other_image(upscale, tmp_path):
    for name in ("_preview.png", "_x4.png", "-z.png", "n" * 249 + ".png", "a[1].png"):
        image().save(tmp_path / name)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    status, printed = upscale(tmp_path, "--fast")
    assert status == 1 and "Upscaled 4 images, 3 skipped" in printed
    assert all(word in printed for word in ("nnn", "gone.png", "bad.png"))
    made = {path.name for path in tmp_path.glob("*_fast.png")}
    assert made == {f"{name}_x4_fast.png" for name in ("_preview", "_x4", "-z", "a[1]")}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind root")
def test_an_image_that_may_not_be_read_costs_no_other(upscale, a, tmp_path):
    image().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    status, printed = upscale(tmp_path)
    assert status == 1 and "secret.png" in printed and "Upscaled 1 image, 1 skipped" in printed


def test_full_memory_is_no_fault_of_the_picture(upscale, tmp_path, monkeypatch):
    call = Enlarger.__call__

    def fail(self, lr, *given):
        if lr.shape[0] > SIDE:
            raise MemoryError
        return call(self, lr, *given)

    monkeypatch.setattr(Enlarger, "__call__", fail)
    image().save(tmp_path / "z.png")
    image().resize((99, 99)).save(tmp_path / "b.png")
    status, printed = upscale(tmp_path)
    line = next(line for line in printed.splitlines() if line.startswith("Skipped "))
    assert status == 1 and "b.png" in line and "memory" in line and "remove" not in line
    assert (tmp_path / "z_x4.png").exists()


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(upscale, a, monkeypatch):
    def fail(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(Enlarger, "__call__", None)
    image().save(a.with_name("b.png"))
    status, printed = upscale(a.parent)
    assert status == 1 and printed.count(f"{a.parent}: Read-only file system; ") == 1


def test_no_images_and_no_such_file(upscale, tmp_path):
    for given, word in ([], "which images"), (["none.png"], "none.png"), (["*.png"], "*.png"):
        status, printed = upscale(*(tmp_path / each for each in given))
        assert status == 1 and word in printed
    assert "delete" not in printed and "remove" not in printed


# From Python ----------------------------------------------------------------------------------


def test_python_calls_it_as_a_command_line_does(a, ckpts, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json", "--help"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    main.upscale(a, fast=True, ckpts=ckpts)
    main.upscale(str(a), model="srgan", texture=1, ckpts=str(ckpts), output="~/large", edges=None)
    main.upscale("~/a.png", overwrite=False, preview=True, ckpts=ckpts)
    made = ["a.png", "a_x4.png", "a_x4_fast.png", "a_x4_preview.png", "large"]
    assert names(tmp_path) == made and names(tmp_path / "large") == ["a_x4_srgan_1.png"]
    with pytest.raises(TypeError, match="speed"):
        main.upscale(a, speed=9)
    with pytest.raises(TypeError, match="edges"):
        main.evaluate(edges="a")
