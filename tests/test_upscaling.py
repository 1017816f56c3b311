import numpy as np
import pytest
from conftest import CPU, command, photograph, status_of
from PIL import Image, ImageCms

import images
import join_slice_images
import slice_images_w_overlapping
from inference import Enlarger
from models import SRResNet, load_network, save_network
from tiles import JOINED, LR, OUTPUT, TEST

SIDE = 40


@pytest.fixture
def upscale(ckpts, tmp_path, capsys):
    """Runs the command in a folder of images; returns its exit status and what it printed."""

    def run(*arguments):
        given = ["upscale", "--ckpts", str(ckpts), "--precision", "fp32", *map(str, arguments)]
        status = status_of(command, *given)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def image(number=0):
    return Image.fromarray(photograph(number, SIDE))


def test_the_result_is_that_of_slicing_testing_and_joining(upscale, ckpts, tmp_path):
    folder = tmp_path / TEST / LR
    folder.mkdir(parents=True)
    image().save(folder / "a.png")
    root = ["--root", str(tmp_path)]
    slice_images_w_overlapping.main(root)
    command("test", *root, "--ckpts", ckpts, "--precision", "fp32")
    join_slice_images.main(root)
    assert upscale(folder / "a.png")[0] == 0
    joined = np.asarray(Image.open(folder / OUTPUT / JOINED / "candidate_a.png"))
    alone = np.asarray(Image.open(folder / "a_x4.png"))
    assert alone.shape == (4 * SIDE, 4 * SIDE, 3)
    assert np.abs(joined.astype(int) - alone).max() <= 1


def transparent():
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[10:30, 10:30] = 255
    return Image.fromarray(np.dstack([photograph(0, SIDE), alpha]))


def palette():
    made = image().quantize(8)
    made.info["transparency"] = 0
    return made


@pytest.mark.parametrize(
    ("name", "make", "mode", "sentence"),
    [
        ("scan.png", lambda: image().convert("L"), "L", ""),
        ("one_bit.png", lambda: image().convert("1"), "L", ""),
        ("logo.png", transparent, "RGBA", ""),
        ("palette.png", palette, "RGBA", ""),
        ("print.jpg", lambda: image().convert("CMYK"), "RGB", "CMYK"),
        ("photo.webp", image, "RGB", ""),
        ("photo.tif", image, "RGB", ""),
        ("photo.bmp", image, "RGB", ""),
        (
            "deep.png",
            lambda: Image.fromarray(photograph(0, SIDE)[..., 0].astype(np.uint16) * 257),
            "L",
            "8 bits",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_images_of_all_kinds(upscale, tmp_path, name, make, mode, sentence):
    made = make()
    made.save(tmp_path / name)
    status, printed = upscale(tmp_path / name)
    assert status == 0 and sentence in printed
    with Image.open(tmp_path / f"{name.partition('.')[0]}_x4.png") as result:
        assert result.mode == mode and result.size == (4 * SIDE, 4 * SIDE)


@pytest.mark.parametrize("orientation", range(10))
def test_photographs_come_out_upright_with_profile_and_exif(upscale, tmp_path, orientation):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = Image.fromarray(photograph(0, SIDE)[:24])
    exif = photo.getexif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    photo.save(tmp_path / "a.jpg", exif=exif, icc_profile=profile, dpi=(300, 300))
    for output in (tmp_path / "out.jpg", tmp_path / "out.png"):
        assert upscale(tmp_path / "a.jpg", "--output", output)[0] == 0
        with Image.open(output) as result:
            turned = 5 <= orientation <= 8
            assert result.size == ((96, 160) if turned else (160, 96))
            assert result.info["icc_profile"] == profile
            kept = result.getexif()
            assert kept.get(0x010F) == "Maker" and kept.get(0x0112, 1) == 1
            assert round(result.info["dpi"][0]) == 300


def test_folders_are_enlarged_and_bad_files_left_out(upscale, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deeper").mkdir(parents=True)
    image(0).save(source / "a.png")
    image(1).save(source / "deeper" / "b.jpg")
    (source / "bad.png").write_text("no image")
    (source / "notes.txt").write_text("no image")
    status, printed = upscale(source, "--output", target)
    assert status == 1 and "bad.png" in printed and "notes" not in printed
    assert [path.name for path in target.rglob("*.png")] == ["a_x4.png"]
    status, printed = upscale(source, "--output", target, "--recursive")
    assert status == 1 and "1 there already" in printed and "1 left out" in printed
    assert (target / "deeper" / "b_x4.png").exists()


def test_results_are_no_images_of_their_folder(upscale, tmp_path):
    image().save(tmp_path / "a.png")
    assert upscale(tmp_path, "--preview", "--fast")[0] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.png", "a_x4.png", "a_x4_preview.png"}
    assert upscale(tmp_path, "--preview", "--fast", "--overwrite")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_preview_costs_no_second_prediction_of_edges(upscale, tmp_path, monkeypatch):
    predicted, original = [], Enlarger.predict_edges

    def predict_edges(*arguments):
        predicted.append(original(*arguments))
        return predicted[-1]

    monkeypatch.setattr(Enlarger, "predict_edges", predict_edges)
    image().save(tmp_path / "a.png")
    assert upscale(tmp_path / "a.png", "--preview")[0] == 0
    assert (tmp_path / "a_x4_preview.png").exists() and len(predicted) == 1


def test_nothing_is_overwritten_unasked(upscale, tmp_path):
    image().save(tmp_path / "a.png")
    (tmp_path / "a_x4.png").write_text("mine")
    assert upscale(tmp_path / "a.png")[0] == 1
    assert (tmp_path / "a_x4.png").read_text() == "mine"
    assert upscale(tmp_path / "a.png", "--overwrite")[0] == 0
    assert Image.open(tmp_path / "a_x4.png").size == (4 * SIDE, 4 * SIDE)


def test_a_preview_overwrites_nothing_unasked(upscale, tmp_path):
    image().save(tmp_path / "cat_preview.png")
    before = (tmp_path / "cat_preview.png").read_bytes()
    given = [tmp_path / "cat_preview.png", "--output", tmp_path / "cat.png", "--preview", "--fast"]
    for more in ([], ["--overwrite"]):  # its own image not even then
        status, printed = upscale(*given, *more)
        assert status == 1 and "cat_preview.png" in printed
        assert (tmp_path / "cat_preview.png").read_bytes() == before
        assert not (tmp_path / "cat.png").exists()
    (tmp_path / "notes_preview.png").write_text("mine")
    image().save(tmp_path / "a.png")
    assert upscale(tmp_path / "a.png", "--output", tmp_path / "notes.png", "--preview")[0] == 1
    assert (tmp_path / "notes_preview.png").read_text() == "mine"


def test_only_results_of_the_same_image_and_weights_are_there_already(upscale, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        image(folder == "two").save(tmp_path / folder / "a.png")
    output = ["--output", tmp_path / "large"]
    assert upscale(tmp_path / "one", *output)[0] == 0
    status, printed = upscale(tmp_path / "one", *output)
    assert status == 0 and "1 there already" in printed
    for other in ([tmp_path / "two"], [tmp_path / "one", "--fast"]):
        status, printed = upscale(*other, *output)
        assert status == 1 and "--overwrite" in printed
    before = (tmp_path / "large" / "a_x4.png").read_bytes()
    sheet = tmp_path / "large" / "a_x4_preview.png"
    assert upscale(tmp_path / "one", "--preview", *output)[0] == 0  # only the sheet was missing
    assert sheet.exists() and (tmp_path / "large" / "a_x4.png").read_bytes() == before
    assert "1 there already" in upscale(tmp_path / "one", "--preview", *output)[1]
    image().save(sheet)
    status, printed = upscale(tmp_path / "one", "--preview", *output)
    assert status == 1 and sheet.name in printed
    image(2).save(tmp_path / "one" / "a.png")
    assert upscale(tmp_path / "one", *output)[0] == 1
    assert upscale(tmp_path / "one", *output, "--overwrite")[0] == 0


def test_results_inside_the_folder_are_known_however_it_is_spelled(upscale, tmp_path, monkeypatch):
    album = tmp_path / "album"
    album.mkdir()
    image().save(album / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        given = [album, "--recursive", "--output", "album/big", "--fast"]
        assert upscale(*given)[0] == 0
    assert [path.name for path in album.rglob("*_x4*")] == ["a_x4.png"]


def test_odd_names_cost_no_other_image(upscale, tmp_path):
    for name in ("_preview.png", "_x4.png", "n" * 249 + ".png", "z.png"):
        image().save(tmp_path / name)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    status, printed = upscale(tmp_path, "--fast")
    assert status == 1 and "nnn_x4.png" in printed and "gone.png" in printed
    made = {path.name for path in tmp_path.glob("*_x4.png")}
    assert made == {"_x4.png", "_preview_x4.png", "_x4_x4.png", "z_x4.png"}


def test_edges_can_be_given(upscale, tmp_path):
    image().save(tmp_path / "a.png")
    results = []
    for value in (0, 255):
        Image.new("L", (4 * SIDE, 4 * SIDE), value).save(tmp_path / "edges.png")
        status, _ = upscale(tmp_path / "a.png", "--edges", tmp_path / "edges.png", "--overwrite")
        assert status == 0
        results.append(np.asarray(Image.open(tmp_path / "a_x4.png")))
    assert (results[0] != results[1]).any()
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "edges.png")
    status, printed = upscale(tmp_path / "a.png", "--edges", tmp_path / "edges.png", "--overwrite")
    assert status == 1 and "edges.png" in printed


def test_no_images_and_no_such_file(upscale, tmp_path):
    status, printed = upscale()
    assert status == 1 and "which images" in printed
    status, printed = upscale(tmp_path / "none.png")
    assert status == 1 and "none.png" in printed


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_output_tells_the_format_and_the_last_line_where(upscale, tmp_path, suffix):
    image().save(tmp_path / "a.png")
    status, printed = upscale(tmp_path / "a.png", "--output", tmp_path / f"b{suffix}")
    assert status == 0 and "Upscaled: 1 image, in " in printed and str(tmp_path) in printed
    with Image.open(tmp_path / f"b{suffix}") as result:
        expected = {".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}[suffix]
        assert result.format == expected and result.size == (4 * SIDE, 4 * SIDE)


def test_fast_is_the_srresnet_which_needs_no_edges(upscale, ckpts, tmp_path):
    (tmp_path / "ckpts").mkdir()
    save_network(SRResNet(8, 4), tmp_path / "ckpts" / "SRResNet_gen.pth")
    image().save(tmp_path / "a.png")
    assert upscale(tmp_path / "a.png", "--fast", "--ckpts", tmp_path / "ckpts")[0] == 0
    network = load_network(tmp_path / "ckpts" / "SRResNet_gen.pth")
    expected = Enlarger(network, None, CPU)(photograph(0, SIDE))
    assert np.abs(np.asarray(Image.open(tmp_path / "a_x4.png")).astype(int) - expected).max() <= 1


def test_results_that_would_collide_are_named(upscale, tmp_path):
    image(0).save(tmp_path / "a.jpg")
    image(1).save(tmp_path / "a.png")
    status, printed = upscale(tmp_path, "--overwrite", "--fast")
    assert status == 1 and "a.png: its result would replace that of" in printed
    assert "Upscaled: 1 image, 1 left out" in printed


def test_results_are_never_enlarged_again(upscale, tmp_path):
    image().save(tmp_path / "a[1].png")
    for _ in range(2):
        upscale(tmp_path, "--output", tmp_path / "large", "--recursive", "--overwrite", "--fast")
        upscale(tmp_path, "--overwrite", "--fast")
        upscale(tmp_path, "--output", tmp_path, "--overwrite", "--fast")
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [
        *("a[1].png", "a[1]_x4.png", "a[1]_x4.png")
    ]


def test_what_a_folder_lacks_or_holds_in_vain_is_said(upscale, tmp_path):
    status, printed = upscale(tmp_path)
    assert status == 1 and f"{tmp_path}: no images" in printed
    (tmp_path / "phone.dng").touch()
    image().save(tmp_path / "a.png")
    status, printed = upscale(tmp_path, "--fast")
    assert status == 1 and "phone.dng: cannot be read here" in printed
    assert (tmp_path / "a_x4.png").exists()


def test_formats_and_options_that_do_not_go_together_are_refused(upscale, tmp_path):
    image().save(tmp_path / "a.png")
    for given, word in (
        (["--output", tmp_path / "b.gif"], "b.gif"),
        (["--fast", "--edges", tmp_path / "a.png"], "--fast"),
        ([tmp_path / "a.png", "--output", tmp_path / "b.png"], "is one file"),
    ):
        status, printed = upscale(tmp_path / "a.png", *given)
        assert status == 1 and word in printed
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_every_error_names_its_file(upscale, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Enlarger, "__call__", fail)
    image().save(tmp_path / "a.png")
    status, printed = upscale(tmp_path / "a.png")
    assert status == 1 and f"Left out {tmp_path / 'a.png'}: " in printed


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(
    upscale, tmp_path, monkeypatch
):
    def fail(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(images.tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(Enlarger, "__call__", None)
    for number in range(2):
        image().save(tmp_path / f"{number}.png")
    status, printed = upscale(tmp_path)
    assert status == 1 and printed.count(f"{tmp_path}: Read-only file system; ") == 1


def test_the_last_line_names_a_single_result(upscale, tmp_path):
    image().save(tmp_path / "a.png")
    printed = upscale(tmp_path / "a.png", "--fast")[1]
    assert f" s: {tmp_path / 'a_x4.png'}\n" in printed
