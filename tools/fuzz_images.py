"""Reads damaged images, which may raise ImageError but nothing else, and must not change size.

    python tools/fuzz_images.py [COUNT] [--seed 0]

Files in every supported input format, made from scikit-image's photographs, are damaged at random,
mostly near the beginning, where sizes and tags are; in a PNG the checksums are mostly repaired, so
that the damage gets past them. What is still readable is written again, in any output format, and
its stamp read back. 300 of these files are part of the test suite.
"""

import contextlib
import io
import resource
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageCms, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import console
import images

ODD_NUMBERS = (0, 1, 2, 6, 8, 9, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def originals() -> list[tuple[str, bytes]]:
    """Returns (suffix, contents) of intact files in many modes and with all kinds of metadata."""
    rgb = Image.fromarray(skimage.data.astronaut()[:40, 200:256])
    cat = Image.fromarray(skimage.data.cat()[100:140, 200:256])
    rgba = rgb.copy()
    rgba.putalpha(cat.convert("L"))
    deep = Image.fromarray(np.asarray(cat.convert("L"), np.uint16) * 257)
    exif = Image.Exif()
    exif.update(
        {
            0x0112: 6,
            0x010F: "Camera",
            0x8769: {0xA002: 56, 0x9286: b"comment", 0xA005: {1: "R03"}},
            0x8825: {1: "N"},
        }
    )
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    carried = {"exif": exif.tobytes(), "icc_profile": icc, "dpi": (300, 300)}
    xmp, grey = b'<x:xmpmeta><a tiff:Orientation="6"/></x:xmpmeta>', cat.convert("L")
    text = PngImagePlugin.PngInfo()
    text.add(b"gAMA", struct.pack(">I", 60000))
    text.add(b"cHRM", struct.pack(">8I", *range(30000, 70000, 5000)))
    text.add_text("parameters", "a prompt", zip=True)
    text.add_itxt("Title", "Größe", "de", "Titel", zip=True)
    text.add_itxt("XML:com.adobe.xmp", xmp)
    late = PngImagePlugin.PngInfo()
    late.add(b"eXIf", exif.tobytes()[6:], after_idat=True)
    files = [
        *((".png", image, {}) for image in (rgb, rgba, deep, grey, cat.convert("1"))),
        (".png", rgb, carried),
        (".png", rgb, {"pnginfo": text}),
        (".png", rgb, {"pnginfo": late}),
        (".png", cat.convert("P"), {"transparency": bytes(range(256))}),
        (".png", cat, {"transparency": (0, 0, 0)}),
        (".apng", rgb, {"save_all": True, "append_images": [cat]}),
        *((".jpg", image, {}) for image in (rgb, grey, cat.convert("CMYK"))),
        (".jpg", rgb, {"progressive": True, "comment": "words", "xmp": xmp, **carried}),
        (".mpo", rgb, {"save_all": True, "append_images": [cat], **carried}),
        *((".webp", image, {"lossless": lossless}) for image in (rgb, rgba) for lossless in (0, 1)),
        (".webp", cat, {"exif": exif.tobytes(), "icc_profile": icc, "xmp": xmp}),
        *((".tif", image, {}) for image in (rgb, rgba, deep, cat.convert("CMYK"))),
        *((".tif", cat.convert(mode), {}) for mode in ("1", "L", "P", "I", "F", "LAB")),
        *((".tif", rgb, {"compression": name}) for name in ("tiff_lzw", "packbits", "jpeg")),
        *((".tif", cat.convert(mode), carried) for mode in ("1", "L", "P", "RGB", "CMYK")),
        (".tif", deep, {"tiffinfo": {262: 0, 700: xmp, 33723: b"caption"}}),
        (".gif", cat.convert("P"), {"comment": "words", "transparency": 3}),
        *((".bmp", image, {}) for image in (rgb, rgba, grey, cat.convert("1"), cat.convert("P"))),
        *((".ppm", image, {}) for image in (rgb, grey, deep.convert("I"), cat.convert("1"))),
        *((".avif", image, {}) for image in (rgb, rgba)),
    ]
    return [(suffix, encode(image, suffix, options)) for suffix, image, options in files]


def encode(image: Image.Image, suffix: str, options: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def damage(contents: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file with one to six changes, from a single bit to a missing half."""
    data = bytearray(contents)
    for _ in range(rng.integers(1, 7)):
        reach = len(data) if rng.random() < 0.4 else min(len(data), 400)
        at, length = int(rng.integers(reach)) if reach else 0, int(rng.integers(1, 40))
        kind = rng.choice(["bit", "byte", "number", "drop", "repeat", "noise", "cut"], p=CHANCES)
        if not data:
            break
        if kind == "bit":
            data[at] ^= 1 << rng.integers(8)
        elif kind == "byte":
            data[at] = rng.integers(256)
        elif kind == "number":
            code = str(rng.choice(["<H", ">H", "<I", ">I"]))
            size = struct.calcsize(code)
            number = int(rng.choice(ODD_NUMBERS)) % 256**size
            data[at : at + size] = struct.pack(code, number)
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "noise":
            data[at : at + length] = rng.bytes(length)
        else:
            del data[int(rng.integers(len(data))) :]
    return mended(bytes(data)) if rng.random() < 0.8 else bytes(data)


CHANCES = [0.25, 0.2, 0.3, 0.07, 0.07, 0.07, 0.04]


def mended(contents: bytes) -> bytes:
    """Returns a PNG file with correct checksums, as far as its chunks can be followed."""
    data, at = bytearray(contents), 8
    if not contents.startswith(b"\x89PNG"):
        return contents
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


def check(path: Path, suffix: str) -> bool:
    """Reads a file in every way, writes what was read, and returns whether it could be read.

    Args:
        suffix: format to write.

    Raises:
        AssertionError: the size differs from the one in the header.
        Exception: anything but an ImageError or a MemoryError.
    """
    try:
        photo = images.read_photo(path)
    except console.ImageError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        for read in (images.image_size, images.read_image):
            with contextlib.suppress(console.ImageError):
                read(path)
        return False
    size = photo.rgb.shape[:2]
    assert images.image_size(path) == size, (images.image_size(path), size)
    assert photo.rgb.dtype == np.uint8 and photo.rgb.shape[2] == 3
    assert photo.alpha is None or photo.alpha.shape == size
    assert (images.read_image(path) == photo.rgb).all()
    result = path.with_name(f"result{suffix}")
    with contextlib.suppress(console.ImageError):  # too large for the format
        images.write_image(result, photo.rgb, photo, "source=0123456789abcdef")
        assert images.read_stamp(result) == "source=0123456789abcdef"
        with Image.open(result) as image:
            image.load()
        again = images.read_photo(result)
        assert images.image_size(result) == again.rgb.shape[:2] == size, again.rgb.shape
        assert not again.notes, again.notes
    return True


def fuzz(count: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Damages and reads `count` files; returns how many were still readable, and all failures.

    A file that failed stays in `folder`.
    """
    rng, files = np.random.default_rng(seed), originals()
    readable, failures = 0, []
    for number in console.progress(range(count), desc="Reading", unit="file"):
        suffix, contents = files[rng.integers(len(files))]
        path = folder / f"{number}{suffix}"
        path.write_bytes(damage(contents, rng))
        try:
            with contextlib.suppress(MemoryError):  # a size can lie
                readable += check(path, str(rng.choice(list(images.RESULTS))))
            path.unlink()
        except Exception as error:
            failures.append(f"{path}: {type(error).__name__}: {error}")
    return readable, failures


def main() -> int:
    parser = console.Parser(__doc__)
    parser.add_argument(
        "count", type=console.count, nargs="?", default=10_000, metavar="COUNT", help="of files"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))  # a size can lie
    folder = Path(tempfile.mkdtemp(prefix="fuzz_images"))
    readable, failures = fuzz(options.count, options.seed, folder)
    if not failures:
        shutil.rmtree(folder)
    for failure in failures:
        print(failure)
    print(f"{options.count} files damaged, {readable} still readable, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
