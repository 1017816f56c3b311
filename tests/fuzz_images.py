"""Reads damaged images: no error but ImageError may come of it, and no wrong size.

    python tests/fuzz_images.py [--count 10000] [--seed 0]

PNG, JPEG, WebP and TIFF files of scikit-image's photographs are damaged at random, mostly near
their beginning, where sizes and tags stand; in a PNG the checksums are mended most of the time,
so that the damage gets past them. What is still readable is written again, in any format. 300
of these files are part of the test suite.
"""

import argparse
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
from PIL import Image, ImageCms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console import positive_int, progress
from images import RESULTS, ImageError, image_size, read_image, read_photo, write_image

ODD_NUMBERS = (0, 1, 2, 6, 8, 9, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def originals() -> list[tuple[str, bytes]]:
    """Returns (suffix, contents) of sound files in many modes and with all kinds of metadata."""
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
            0x8769: {0xA002: 56, 0x9286: b"comment"},
            0x8825: {1: "N"},
        }
    )
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    carried = {"exif": exif.tobytes(), "icc_profile": icc, "dpi": (300, 300)}
    files = [
        *((".png", image, {}) for image in (rgb, rgba, deep, cat.convert("L"), cat.convert("1"))),
        (".png", rgb, carried),
        (".png", cat.convert("P"), {"transparency": bytes(range(256))}),
        (".png", cat, {"transparency": (0, 0, 0)}),
        *((".jpg", image, {}) for image in (rgb, cat.convert("L"), cat.convert("CMYK"))),
        (".jpg", rgb, {"progressive": True, **carried}),
        *((".webp", image, {"lossless": lossless}) for image in (rgb, rgba) for lossless in (0, 1)),
        (".webp", cat, {"exif": exif.tobytes(), "icc_profile": icc}),
        *((".tif", image, {}) for image in (rgb, rgba, deep, cat.convert("CMYK"))),
        *((".tif", cat.convert(mode), {}) for mode in ("1", "L", "P", "I", "F", "LAB")),
        *((".tif", rgb, {"compression": name}) for name in ("tiff_lzw", "packbits", "jpeg")),
        *((".tif", cat.convert(mode), carried) for mode in ("1", "L", "P", "RGB", "CMYK")),
        (".tif", deep, carried),
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
    """Returns a PNG file with right checksums, as far as its chunks can be followed."""
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
        AssertionError: its size is not the one that its header tells.
        Exception: anything but an ImageError.
    """
    try:
        photo = read_photo(path)
    except ImageError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        for read in (image_size, read_image):
            with contextlib.suppress(ImageError):
                read(path)
        return False
    assert image_size(path) == photo.rgb.shape[:2], (image_size(path), photo.rgb.shape)
    assert photo.rgb.dtype == np.uint8 and photo.rgb.shape[2] == 3
    assert photo.alpha is None or photo.alpha.shape == photo.rgb.shape[:2]
    assert (read_image(path) == photo.rgb).all()
    result = path.with_name(f"result{suffix}")
    with contextlib.suppress(ImageError):  # too large for the format
        write_image(result, photo.rgb, photo)
        assert image_size(result) == photo.rgb.shape[:2], (image_size(result), photo.rgb.shape)
    return True


def fuzz(count: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Damages and reads `count` files; returns how many were still readable, and all failures.

    A file that failed stays in `folder`.
    """
    rng, files = np.random.default_rng(seed), originals()
    readable, failures = 0, []
    for number in progress(range(count), desc="Reading", unit="file"):
        suffix, contents = files[rng.integers(len(files))]
        path = folder / f"{number}{suffix}"
        path.write_bytes(damage(contents, rng))
        try:
            readable += check(path, str(rng.choice(list(RESULTS))))
            path.unlink()
        except Exception as error:
            failures.append(f"{path}: {type(error).__name__}: {error}")
    return readable, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=positive_int, default=10_000, help="files to damage")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
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
