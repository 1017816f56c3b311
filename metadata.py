"""What image files hold besides pixels: EXIF, XMP, texts, resolution, and our stamp.

Pillow's parsers raise nearly anything over damaged files: `images` calls what reads, and knows.
"""

import re
from copy import deepcopy
from numbers import Real

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import ChunkStream, PngInfo

STAMP = 0x9213  # ImageHistory, an EXIF tag: every format that is written has EXIF data
ORIENTATION, X_RESOLUTION, XMP = 0x0112, 0x011A, 700
IPTC, PHOTOSHOP_IPTC = 33723, 0x0404
EXIF_IFD, GPS_IFD, INTEROPERABILITY = 0x8769, 0x8825, 0xA005
WIDTH, HEIGHT = 0xA002, 0xA003
# What tells about the image, not how its file was laid out: description, camera, software,
# date, author, host, rating, copyright, Exif, GPS, Windows' title to subject.
KEPT_TAGS = {270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, EXIF_IFD, GPS_IFD}
KEPT_TAGS |= set(range(40091, 40096))
PNG_XMP = "XML:com.adobe.xmp"
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
        if tag not in (EXIF_IFD, GPS_IFD):
            kept[tag] = _as_bytes(exif[tag])
        elif found := exif.get_ifd(tag):
            found.pop(INTEROPERABILITY, None)  # an offset
            kept.get_ifd(tag).update({key: _as_bytes(value) for key, value in found.items()})
            kept[tag] = kept.get_ifd(tag)
    kept.tobytes()  # or raise here, not when all is computed
    return kept if len(kept) else None


def _as_bytes(value: object) -> object:
    """Returns text as the bytes it was: Pillow reads Latin-1 but writes ASCII."""
    odd = isinstance(value, str) and not value.isascii()
    return value.encode("latin-1", "replace") if odd else value


def result_exif(kept: Image.Exif | None, image: np.ndarray, stamp: str) -> Image.Exif:
    """Returns the EXIF tags of a result: what is kept, its size and its stamp."""
    exif = deepcopy(kept) or Image.Exif()
    if EXIF_IFD in exif:
        exif[EXIF_IFD] |= {WIDTH: image.shape[1], HEIGHT: image.shape[0]}
    if stamp:
        exif[STAMP] = stamp
    return exif


def icc_of(image: Image.Image) -> bytes | None:
    """Returns the colour profile, which in Pillow's dictionary a PNG's text can stand for."""
    icc = image.info.get("icc_profile")
    return icc if isinstance(icc, bytes) else None


def gamma_of(image: Image.Image, notes: list[str]) -> float | None:
    """Returns the gamma of a PNG without a profile if it is not that of sRGB, such as 1.0."""
    gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity")
    if "srgb" in image.info:
        return None
    if isinstance(primaries, tuple) and not np.allclose(primaries, SRGB, atol=2e-3):
        notes.append("its primaries are left out: its colours will look different")
    if not isinstance(gamma, float) or gamma <= 0 or abs(gamma - 1 / 2.2) < 2e-3:
        return None
    notes.append(f"converted from gamma {gamma:g} to sRGB")
    return gamma


def kept_xmp(image: Image.Image) -> bytes | None:
    """Returns the XMP packet, its orientation that of the upright image."""
    xmp = image.info.get("xmp")
    if not isinstance(xmp, bytes):
        return None
    return re.sub(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]""", rb"\g<1>1", xmp)


def text_of(image: Image.Image) -> dict[str, str]:
    """Returns PNG texts by keyword; the comment of another format is "Comment"."""
    if image.format == "PNG":
        texts = {key: each for key, each in image.info.items() if isinstance(each, str)}
        texts.pop(PNG_XMP, None)
        return texts
    comment = image.info.get("comment", b"").rstrip(b"\0")
    try:
        text = comment.decode()
    except UnicodeDecodeError:
        text = comment.decode("latin-1")
    return {"Comment": text} if text else {}


def has_iptc(image: Image.Image) -> bool:
    """Returns whether there are IPTC data, the captions of the press."""
    blocks, tags = image.info.get("photoshop", {}), getattr(image, "tag_v2", {})
    return IPTC in tags or (image.format != "PNG" and PHOTOSHOP_IPTC in blocks)


def dpi_of(image: Image.Image) -> tuple[float, float] | None:
    """Returns the horizontal and the vertical resolution, if they are between 1 and 65535."""
    if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:
        return None  # Pillow says 1
    match image.info.get("dpi"):
        case (Real() as x, Real() as y) if 1 <= x <= 65535 and 1 <= y <= 65535:
            return float(x), float(y)
    return None


# PNG ------------------------------------------------------------------------------------------


def skip_checksums_of_extras() -> None:
    """Makes Pillow read PNGs whose texts or other extras have wrong checksums, as viewers do."""
    check = ChunkStream.crc

    def crc(stream: ChunkStream, kind: bytes, data: bytes) -> None:
        if kind[:1].islower():
            stream.crc_skip(kind, data)
        else:
            check(stream, kind, data)

    ChunkStream.crc = crc


def png_info(xmp: bytes | None, texts: dict[str, str]) -> PngInfo:
    """Returns the chunks of XMP and texts."""
    info = PngInfo()
    if xmp:
        info.add_itxt(PNG_XMP, xmp)
    for key, value in texts.items():
        info.add_text(key, value)
    return info
