import contextlib
import errno
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.color
import skimage.data
import skimage.feature
from fuzz_images import fuzz
from PIL import Image, ImageCms, ImageFilter

import images
from images import (
    ImageError,
    Photo,
    StorageError,
    bicubic,
    canny,
    image_size,
    read_image,
    read_photo,
    read_stamp,
    replacing,
    write_image,
    write_png,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTO = np.ascontiguousarray(skimage.data.astronaut()[:60, 180:260])  # 60 x 80
GRAY = np.asarray(Image.fromarray(PHOTO).convert("L"))
HOLED = np.where(np.add.outer(np.arange(60), np.arange(80)) < 60, 0, 255).astype(np.uint8)


def save(path, image, **options):
    """Writes an array or a Pillow image as its suffix tells, and returns the path."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def insert(path, kind, data, before):
    """Inserts a chunk before the first chunk of type `before` of a PNG file."""
    png = path.read_bytes()
    at = png.index(before) - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(png[:at] + chunk + png[at:])
    return path


def difference(one, other):
    return np.abs(one.astype(int) - other).max()


def enlarged(photo):
    return bicubic(photo.rgb, 4)


def result_of(tmp_path, photo, suffix=".png"):
    """Writes an enlarged photo and opens the result."""
    path = tmp_path / f"result{suffix}"
    write_image(path, enlarged(photo), photo)
    image = Image.open(path)
    image.load()
    return image


# Modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_rgb_is_read_to_the_bit(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", PHOTO)
    photo = read_photo(path)
    assert (photo.rgb == PHOTO).all() and (read_image(path) == PHOTO).all()
    assert (photo.alpha, photo.gray, photo.icc, photo.exif, photo.notes) == (*NOTHING, [])
    assert image_size(path) == (60, 80)


NOTHING = (None, False, None, None)


@pytest.mark.parametrize("suffix", sorted(images.SUFFIXES))
def test_every_suffix_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    Image.fromarray(PHOTO).save(path, Image.registered_extensions()[suffix], quality=95)
    photo = read_photo(path)
    assert np.abs(photo.rgb.astype(int) - PHOTO).mean() < 4
    assert image_size(path) == (60, 80) and photo.notes == []


def test_pixels_can_be_written_to(tmp_path):
    for image in (PHOTO, GRAY, np.dstack([PHOTO, HOLED])):
        pixels = read_image(save(tmp_path / "a.png", image))
        assert pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_grey_stays_grey(tmp_path, suffix, mode):
    image = Image.fromarray(GRAY).convert(mode)
    photo = read_photo(save(tmp_path / f"a{suffix}", image))
    assert photo.gray and photo.notes == []
    assert (photo.rgb == np.asarray(image.convert("L"))[..., None]).all()
    assert result_of(tmp_path, photo).mode == "L"


def test_equal_channels_come_back_equal(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", np.dstack([GRAY] * 3)))
    assert photo.gray
    coloured = enlarged(photo)
    coloured[..., 0] = np.minimum(coloured[..., 0] + 9.0, 255)
    for suffix in images.RESULTS:
        write_image(tmp_path / f"b{suffix}", coloured, photo)
        result = read_image(tmp_path / f"b{suffix}")
        assert difference(result[..., :1], result) == 0
    write_image(tmp_path / "c.png", enlarged(photo), photo)
    assert (read_image(tmp_path / "c.png") == enlarged(photo)).all()  # grey is not changed


def test_grey_with_an_rgb_profile_stays_rgb(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([GRAY] * 3), icc_profile=DISPLAY_P3)
    result = result_of(tmp_path, read_photo(path))
    assert result.mode == "RGB" and result.info["icc_profile"] == DISPLAY_P3


def test_16_bits_of_grey_are_rounded(tmp_path):
    deep = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    for suffix in (".png", ".tif"):
        photo = read_photo(save(tmp_path / f"a{suffix}", deep))
        assert (photo.rgb[..., 0] == np.rint(deep / 257)).all()
        assert photo.gray and "8 bits" in photo.notes[0]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_are_reduced_with_a_note(tmp_path, suffix, channels):
    image = np.dstack([PHOTO, np.full_like(GRAY, 200)])[..., :channels]
    path = tmp_path / f"a{suffix}"
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[channels]
    assert cv2.imwrite(str(path), cv2.cvtColor(image.astype(np.uint16) * 256 + 77, code))
    photo = read_photo(path)
    assert difference(photo.rgb, PHOTO) <= 1
    assert "8 bits" in photo.notes[0]
    assert channels == 3 or (photo.alpha == 200).all()


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (GRAY / np.float32(255), 1),
        (GRAY.astype(np.float32), 255),
        (GRAY.astype(np.int32), 255),
        (GRAY.astype(np.int32) * 257, 65535),
    ],
)
def test_numbers_of_32_bits_are_read_if_they_can_be_grey_levels(tmp_path, values, white):
    photo = read_photo(save(tmp_path / "a.tif", values))
    assert (photo.rgb == np.rint(values * (255.0 / white))[..., None]).all()
    assert "8 bits" in photo.notes[0]


@pytest.mark.parametrize("odd", [-1.0, 70000.0, np.nan, np.inf])
def test_numbers_that_are_no_grey_levels_are_refused(tmp_path, odd):
    values = GRAY.astype(np.float32)
    values[3, 4] = odd
    with pytest.raises(ImageError, match=r"a\.tif.*values"):
        read_photo(save(tmp_path / "a.tif", values))


def test_other_colour_spaces_become_rgb(tmp_path):
    image = Image.fromarray(PHOTO)
    lab = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    for converted in (
        image.convert("YCbCr"),
        image.convert("CMYK"),
        ImageCms.profileToProfile(image, *lab, outputMode="LAB"),
    ):
        photo = read_photo(save(tmp_path / "a.tif", converted))
        assert np.abs(photo.rgb.astype(int) - PHOTO).mean() < 2
        assert (
            photo.notes == [f"converted from {converted.mode} to sRGB"][: converted.mode != "YCbCr"]
        )


def test_cmyk_goes_through_its_profile(tmp_path):
    image = Image.new("CMYK", (40, 30), (255, 0, 0, 0))  # cyan, which is a grey in this profile
    for suffix in (".jpg", ".tif"):
        photo = read_photo(save(tmp_path / f"a{suffix}", image, icc_profile=CYAN_IS_GRAY))
        assert difference(photo.rgb, 119) <= 1  # L* = 50
        assert photo.icc is None and photo.notes == ["converted from CMYK to sRGB"]
    photo = read_photo(save(tmp_path / "b.jpg", image, icc_profile=DISPLAY_P3))  # does not fit
    assert difference(photo.rgb, [0, 255, 255]) <= 1


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(each).quantize(64) for each in (PHOTO, PHOTO[::-1])]
    options = {"save_all": True, "append_images": frames[1:]}
    for suffix in (".gif", ".png", ".webp", ".tif"):
        path = save(tmp_path / f"a{suffix}", frames[0], **options)
        photo = read_photo(path)
        assert np.abs(photo.rgb.astype(int) - PHOTO).mean() < 8
        assert photo.notes == ["only its first frame is used"]
        assert (read_image(path) == photo.rgb).all()
    frames[0].save(tmp_path / "b.gif")
    assert read_photo(tmp_path / "b.gif").notes == []


def test_one_pixel_is_an_image_too(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        photo = read_photo(save(tmp_path / "a.png", Image.new(mode, (1, 1))))
        assert result_of(tmp_path, photo).size == (4, 4)


# Transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_kept_beside_the_colours(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", np.dstack([PHOTO, HOLED]), lossless=True)
    photo = read_photo(path)
    assert (photo.alpha == HOLED).all()
    assert (photo.rgb[HOLED > 0] == PHOTO[HOLED > 0]).all()
    result = np.asarray(result_of(tmp_path, photo))
    assert (result[..., 3] == bicubic(HOLED, 4)).all()
    assert (result[..., :3] == enlarged(photo)).all()


def test_alpha_that_hides_nothing_is_no_alpha(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", Image.fromarray(PHOTO).convert("RGBA")))
    assert photo.alpha is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_with_alpha(tmp_path, suffix):
    photo = read_photo(save(tmp_path / f"a{suffix}", np.dstack([GRAY, HOLED])))
    assert photo.gray and (photo.alpha == HOLED).all()
    for result in (result_of(tmp_path, photo), result_of(tmp_path, photo, ".tif")):
        assert result.mode == "LA"


def test_palette_with_transparency(tmp_path):
    palette = Image.fromarray(PHOTO).quantize(16)
    clear = bytes([0, 128] + [255] * 14)
    indices = np.asarray(palette)
    expected = np.frombuffer(clear, np.uint8)[indices]
    for options in ({"transparency": clear}, {"transparency": 0}):
        photo = read_photo(save(tmp_path / "a.png", palette, **options))
        if options["transparency"] == 0:
            expected = np.where(indices == 0, 0, 255)
        assert (photo.alpha == expected).all()
        visible = photo.alpha > 0
        assert (photo.rgb[visible] == np.asarray(palette.convert("RGB"))[visible]).all()
    photo = read_photo(save(tmp_path / "a.gif", palette, transparency=0))
    assert (photo.alpha == expected).all()


def test_a_transparent_colour_becomes_alpha(tmp_path):
    colour = tuple(int(value) for value in PHOTO[30, 40])
    photo = read_photo(save(tmp_path / "a.png", PHOTO, transparency=colour))
    assert (photo.alpha == np.where((colour == PHOTO).all(-1), 0, 255)).all()
    photo = read_photo(save(tmp_path / "b.png", GRAY, transparency=int(GRAY[30, 40])))
    assert photo.gray and (photo.alpha == np.where(GRAY[30, 40] == GRAY, 0, 255)).all()


def test_a_transparent_colour_of_another_depth(tmp_path):
    deep = PHOTO.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(deep, cv2.COLOR_RGB2BGR))
    insert(tmp_path / "a.png", b"tRNS", struct.pack(">3H", *deep[30, 40].tolist()), b"IDAT")
    photo = read_photo(tmp_path / "a.png")
    assert (photo.alpha == np.where((PHOTO[30, 40] == PHOTO).all(-1), 0, 255)).all()

    save(tmp_path / "b.png", GRAY.astype(np.uint16) * 257)
    insert(tmp_path / "b.png", b"tRNS", struct.pack(">H", int(GRAY[30, 40]) * 257), b"IDAT")
    photo = read_photo(tmp_path / "b.png")
    assert (photo.alpha == np.where(GRAY[30, 40] == GRAY, 0, 255)).all()

    rows = b"".join(b"\0" + bytes([0b00011011]) * 2 for _ in range(4))  # 8 x 4, 2 bits each
    header = struct.pack(">IIBBBBB", 8, 4, 2, 0, 0, 0, 0)
    path = tmp_path / "c.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\0IEND\xaeB`\x82")
    for kind, data in ((b"IHDR", header), (b"tRNS", b"\0\2"), (b"IDAT", zlib.compress(rows))):
        insert(path, kind, data, b"IEND")
    photo = read_photo(path)
    assert photo.alpha[0].tolist() == [255, 255, 0, 255] * 2
    assert photo.rgb[0, :2, 0].tolist() == [0, 85]


def test_hidden_colours_do_not_bleed_in(tmp_path):
    logo = np.zeros((40, 40, 4), np.uint8)
    logo[:] = (255, 0, 0, 0)  # red where nobody sees it
    logo[10:30, 10:30] = (0, 0, 200, 255)
    photo = read_photo(save(tmp_path / "logo.png", logo))
    assert (photo.rgb == [0, 0, 200]).all()
    assert (np.asarray(result_of(tmp_path, photo))[..., :2] == 0).all()
    on_white = np.asarray(result_of(tmp_path, photo, ".jpg")).astype(int)
    assert difference(on_white[:20, :20], 255) <= 3
    assert difference(on_white[80, 80], [0, 0, 200]) <= 4
    assert (on_white[..., 0] < on_white[..., 2] + 30).all()  # no red but the JPEG's own noise


def test_hidden_pixels_take_the_nearest_visible_colour(tmp_path):
    image = np.zeros((20, 60, 4), np.uint8)
    image[:, :10], image[:, 50:] = (10, 20, 30, 255), (200, 210, 220, 1)
    rgb = read_photo(save(tmp_path / "a.png", image)).rgb
    assert (rgb[:, :28] == [10, 20, 30]).all() and (rgb[:, 32:] == [200, 210, 220]).all()
    image[..., 3] = 0
    photo = read_photo(save(tmp_path / "a.png", image))
    assert (photo.rgb == 0).all() and (photo.alpha == 0).all()


def test_jpeg_says_that_it_has_no_transparency(tmp_path):
    photo = Photo(PHOTO, alpha=HOLED)
    assert "white" in write_image(tmp_path / "a.jpg", enlarged(photo), photo)[0]
    assert write_image(tmp_path / "a.png", enlarged(photo), photo) == []


# Orientation ----------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}
OUTSIDE = (0, 9, 255, 65535)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("suffix", [".jpg", ".mpo.jpg", ".png", ".late.png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, *OUTSIDE])
def test_images_are_turned_upright_by_their_tag(tmp_path, suffix, orientation):
    path, options = tmp_path / f"a{suffix}", {"exif": exif_of(orientation)}
    if suffix == ".late.png":
        save(path, PHOTO)
        exif = options["exif"].tobytes().removeprefix(b"Exif\0\0")
        insert(path, b"eXIf", exif, b"IEND")
    elif suffix == ".mpo.jpg":
        others = {"save_all": True, "append_images": [Image.fromarray(PHOTO)]}
        Image.fromarray(PHOTO).save(path, "MPO", quality=95, subsampling=0, **options, **others)
    else:
        lossless = {"lossless": True} if suffix == ".webp" else {"quality": 95, "subsampling": 0}
        save(path, PHOTO, **options, **lossless)
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(PHOTO)
    photo = read_photo(path)
    assert image_size(path) == photo.rgb.shape[:2] == expected.shape[:2]
    assert np.abs(photo.rgb.astype(int) - expected).mean() < 2
    assert (read_image(path) == photo.rgb).all()
    result = result_of(tmp_path, photo)
    assert result.size == (4 * expected.shape[1], 4 * expected.shape[0])
    assert 0x0112 not in result.getexif()
    assert photo.notes == []


def test_alpha_and_16_bits_are_turned_too(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([PHOTO, HOLED]), exif=exif_of(6))
    assert (read_photo(path).alpha == np.rot90(HOLED, -1)).all()
    deep = GRAY.astype(np.uint16) * 257
    for mode_path in (
        save(tmp_path / "b.png", deep, exif=exif_of(6)),
        save(tmp_path / "b.tif", deep, exif=exif_of(6)),
        save(tmp_path / "c.tif", GRAY, exif=exif_of(6)),
        save(tmp_path / "d.tif", Image.fromarray(GRAY).convert("P"), exif=exif_of(6)),
        save(tmp_path / "c.png", Image.fromarray(GRAY).convert("P"), exif=exif_of(6)),
    ):
        assert (read_photo(mode_path).rgb[..., 0] == np.rot90(GRAY, -1)).all()
        assert image_size(mode_path) == (80, 60)
    path = save(tmp_path / "d.jpg", Image.fromarray(PHOTO).convert("CMYK"), exif=exif_of(6))
    assert read_photo(path).rgb.shape == (80, 60, 3)


def test_xmp_alone_does_not_turn(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for path in (
        save(tmp_path / "a.jpg", PHOTO, xmp=xmp),
        save(tmp_path / "a.tif", PHOTO, tiffinfo={700: xmp}),
    ):
        assert image_size(path) == read_image(path).shape[:2] == (60, 80)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0not a directory at all",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x09",
        exif_of(3).tobytes()[:-7],
    ],
)
def test_broken_exif_never_stops_an_image(tmp_path, suffix, exif):
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        insert(save(path, PHOTO), b"eXIf", exif[6:], b"IDAT")
    else:
        save(path, PHOTO, exif=exif)
    photo = read_photo(path)
    assert image_size(path) == photo.rgb.shape[:2] == (60, 80)
    for result in images.RESULTS:
        assert result_of(tmp_path, photo, result).size == (320, 240)


def test_lost_exif_is_told(tmp_path):
    photo = read_photo(save(tmp_path / "a.jpg", PHOTO, exif=b"Exif\0\0nothing that is a directory"))
    assert photo.exif is None and "EXIF" in photo.notes[0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_images_too_large_for_a_format_are_named_with_another(tmp_path, suffix):
    _, longest, _ = images.RESULTS[suffix]
    for side in (longest + 1, longest):
        sr = np.zeros((1, side, 3), np.uint8)
        path = tmp_path / f"a{suffix}"
        if side > longest:
            with pytest.raises(ImageError, match=rf"a\{suffix}: {side}x1 pixels .* take \.\w+$"):
                write_image(path, sr, Photo(sr[:, ::4]))
        else:
            write_image(path, sr, Photo(sr[:, ::4]))
            assert image_size(path) == (1, side)


def test_exif_text_is_kept_to_the_byte(tmp_path):
    exif = Image.Exif()
    texts = {270: "Café Straße".encode(), 315: "Jürgen".encode("latin-1"), 33432: b"(c) me"}
    for tag, text in texts.items():
        exif[tag] = text
    exif[0x8769] = {0x9003: "2021:05:01 12:00:00"}
    photo = read_photo(save(tmp_path / "a.jpg", PHOTO, exif=exif.tobytes()))
    for suffix in images.RESULTS:
        path = tmp_path / f"b{suffix}"
        write_image(path, enlarged(photo), photo)
        with Image.open(path) as result:
            found = result.getexif()
            assert {tag: found[tag].encode("latin-1") for tag in texts} == texts, suffix
            assert found.get_ifd(0x8769)[0x9003] == "2021:05:01 12:00:00"


def test_a_tiff_without_resolution_gets_none(tmp_path):
    assert read_photo(save(tmp_path / "a.tif", PHOTO)).dpi is None
    assert read_photo(save(tmp_path / "b.tif", PHOTO, dpi=(300, 300))).dpi == (300, 300)


# What is carried ------------------------------------------------------------------------------


@pytest.fixture
def camera():
    exif = exif_of(6)
    exif[0x010F], exif[0x0132], exif[0x0100] = "Camera", "2021:05:01 12:00:00", 80
    exif[0x8769] = {0xA002: 80, 0xA003: 60, 0x829A: 0.01, 0x9286: b"ASCII\0\0\0hello"}
    exif[0x8825] = {1: "N", 2: (48.0, 8.0, 14.0)}
    return exif.tobytes()


@pytest.mark.parametrize("target", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
def test_exif_and_dpi_come_back(tmp_path, camera, source, target):
    options = {} if source == ".webp" else {"dpi": (300, 150)}
    photo = read_photo(save(tmp_path / f"a{source}", PHOTO, exif=camera, **options))
    assert photo.notes == []
    result = result_of(tmp_path, photo, target)
    exif = result.getexif()
    assert exif[0x010F] == "Camera" and exif[0x0132] == "2021:05:01 12:00:00"
    assert exif.get_ifd(0x8825)[2] == (48.0, 8.0, 14.0)
    details = exif.get_ifd(0x8769)
    assert details[0x829A] == pytest.approx(0.01) and details[0x9286] == b"ASCII\0\0\0hello"
    assert (details[0xA002], details[0xA003]) == result.size == (240, 320)  # turned and enlarged
    assert exif.get(0x0112, 1) == 1
    assert exif.get(0x0100, 240) == 240
    if target != ".webp" and source != ".webp":
        assert result.info["dpi"] == pytest.approx((300, 150), abs=0.02)


def test_exif_too_long_for_jpeg_is_told(tmp_path, camera):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: bytes(70000)}
    photo = read_photo(save(tmp_path / "a.png", PHOTO, exif=exif))
    assert "EXIF" in write_image(tmp_path / "b.jpg", enlarged(photo), photo)[0]
    assert read_photo(tmp_path / "b.jpg").rgb.shape == (240, 320, 3)
    assert write_image(tmp_path / "b.png", enlarged(photo), photo) == []


def test_odd_dpi_is_left_out(tmp_path):
    path = insert(save(tmp_path / "a.png", PHOTO), b"pHYs", struct.pack(">IIB", 0, 9, 1), b"IDAT")
    photo = read_photo(path)
    assert photo.dpi is None
    result_of(tmp_path, photo)


def icc_profile(space, profile_class, pcs, tags):
    """Returns an ICC profile, version 2, of these tags: {name: contents}."""
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, contents in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(contents))
        body += contents + bytes(-len(contents) % 4)
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"", 0x02400000, profile_class, space, pcs
    )
    header += bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + table + body


def rgb_profile(columns, curve):
    """Returns a profile of primaries (XYZ under D50, a column each) and a curve of 1024 values."""
    fixed = [struct.pack(">3i", *(round(value * 65536) for value in each)) for each in columns]
    curve = struct.pack(">4sII1024H", b"curv", 0, 1024, *np.rint(curve * 65535).astype(int))
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)}
    tags |= {name: b"XYZ \0\0\0\0" + xyz for name, xyz in zip(XYZ, fixed, strict=True)}
    return icc_profile(b"RGB ", b"mntr", b"XYZ ", tags | dict.fromkeys(TRC, curve))


XYZ, TRC = (b"rXYZ", b"gXYZ", b"bXYZ"), (b"rTRC", b"gTRC", b"bTRC")
RAMP = np.linspace(0, 1, 1024)
SRGB_CURVE = np.where(RAMP <= 0.04045, RAMP / 12.92, ((RAMP + 0.055) / 1.055) ** 2.4)
GAMMA_CURVE = RAMP ** (563 / 256)
P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
DISPLAY_P3, ADOBE_RGB = rgb_profile(P3, SRGB_CURVE), rgb_profile(ADOBE, GAMMA_CURVE)


def cyan_is_gray():
    """Returns a CMYK profile by which cyan alone is L* = 50, and everything else is black."""
    grid = np.zeros((2, 2, 2, 2, 3), np.uint8)
    grid[..., 1:] = 128  # a* = b* = 0
    grid[1, 0, 0, 0, 0] = 128
    one = np.eye(3).ravel() * 65536
    table = struct.pack(">4sIBBBx9i", b"mft1", 0, 4, 3, 2, *one.astype(int))
    ramp = bytes(range(256))
    return icc_profile(
        b"CMYK", b"prtr", b"Lab ", {b"A2B0": table + 4 * ramp + grid.tobytes() + 3 * ramp}
    )


CYAN_IS_GRAY = cyan_is_gray()


def lab_of(image, columns, curve):
    """Returns (H, W, 3) L*a*b* of an RGB image in the colours of a profile, without ICC code."""
    linear = np.interp(image / 255, RAMP, curve)
    return skimage.color.xyz2lab(linear @ np.array(columns), illuminant="D50")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize(
    ("profile", "columns", "curve"),
    [(DISPLAY_P3, P3, SRGB_CURVE), (ADOBE_RGB, ADOBE, GAMMA_CURVE)],
    ids=["Display P3", "Adobe RGB"],
)
def test_colours_look_the_same(tmp_path, suffix, profile, columns, curve):
    vivid = np.asarray(Image.fromarray(PHOTO).filter(ImageFilter.GaussianBlur(1)))
    source = {".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = save(
        tmp_path / f"a{suffix if suffix != '.webp' else '.png'}",
        vivid,
        icc_profile=profile,
        **source,
    )
    photo = read_photo(path)
    assert photo.icc == profile and photo.notes == []
    expected = lab_of(enlarged(photo), columns, curve)

    result = result_of(tmp_path, photo, suffix)
    embedded = ImageCms.ImageCmsProfile(io.BytesIO(result.info["icc_profile"]))
    seen = ImageCms.profileToProfile(
        result, embedded, ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    seen = np.asarray(seen)
    seen = np.dstack([seen[..., 0] / 2.55, seen[..., 1:].view(np.int8)])
    assert skimage.color.deltaE_ciede2000(expected, seen).mean() < 1

    srgb = lab_of(enlarged(photo), *SRGB)
    assert skimage.color.deltaE_ciede2000(expected, srgb).mean() > 1.5  # were the profile lost


SRGB = (
    [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)],
    SRGB_CURVE,
)


def test_a_profile_of_other_colours_is_left_out(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", PHOTO, icc_profile=CYAN_IS_GRAY))
    assert photo.icc is None and "profile" in photo.notes[0]


def test_a_grey_profile_stays_with_grey(tmp_path):
    curve = struct.pack(">4sIIH2x", b"curv", 0, 1, 0x0233)
    profile = icc_profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": curve})
    photo = read_photo(save(tmp_path / "a.png", GRAY, icc_profile=profile))
    result = result_of(tmp_path, photo)
    assert (result.mode, result.info["icc_profile"]) == ("L", profile)


# Files that cannot be read --------------------------------------------------------------------


def test_unreadable_files_are_named_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    cut = save(tmp_path / "cut.png", PHOTO)
    cut.write_bytes(cut.read_bytes()[:2000])
    save(tmp_path / "cut.jpg", PHOTO)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    paths = [*tmp_path.iterdir(), tmp_path / "none.png", tmp_path / ("n" * 300 + ".png")]
    paths.append(tmp_path / os.fsdecode(b"caf\xe9.png"))
    for path in paths:
        for read in (read_photo, read_image):
            with pytest.raises(ImageError) as raised:
                read(path)
            assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_size_is_told_by_the_header_alone(tmp_path):
    for suffix in (".png", ".jpg", ".tif"):
        path = save(tmp_path / f"a{suffix}", PHOTO)
        path.write_bytes(path.read_bytes()[:1200])
        if suffix != ".tif":  # whose tags may stand at the end
            assert image_size(path) == (60, 80)


def test_names_of_any_bytes_can_be_read_and_written(tmp_path):
    for name in (b"caf\xe9.png", "фото.png".encode(), b"n" * 251 + b".png", b" .png"):
        path = tmp_path / os.fsdecode(name)
        write_png(path, PHOTO, "stamp")
        assert (read_image(path) == PHOTO).all() and read_stamp(path) == "stamp"


def test_damaged_images_cause_nothing_but_image_errors(tmp_path):
    readable, failures = fuzz(300, 1, tmp_path)
    assert not failures
    assert 50 < readable < 250


# Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stamp",
    [
        "made from a.png 6x6 pad 8",
        "фото 写真 🦊",
        "two\nlines, \0 and\ttab",
        "é",
        "x" * 5000,
        "100 %",
    ],
)
def test_png_keeps_pixels_and_stamp(tmp_path, stamp):
    path = tmp_path / "a.png"
    write_png(path, PHOTO, stamp)
    assert (np.asarray(Image.open(path)) == PHOTO).all()
    assert (cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) == PHOTO).all()
    assert read_stamp(path) == stamp


def test_stamps_of_other_files(tmp_path):
    write_png(tmp_path / "plain.png", PHOTO)
    (tmp_path / "text.png").write_text("no")
    for name in ("plain.png", "text.png", "none.png"):
        assert read_stamp(tmp_path / name) is None
    write_png(tmp_path / "odd.png", PHOTO, os.fsdecode(b"caf\xe9"))
    assert read_stamp(tmp_path / "odd.png") == "caf\\udce9"


def test_grey_and_alpha_are_written_by_the_same_function(tmp_path):
    for image in (GRAY, GRAY[:, :3], np.dstack([GRAY, HOLED]), np.dstack([PHOTO, HOLED])):
        write_png(tmp_path / "a.png", image, "stamp")
        assert (np.asarray(Image.open(tmp_path / "a.png")) == image).all()
        assert read_stamp(tmp_path / "a.png") == "stamp"


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_jpeg_is_fine_and_in_full_colour(tmp_path, suffix):
    photo = Photo(PHOTO)
    result = result_of(tmp_path, photo, suffix)
    assert result.layer[0][1:3] == result.layer[1][1:3]  # no channel is subsampled
    assert np.abs(np.asarray(result).astype(int) - enlarged(photo)).mean() < 2


def test_results_keep_the_stamp(tmp_path):
    write_image(tmp_path / "a.png", enlarged(Photo(PHOTO)), Photo(PHOTO), "stamp")
    assert read_stamp(tmp_path / "a.png") == "stamp"


@pytest.mark.parametrize("name", ["a.bmp", "a.gif", "a", "a.txt"])
def test_other_formats_are_not_written(tmp_path, name):
    with pytest.raises(ImageError, match=r"\.png, \.jpg"):
        write_image(tmp_path / name, enlarged(Photo(PHOTO)), Photo(PHOTO))
    assert not list(tmp_path.iterdir())


def test_too_large_for_a_format(tmp_path):
    photo = Photo(np.zeros((1, 5000, 3), np.uint8))
    with pytest.raises(ImageError, match=r"20000x4 .*\.png"):
        write_image(tmp_path / "a.webp", enlarged(photo), photo)
    write_image(tmp_path / "a.png", enlarged(photo), photo)


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (KeyboardInterrupt, OSError, ValueError):
        with pytest.raises(error), replacing(path) as temporary:
            temporary.write_text("ne")
            raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_never_share_a_name(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    with replacing(path) as one, replacing(path) as other:
        assert one != other and one.parent == other.parent == tmp_path
        assert one.name.startswith(".") and str(os.getpid()) in one.name
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "a.png"
    write_png(path, PHOTO)
    write = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import numpy as np, images, pathlib\n"
        "for n in range(300):\n"
        "    image = np.full((60, 80, 3), n % 256, np.uint8)\n"
        f"    images.write_png(pathlib.Path({str(path)!r}), image)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write]) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert read_image(path).shape == (60, 80, 3)
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0] and reads > 50
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, code):
    def fail(path, data):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    for write in (
        lambda path: write_png(path, PHOTO),
        lambda path: write_image(path, enlarged(Photo(PHOTO)), Photo(PHOTO)),
    ):
        with pytest.raises(StorageError) as raised:
            write(tmp_path / "a.png")
        folder, remedy = str(raised.value).split(": ", 1)
        assert folder == str(tmp_path) and ";" in remedy
    assert not list(tmp_path.iterdir())


def test_a_full_disk_met_by_pillow_is_one_too(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(StorageError, match="No space left on device; free"):
        write_image(tmp_path / "a.jpg", enlarged(Photo(PHOTO)), Photo(PHOTO))


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_png(tmp_path / "none" / "a.png", PHOTO)
    with pytest.raises(PermissionError), replacing(tmp_path / "a.png"):
        raise PermissionError(errno.EACCES, "Permission denied", "another file")


def test_weights_reach_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), fsync(handle)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (events.append("rename"), rename(self, to))
    )
    with replacing(tmp_path / "a.pth", durable=True) as temporary:
        temporary.write_bytes(b"weights")
    assert events == ["flush", "rename", "flush"]
    assert (tmp_path / "a.pth").read_bytes() == b"weights"
    with replacing(tmp_path / "a.png") as temporary:
        temporary.touch()
    assert events[3:] == ["rename"]


# Pixels ---------------------------------------------------------------------------------------


def test_canny_is_that_of_scikit_image():
    photo = skimage.data.astronaut()
    expected = skimage.feature.canny(skimage.color.rgb2gray(photo), sigma=2)
    edges = canny(photo)
    assert edges.dtype == np.uint8 and (edges == 255 * expected).all() and edges.any()


def test_canny_needs_no_more_than_its_reach():
    photo = skimage.data.astronaut()[:200, :200]
    reach = images.CANNY_REACH
    window = canny(photo[50 - reach : 100 + reach, 50 - reach : 100 + reach])
    inner = window[reach:-reach, reach:-reach]
    assert (inner != canny(photo)[50:100, 50:100]).mean() < 0.01  # hysteresis may reach further


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 40), (3, 3)])
def test_canny_of_the_smallest_images(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert canny(image).shape == shape


def test_bicubic_is_pillows():
    image = Image.fromarray(PHOTO)
    for scale, size in ((4, (320, 240)), (1 / 4, (20, 15))):
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        assert (bicubic(PHOTO, scale) == expected).all()
    assert (bicubic(PHOTO[:59, :79], 1 / 4) == bicubic(PHOTO[:56, :76], 1 / 4)).all()
    assert bicubic(GRAY, 4).shape == (240, 320)


def test_many_threads_read_at_once(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([PHOTO, HOLED]), icc_profile=DISPLAY_P3)
    expected, wrong = read_photo(path).rgb, []

    def work():
        with contextlib.suppress(AssertionError):
            for _ in range(20):
                assert (read_photo(path).rgb == expected).all()
            return
        wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
