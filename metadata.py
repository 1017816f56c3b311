"""What image files hold besides pixels: EXIF, XMP, texts, resolution, and our stamp.

Pillow's parsers raise nearly anything over damaged files: `images` calls what reads, and knows.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from numbers import Real
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from images import Photo

STAMP = 0x9213  # ImageHistory, an EXIF tag: every format that is written has EXIF data
ORIENTATION, X_RESOLUTION, XMP, IPTC = 0x0112, 0x011A, 700, 33723
EXIF_IFD, GPS_IFD, INTEROPERABILITY = 0x8769, 0x8825, 0xA005
WIDTH, HEIGHT = 0xA002, 0xA003
# What tells about the image, not how its file was laid out: description, camera, software,
# date, author, host, rating, copyright, Exif, GPS, Windows' title to subject.
KEPT_TAGS = {270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, EXIF_IFD, GPS_IFD}
KEPT_TAGS |= set(range(40091, 40096))
PNG_XMP, PNG_SIGNATURE = "XML:com.adobe.xmp", b"\x89PNG\r\n\x1a\n"
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x and y of white, red, green, blue


def exif_of(image: Image.Image) -> Image.Exif:
    """Returns EXIF tags alone: Pillow adds the orientation that XMP tells."""
    if image.format == "TIFF":
        return image.getexif()
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif


def kept_exif(image: Image.Image) -> Image.Exif | None:
    """Returns the tags that are to come back with a result; None without any."""
    exif, kept = exif_of(image), Image.Exif()
    kept.endian = exif.endian
    for tag in KEPT_TAGS & set(exif):
        value = exif[tag]
        if tag in (EXIF_IFD, GPS_IFD):
            value = _as_bytes(exif.get_ifd(tag))
            value.pop(INTEROPERABILITY, None)  # an offset
            if tag == EXIF_IFD and (within := exif.get_ifd(INTEROPERABILITY)):
                value[INTEROPERABILITY] = within
        if value != {}:
            kept[tag] = value
    kept.update(_as_bytes(kept))
    kept.tobytes()  # or raise here, not when all is computed
    return kept if len(kept) else None


def _as_bytes(tags: Image.Exif | dict) -> dict:
    """Returns tags with text as the bytes it was: Pillow reads Latin-1 but writes ASCII."""
    odd = {tag: each for tag, each in tags.items() if isinstance(each, str) and not each.isascii()}
    return dict(tags) | {tag: text.encode("latin-1", "replace") for tag, text in odd.items()}


def result_exif(kept: Image.Exif | None, image: np.ndarray, stamp: str) -> Image.Exif:
    """Returns the EXIF tags of a result: what is kept, its size and its stamp."""
    exif = Image.Exif()
    exif.endian = kept and kept.endian
    for tag, value in (kept or {}).items():
        if isinstance(value, dict):  # goes where Pillow's TIFF writer looks, too
            exif.get_ifd(tag).update(value)
            exif[tag] = exif.get_ifd(tag)
        else:
            exif[tag] = value
    if EXIF_IFD in exif:
        exif[EXIF_IFD] |= {WIDTH: image.shape[1], HEIGHT: image.shape[0]}
    if stamp:
        exif[STAMP] = stamp
    return exif


def icc_of(image: Image.Image) -> bytes | None:
    """Returns the colour profile, which in Pillow's dictionary a PNG's text can stand for."""
    icc = image.info.get("icc_profile")
    return icc if isinstance(icc, bytes) else None


def gamma_and_primaries(image: Image.Image) -> tuple[float | None, tuple[float, ...] | None]:
    """Returns what a PNG tells about its colours unless it says that they are sRGB."""
    gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity")
    if "srgb" in image.info or isinstance(gamma, str) or isinstance(primaries, str):
        return None, None
    return gamma, primaries


def kept_xmp(image: Image.Image) -> bytes | None:
    """Returns the XMP packet, its orientation that of the upright image."""
    xmp = image.info.get("xmp")
    if not isinstance(xmp, bytes):
        return None
    return re.sub(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]""", rb"\g<1>1", xmp)


def kept_text(image: Image.Image) -> tuple[dict[str, str], list[str]]:
    """Returns texts by keyword, and the names of what is not kept."""
    text, lost = {}, []
    if image.format == "PNG":
        text = {key: each for key, each in image.info.items() if isinstance(each, str)}
        text.pop(PNG_XMP, None)
        lost = [key for key in text if key.startswith("Raw profile type")]  # of ImageMagick
        text = {key: each for key, each in text.items() if key not in lost}
    elif comment := image.info.get("comment"):
        comment = comment.rstrip(b"\0")
        try:
            text["Comment"] = comment.decode()
        except UnicodeDecodeError:
            text["Comment"] = comment.decode("latin-1")
    elif image.format == "TIFF":
        lost = ["IPTC"] * (IPTC in image.tag_v2)
    if image.format in ("JPEG", "MPO") and 0x0404 in image.info.get("photoshop", {}):
        lost.append("IPTC")
    return text, lost


def dpi_of(image: Image.Image) -> tuple[float, float] | None:
    """Returns the horizontal and the vertical resolution, if they are between 1 and 65535."""
    if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:
        return None  # Pillow says 1
    match image.info.get("dpi"):
        case (Real() as x, Real() as y) if 1 <= x <= 65535 and 1 <= y <= 65535:
            return float(x), float(y)
    return None


def is_srgb(photo: "Photo") -> bool:
    """Returns whether a photo looks the same without its gamma and primaries."""
    near = np.allclose(photo.primaries or SRGB, SRGB, atol=2e-3)
    return bool(near and abs((photo.gamma or 1 / 2.2) - 1 / 2.2) < 2e-3)


# PNG ------------------------------------------------------------------------------------------


def chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yields type and length of a PNG's chunks; the file then stands where the contents begin."""
    at = len(PNG_SIGNATURE)
    while file.seek(at) and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        at += 12 + length


def without_damaged_chunks(file: BinaryIO) -> tuple[io.BytesIO, set[str]]:
    """Returns a PNG without the chunks that viewers skip for a wrong checksum, and their types."""
    sound, lost = io.BytesIO(), set()
    file.seek(0)
    sound.write(file.read(8))
    for kind, length in chunks(file) if sound.getvalue() == PNG_SIGNATURE else ():
        data, checksum = file.read(length), file.read(4)
        if kind[:1].islower() and checksum != struct.pack(">I", zlib.crc32(kind + data)):
            lost.add(kind.decode("latin-1"))
        else:
            sound.write(struct.pack(">I", length) + kind + data + checksum)
    sound.seek(0)
    return sound, lost


def png_info(photo: "Photo", exif: Image.Exif) -> PngInfo:
    """Returns the chunks of what belongs to an image."""
    info = PngInfo()
    if photo.icc:
        info.add(b"iCCP", b"ICC profile\0\0" + zlib.compress(photo.icc))
    if photo.gamma:
        info.add(b"gAMA", struct.pack(">I", round(photo.gamma * 100_000)))
    if photo.primaries:
        info.add(b"cHRM", struct.pack(">8I", *(round(each * 100_000) for each in photo.primaries)))
    if photo.dpi:
        info.add(b"pHYs", struct.pack(">IIB", *(round(each / 0.0254) for each in photo.dpi), 1))
    if photo.xmp:
        info.add_itxt(PNG_XMP, photo.xmp)
    for key, value in photo.text.items():
        info.add_text(key, value)
    if len(exif):  # last: to Pillow, a text "exif" is the same thing
        info.add(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return info
