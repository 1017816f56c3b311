import contextlib
import errno
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
from PIL import Image, ImageCms, ImageFile, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

import console
import images
import metadata
from images import Photo, read_photo, write_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTO = np.ascontiguousarray(skimage.data.astronaut()[:60, 180:260])  # 60 x 80
GRAY = np.asarray(Image.fromarray(PHOTO).convert("L"))
HOLED = np.where(np.add.outer(np.arange(60), np.arange(80)) < 60, 0, 255).astype(np.uint8)
STAMP = "source=0123456789abcdef grid=6x6 weights=fp32"


def save(path, image, **options):
    """Writes an array or a Pillow image as its suffix tells, and returns the path."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def insert(path, kind, data, before, checksum=None):
    """Inserts a chunk before the first chunk of type `before` of a PNG file."""
    png = path.read_bytes()
    at = png.index(before) - 4
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    path.write_bytes(png[:at] + chunk + png[at:])
    return path


def difference(one, other):
    return np.abs(one.astype(int) - other).max()


def enlarged(photo):
    return images.bicubic(photo.rgb, 4)


def result_of(tmp_path, photo, suffix=".png"):
    """Writes an enlarged photo and opens the result, which has nothing to note when read again."""
    path = tmp_path / f"result{suffix}"
    write_image(path, enlarged(photo), photo, STAMP)
    assert read_photo(path).notes == []
    image = Image.open(path)
    image.load()
    return image


# Formats and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(images.SUFFIXES))
def test_every_suffix_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    Image.fromarray(PHOTO).save(path, Image.registered_extensions()[suffix], quality=95)
    photo = read_photo(path)
    assert np.abs(photo.rgb.astype(int) - PHOTO).mean() < 4
    assert images.read_image(path).flags.writeable and images.image_size(path) == (60, 80)
    assert (images.read_image(path) == photo.rgb).all()
    if suffix in (".png", ".tif", ".bmp", ".ppm"):
        assert (photo.rgb == PHOTO).all()
    photo.dpi = None  # BMP says one
    assert vars(photo) == vars(Photo(photo.rgb))


def test_suffixes_are_read_or_foreign():
    assert not images.SUFFIXES & images.FOREIGN and images.RESULTS.keys() <= images.SUFFIXES
    assert {".ico", ".heic", ".jp2", ".tga"} <= images.FOREIGN


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_grey_stays_grey(tmp_path, suffix, mode):
    image = Image.fromarray(GRAY).convert(mode)
    photo = read_photo(save(tmp_path / f"a{suffix}", image))
    assert photo.gray and photo.notes == []
    assert (photo.rgb == np.asarray(image.convert("L"))[..., None]).all()
    assert result_of(tmp_path, photo).mode == "L"


@pytest.mark.parametrize("suffix", images.RESULTS)
def test_equal_channels_come_back_equal(tmp_path, suffix):
    photo = Photo(np.dstack([GRAY] * 3))
    coloured = enlarged(photo)
    coloured[..., 0] = np.minimum(coloured[..., 0] + 9.0, 255)
    write_image(tmp_path / f"a{suffix}", coloured, photo)
    result = images.read_image(tmp_path / f"a{suffix}")
    assert difference(result[..., :1], result) == 0


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".zero.tif"])
def test_16_bits_of_grey_are_rounded(tmp_path, suffix):
    deep = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    if suffix == ".zero.tif":  # white is 0
        path = save(tmp_path / f"a{suffix}", 65535 - deep, tiffinfo={262: 0})
    else:
        path = save(tmp_path / f"a{suffix}", deep)
    photo = read_photo(path)
    assert difference(photo.rgb[..., 0], np.rint(deep / 257)) == 0
    assert photo.gray and "8 bits" in photo.notes[0]


@pytest.mark.parametrize(
    ("suffix", "channels"), [(".png", 3), (".png", 4), (".tif", 3), (".tif", 4), (".ppm", 3)]
)
def test_16_bits_of_colour_are_reduced_with_a_note(tmp_path, suffix, channels):
    image = np.dstack([PHOTO, np.full_like(GRAY, 200)])[..., :channels]
    path = tmp_path / f"a{suffix}"
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[channels]
    assert cv2.imwrite(str(path), cv2.cvtColor(image.astype(np.uint16) * 256 + 77, code))
    photo = read_photo(path)
    assert difference(photo.rgb, PHOTO) <= 1
    assert "8 bits" in photo.notes[0]
    assert channels == 3 or (photo.alpha == 200).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bits_are_refused(tmp_path, kind):
    path = save(tmp_path / "a.tif", GRAY.astype(kind))
    with pytest.raises(console.ImageError, match=r"a\.tif.*32 bits.*convert"):
        read_photo(path)


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
        assert len(photo.notes) == (converted.mode != "YCbCr")


def test_cmyk_goes_through_its_profile(tmp_path):
    image = Image.new("CMYK", (40, 30), (255, 0, 0, 0))  # cyan, which is a grey in this profile
    for suffix in (".jpg", ".tif"):
        photo = read_photo(save(tmp_path / f"a{suffix}", image, icc_profile=CYAN_IS_GRAY))
        assert difference(photo.rgb, 119) <= 1  # L* = 50
        assert photo.icc is None and "CMYK" in photo.notes[0]
    photo = read_photo(save(tmp_path / "b.jpg", image, icc_profile=LINEAR_RGB))  # does not fit
    assert difference(photo.rgb, [0, 255, 255]) <= 1


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(each).quantize(64) for each in (PHOTO, PHOTO[::-1])]
    for suffix in (".gif", ".png", ".webp", ".tif"):
        path = save(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
        photo = read_photo(path)
        assert np.abs(photo.rgb.astype(int) - PHOTO).mean() < 8
        assert "first frame" in photo.notes[0]


def test_one_pixel_is_an_image_too(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        photo = read_photo(save(tmp_path / "a.png", Image.new(mode, (1, 1))))
        photo.notes.clear()
        assert result_of(tmp_path, photo).size == (4, 4)


# Transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_kept_beside_the_colours(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", np.dstack([PHOTO, HOLED]), lossless=True)
    photo = read_photo(path)
    assert (photo.alpha == HOLED).all()
    assert (photo.rgb[HOLED > 0] == PHOTO[HOLED > 0]).all()
    result = np.asarray(result_of(tmp_path, photo))
    assert (result[..., 3] == images.bicubic(HOLED, 4)).all()
    assert (result[..., :3] == enlarged(photo)).all()


def test_alpha_that_hides_nothing_is_no_alpha(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(PHOTO).convert("RGBA"))
    assert read_photo(path).alpha is None


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


def test_a_transparent_colour_of_another_depth_is_told(tmp_path):
    save(tmp_path / "b.png", GRAY.astype(np.uint16) * 257)
    insert(tmp_path / "b.png", b"tRNS", struct.pack(">H", int(GRAY[30, 40]) * 257), b"IDAT")
    photo = read_photo(tmp_path / "b.png")
    assert photo.alpha is None and "transparent colour" in photo.notes[1]


def test_hidden_pixels_take_the_nearest_visible_colour(tmp_path):
    image = np.zeros((20, 60, 4), np.uint8)
    image[:, :10], image[:, 50:] = (10, 20, 30, 255), (200, 210, 220, 1)
    rgb = read_photo(save(tmp_path / "a.png", image)).rgb
    assert (rgb[:, :28] == [10, 20, 30]).all() and (rgb[:, 32:] == [200, 210, 220]).all()
    image[..., 3] = 0
    assert (read_photo(save(tmp_path / "a.png", image)).alpha == 0).all()


def test_jpeg_says_that_it_has_no_transparency(tmp_path):
    photo = Photo(PHOTO, alpha=HOLED)
    assert "white" in write_image(tmp_path / "a.jpg", enlarged(photo), photo)[0]
    alpha, result = images.bicubic(HOLED, 4), images.read_image(tmp_path / "a.jpg")
    assert result[alpha == 0].min() > 200
    assert np.abs(result[alpha == 255].astype(int) - enlarged(photo)[alpha == 255]).mean() < 3


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


@pytest.mark.parametrize("suffix", [".jpg", ".mpo.jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, *OUTSIDE])
def test_images_are_turned_upright_by_their_tag(tmp_path, suffix, orientation):
    path, options = tmp_path / f"a{suffix}", {"exif": exif_of(orientation)}
    if suffix == ".mpo.jpg":
        others = {"save_all": True, "append_images": [Image.fromarray(PHOTO)]}
        Image.fromarray(PHOTO).save(path, "MPO", quality=95, subsampling=0, **options, **others)
    else:
        lossless = {"lossless": True} if suffix == ".webp" else {"quality": 95, "subsampling": 0}
        save(path, PHOTO, **options, **lossless)
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(PHOTO)
    photo = read_photo(path)
    assert images.image_size(path) == photo.rgb.shape[:2] == expected.shape[:2]
    assert np.abs(photo.rgb.astype(int) - expected).mean() < 2
    result = result_of(tmp_path, photo)
    assert result.size == (4 * expected.shape[1], 4 * expected.shape[0])
    assert 0x0112 not in result.getexif()
    assert photo.notes == []


def test_an_orientation_behind_the_pixels_is_told(tmp_path):
    exif = exif_of(6).tobytes().removeprefix(b"Exif\0\0")
    path = insert(save(tmp_path / "a.png", PHOTO), b"eXIf", exif, b"IEND")
    photo = read_photo(path)
    assert images.image_size(path) == photo.rgb.shape[:2] == (60, 80)
    assert "orientation" in photo.notes[0]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_other_modes_are_turned_too(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", np.dstack([PHOTO, HOLED]), exif=exif_of(6))
    assert (read_photo(path).alpha == np.rot90(HOLED, -1)).all()
    for image in (GRAY, GRAY.astype(np.uint16) * 257, Image.fromarray(GRAY).convert("P")):
        path = save(tmp_path / f"b{suffix}", image, exif=exif_of(6))
        assert (read_photo(path).rgb[..., 0] == np.rot90(GRAY, -1)).all()
        assert images.image_size(path) == (80, 60)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="%d"/>words</x:xmpmeta>'


def test_xmp_alone_does_not_turn(tmp_path):
    for path in (
        save(tmp_path / "a.jpg", PHOTO, xmp=XMP % 6),
        save(tmp_path / "a.tif", PHOTO, tiffinfo={700: XMP % 6}),
    ):
        assert images.image_size(path) == images.read_image(path).shape[:2] == (60, 80)


# What is carried ------------------------------------------------------------------------------


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
    assert images.image_size(path) == photo.rgb.shape[:2] == (60, 80)
    assert b"not a" not in exif or "EXIF" in photo.notes[0]
    for result in images.RESULTS:
        assert result_of(tmp_path, photo, result).size == (320, 240)


def test_exif_text_is_kept_to_the_byte(tmp_path):
    exif = Image.Exif()
    texts = {270: "Café Straße".encode(), 315: "Jürgen".encode("latin-1"), 33432: b"(c) me"}
    for tag, text in texts.items():
        exif[tag] = text
    exif[0x8769], exif[0x8825] = {0x9003: "2021:05:01 12:00:00", 0xA005: {1: "R03"}}, {}
    photo = read_photo(save(tmp_path / "a.jpg", PHOTO, exif=exif.tobytes()))
    for suffix in images.RESULTS:
        found = result_of(tmp_path, photo, suffix).getexif()
        assert {tag: found[tag].encode("latin-1") for tag in texts} == texts, suffix
        assert found.get_ifd(0x8769)[0x9003] == "2021:05:01 12:00:00"
        assert 0x8825 not in found  # an empty directory


SUFFIXES = [".png", ".jpg", ".webp", ".tif"]


@pytest.fixture
def camera():
    exif = exif_of(6)
    exif[0x010F], exif[0x0132], exif[0x0100] = "Camera", "2021:05:01 12:00:00", 80
    exif[0x8769] = {0xA002: 80, 0xA003: 60, 0x829A: 0.01, 0x9286: b"ASCII\0\0\0hello"}
    exif.endian = "<"
    exif[0x8825] = {1: "N", 2: (48.0, 8.0, 14.0)}
    return exif.tobytes()


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", SUFFIXES)
def test_exif_and_dpi_come_back(tmp_path, camera, source, target):
    options = {} if source == ".webp" else {"dpi": (300, 150)}
    photo = read_photo(save(tmp_path / f"a{source}", PHOTO, exif=camera, **options))
    assert photo.notes == []
    result = result_of(tmp_path, photo, target)
    exif = result.getexif()
    assert exif[0x010F] == "Camera" and exif[0x0132] == "2021:05:01 12:00:00"
    assert exif.get_ifd(0x8825)[2] == (48.0, 8.0, 14.0)
    details = exif.get_ifd(0x8769)
    assert exif.endian == "<"
    assert details[0x829A] == pytest.approx(0.01) and details[0x9286] == b"ASCII\0\0\0hello"
    assert (details[0xA002], details[0xA003]) == result.size == (240, 320)  # turned and enlarged
    assert exif.get(0x0112, 1) == 1
    assert exif.get(0x0100, 240) == 240
    if target != ".webp" and source != ".webp":
        assert result.info["dpi"] == pytest.approx((300, 150), abs=0.02)


def test_what_is_too_long_for_jpeg_is_told(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: bytes(70000)}
    for long in ({"exif": exif}, {"xmp": XMP % 1 + bytes(70000)}):
        photo = Photo(PHOTO, **long)
        (note,) = write_image(tmp_path / "b.jpg", enlarged(photo), photo, STAMP)
        assert all(word in note for word in ("EXIF", "XMP"))
        assert images.read_stamp(tmp_path / "b.jpg") == STAMP
    photo = Photo(PHOTO, exif=exif)
    assert result_of(tmp_path, photo).getexif().get_ifd(0x8769)[0x9286] == bytes(70000)


def test_dpi(tmp_path):
    assert read_photo(save(tmp_path / "a.tif", PHOTO)).dpi is None  # Pillow says 1
    path = insert(save(tmp_path / "a.png", PHOTO), b"pHYs", struct.pack(">IIB", 0, 9, 1), b"IDAT")
    assert read_photo(path).dpi is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_xmp_is_carried_and_says_upright(tmp_path, suffix):
    options = {"exif": exif_of(6)}
    if suffix == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(metadata.PNG_XMP, XMP % 6)
    elif suffix == ".tif":
        options = {"tiffinfo": {700: XMP % 6, 0x0112: 6}}
    else:
        options["xmp"] = XMP % 6
    photo = read_photo(save(tmp_path / f"a{suffix}", PHOTO, **options))
    for target in SUFFIXES:
        result = result_of(tmp_path, photo, target)
        assert b"words" in result.info["xmp"] and b'"6"' not in result.info["xmp"]
        assert result.size == (240, 320)
        assert result.getexif().get(0x0112, 1) == 1


def test_texts_come_back_in_png(tmp_path, monkeypatch):
    info = PngInfo()
    texts = {"parameters": "a prompt, größer", "Title": "写真", "Comment": "x" * 2_000_000}
    for key, value in texts.items():
        info.add_text(key, value, zip=True)
    photo = read_photo(save(tmp_path / "a.png", PHOTO, pnginfo=info))
    with monkeypatch.context() as patch:  # as other programs have it
        patch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", images.PROFILE_BYTES)
        assert result_of(tmp_path, photo).text == texts
    for suffix in (".webp", ".tif"):
        (note,) = write_image(tmp_path / f"b{suffix}", enlarged(photo), photo)
        assert "parameters" in note and "Title" in note
    info = PngInfo()  # these keywords are Pillow's own
    texts = dict.fromkeys(("gamma", "chromaticity", "dpi", "exif", "xmp", "icc_profile"), "words")
    for key, value in texts.items():
        info.add_itxt(key, value)
    photo = read_photo(save(tmp_path / "a.png", PHOTO, pnginfo=info))
    photo.notes.clear()
    assert result_of(tmp_path, photo).text == texts


@pytest.mark.parametrize("suffix", [".jpg", ".gif"])
def test_a_comment_is_not_kept_and_named(tmp_path, suffix):
    photo = read_photo(save(tmp_path / f"a{suffix}", PHOTO, comment="words"))
    assert "comment" in photo.notes[0] and photo.text == {}


def test_iptc_data_are_not_kept_and_named(tmp_path):
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x04\x1c\x02\0\0"
    segment = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    for path in (
        save(tmp_path / "a.jpg", PHOTO, extra=segment),
        save(tmp_path / "a.tif", PHOTO, tiffinfo={33723: b"caption"}),
    ):
        assert "IPTC" in read_photo(path).notes[0]


# Colours --------------------------------------------------------------------------------------


def test_other_gammas_and_primaries_are_told(tmp_path):
    sizes = 31270, 32900, 64000, 33000, 30000, 60000, 15000
    for gamma, blue in ((45455, 6000), (100_000, 6000), (45455, 9000)):
        path = insert(save(tmp_path / "a.png", PHOTO), b"gAMA", struct.pack(">I", gamma), b"IDAT")
        photo = read_photo(insert(path, b"cHRM", struct.pack(">8I", *sizes, blue), b"IDAT"))
        assert sum("look different" in note for note in photo.notes) == (
            (gamma, blue) != (45455, 6000)
        )
        assert (photo.rgb == PHOTO).all()
    photo = read_photo(insert(path, b"sRGB", b"\0", b"IDAT"))  # which overrules both
    assert (photo.rgb == PHOTO).all() and photo.notes == []


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


SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
XYZ, TRC = (b"rXYZ", b"gXYZ", b"bXYZ"), (b"rTRC", b"gTRC", b"bTRC")
PRIMARIES = [struct.pack(">3i", *(round(value * 65536) for value in each)) for each in SRGB]
LINEAR = {name: b"XYZ \0\0\0\0" + xyz for name, xyz in zip(XYZ, PRIMARIES, strict=True)}
LINEAR |= dict.fromkeys(TRC, struct.pack(">4sII", b"curv", 0, 0))
LINEAR_RGB = icc_profile(b"RGB ", b"mntr", b"XYZ ", LINEAR)
LINEAR_GRAY = icc_profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": LINEAR[b"gTRC"]})


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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_profiles_come_back(tmp_path, suffix):
    photo = read_photo(save(tmp_path / f"a{suffix}", PHOTO, icc_profile=LINEAR_RGB))
    for target in SUFFIXES:
        assert result_of(tmp_path, photo, target).info["icc_profile"] == LINEAR_RGB
    gray = read_photo(save(tmp_path / "a.png", np.dstack([GRAY] * 3), icc_profile=LINEAR_RGB))
    assert result_of(tmp_path, gray).mode == "RGB"
    gray = read_photo(save(tmp_path / "a.png", GRAY, icc_profile=LINEAR_GRAY))
    result = result_of(tmp_path, gray, suffix)
    assert gray.notes == [] and result.info["icc_profile"] == LINEAR_GRAY


def test_a_profile_too_large_for_png_is_applied(tmp_path):
    noise = np.random.default_rng(0).bytes(1_200_000)
    icc = icc_profile(b"RGB ", b"mntr", b"XYZ ", LINEAR | {b"priv": b"data\0\0\0\0" + noise})
    value = PHOTO / 255
    expected = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
    for suffix, image in ((".tif", PHOTO), (".png", np.dstack([PHOTO, HOLED]))):
        photo = read_photo(save(tmp_path / f"a{suffix}", image, icc_profile=icc))
        assert photo.icc is None and "profile" in photo.notes[0]
        assert difference(photo.rgb[HOLED > 0], np.rint(255 * expected)[HOLED > 0]) <= 1
    assert (photo.alpha == HOLED).all()


def test_a_profile_of_other_colours_is_left_out(tmp_path):
    photo = read_photo(save(tmp_path / "a.png", PHOTO, icc_profile=CYAN_IS_GRAY))
    assert photo.icc is None and "profile" in photo.notes[0]


# Files that cannot be read --------------------------------------------------------------------


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])
    return path


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.png", b"", "replace it or convert"),
        ("notes.txt", b"words", "replace it or convert"),
        ("a.heic", b"words", "convert it to PNG"),
        ("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", "replace it or convert"),
        (
            "a.eps.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "replace it or convert",
        ),
        ("a.ppm", b"P6 nonsense", "replace or remove"),
    ],
)
def test_what_is_no_image_is_named_with_a_remedy(tmp_path, name, content, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_photo, images.read_image, images.image_size):
        with pytest.raises(console.ImageError, match=remedy) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert images.read_stamp(path) == ""


def test_what_the_file_system_says_is_not_a_bad_image(tmp_path, monkeypatch):
    with pytest.raises(OSError):
        read_photo(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_photo(tmp_path / "none.png")
    path = save(tmp_path / "a.png", PHOTO)
    for error, wanted in (
        (PermissionError(errno.EACCES, "Permission denied", str(path)), OSError),
        (OSError(errno.EMFILE, "Too many open files", str(path)), OSError),
        (MemoryError(), MemoryError),
    ):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(wanted) as raised:
            patch.setattr(Path, "open", fail)
            read_photo(path)
        assert "remove" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), MemoryError),
        (OSError("out of memory error when reading image file"), MemoryError),
        (OSError(errno.EINVAL, "Invalid argument"), console.ImageError),
        (struct.error("unpack"), console.ImageError),
        (KeyError("mode"), console.ImageError),
    ],
)
def test_only_damage_is_an_image_error(tmp_path, monkeypatch, error, wanted):
    def fail(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(wanted) as raised:
        read_photo(save(tmp_path / "a.png", PHOTO))
    assert wanted is MemoryError or "a.png" in console.one_line(raised.value)


def test_a_defect_of_ours_is_no_image_error(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "dpi_of", lambda *_: None + 1)
    with pytest.raises(TypeError):
        read_photo(save(tmp_path / "a.png", PHOTO))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_off_near_its_end_is_used(tmp_path, progressive):
    photo = skimage.data.astronaut()
    path = save(tmp_path / "a.jpg", photo, quality=90, progressive=progressive)
    whole, length = images.read_image(path), path.stat().st_size
    for missing in (2, 500):
        found = read_photo(cut(path, length - missing))
        assert (found.rgb == whole).mean() > (0.98 if missing > 2 else 0.999999)
        assert "end is missing" in found.notes[0] and images.image_size(path) == photo.shape[:2]
    if not progressive:  # of which the whole image is there, coarsely
        with pytest.raises(console.ImageError, match="missing"):
            read_photo(cut(path, length // 2))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp", ".gif", ".ppm"])
def test_other_files_that_are_cut_off_are_damaged(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", PHOTO)
    with pytest.raises(console.ImageError, match=r"damaged.*replace"):
        read_photo(cut(path, path.stat().st_size * 3 // 4))


def test_chunks_with_a_wrong_checksum_are_damage(tmp_path):
    path = insert(save(tmp_path / "a.png", PHOTO), b"tEXt", b"Title\0words", b"IDAT", checksum=1)
    with pytest.raises(console.ImageError, match="damaged"):
        read_photo(path)


def test_size_is_told_by_the_header_alone(tmp_path):
    for suffix in (".png", ".jpg"):
        assert images.image_size(cut(save(tmp_path / f"a{suffix}", PHOTO), 1200)) == (60, 80)


def test_damaged_images_cause_nothing_but_image_errors():
    command = [sys.executable, REPOSITORY / "tools" / "fuzz_images.py", "300", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    readable = int(done.stdout.split(", ")[1].split()[0])
    assert 50 < readable < 250


# Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", images.RESULTS)
def test_results_keep_the_stamp(tmp_path, suffix):
    path, photo = tmp_path / f"a{suffix}", Photo(PHOTO)
    for stamp in ("", STAMP):
        write_image(path, enlarged(photo), photo, stamp)
        assert images.read_stamp(path) == stamp
    assert read_photo(path).exif is None  # a result of this result gets a stamp of its own


def test_png_keeps_pixels_and_stamp(tmp_path):
    images.write_png(tmp_path / "a.png", PHOTO, STAMP)
    assert images.read_stamp(tmp_path / "a.png") == STAMP
    images.write_png(tmp_path / "a.png", PHOTO)
    assert (cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_COLOR_RGB) == PHOTO).all()
    assert images.read_stamp(tmp_path / "a.png") == images.read_stamp(tmp_path / "none.png") == ""


def test_names_of_any_bytes_can_be_read_and_written(tmp_path):
    for name in (b"caf\xe9.png", "фото.png".encode(), b"n" * 251 + b".png", b" .png"):
        path = tmp_path / os.fsdecode(name)
        images.write_png(path, PHOTO, STAMP)
        assert (images.read_image(path) == PHOTO).all() and images.read_stamp(path) == STAMP


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_jpeg_is_fine_and_in_full_colour(tmp_path, suffix):
    photo = Photo(PHOTO)
    result = result_of(tmp_path, photo, suffix)
    assert result.layer[0][1:3] == result.layer[1][1:3]  # no channel is subsampled
    assert np.abs(np.asarray(result).astype(int) - enlarged(photo)).mean() < 2


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_images_too_large_for_a_format_are_named_with_another(tmp_path, suffix):
    longest = images.LONGEST[images.RESULTS[suffix][0]]
    path, sr = tmp_path / f"a{suffix}", np.zeros((1, longest, 3), np.uint8)
    write_image(path, sr, Photo(sr[:, ::4]))
    assert images.image_size(path) == (1, longest)
    sr = np.zeros((1, longest + 1, 3), np.uint8)
    with pytest.raises(console.ImageError, match=rf"a\{suffix}: .* use \.png$"):
        write_image(path, sr, Photo(sr[:, ::4]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch, suffix):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(console.StorageError, match=f"{tmp_path}.*space"):
        write_image(tmp_path / f"a{suffix}", enlarged(Photo(PHOTO)), Photo(PHOTO))


# Pixels ---------------------------------------------------------------------------------------


def test_canny_is_that_of_scikit_image():
    photo = skimage.data.astronaut()
    expected = skimage.feature.canny(skimage.color.rgb2gray(photo), sigma=2)
    edges = images.canny(photo)
    assert edges.dtype == np.uint8 and (edges == 255 * expected).all() and edges.any()


def test_canny_needs_no_more_than_its_reach():
    photo = skimage.data.astronaut()[:200, :200]
    reach = images.CANNY_REACH
    window = images.canny(photo[50 - reach : 100 + reach, 50 - reach : 100 + reach])
    inner = window[reach:-reach, reach:-reach]
    assert (
        inner != images.canny(photo)[50:100, 50:100]
    ).mean() < 0.01  # hysteresis may reach further


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (2, 40), (3, 3)])
def test_canny_of_the_smallest_images(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert images.canny(image).shape == shape


def test_bicubic_is_pillows():
    image = Image.fromarray(PHOTO)
    for scale, size in ((4, (320, 240)), (1 / 4, (20, 15))):
        expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        assert (images.bicubic(PHOTO, scale) == expected).all()
    assert (images.bicubic(PHOTO[:59, :79], 1 / 4) == images.bicubic(PHOTO[:56, :76], 1 / 4)).all()
    assert images.bicubic(GRAY, 4).shape == (240, 320)


def test_many_threads_read_at_once(tmp_path):
    path = save(tmp_path / "a.png", np.dstack([PHOTO, HOLED]), icc_profile=LINEAR_RGB)
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
