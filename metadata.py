"""What image files hold besides pixels: EXIF, XMP, text chunks, resolution, and our stamp.

Pillow's parsers raise nearly any exception on damaged files; the callers in `images` handle that.
"""

import re
from copy import deepcopy
from numbers import Real

from PIL import Image
from PIL.ExifTags import IFD
from PIL.ExifTags import Base as Tag

STAMP = Tag.ImageHistory  # of EXIF, which all output formats support
PHOTOSHOP_IPTC = 0x0404
# Tags that describe the image, not the layout of its file.
KEPT_TAGS = {Tag.ImageDescription, Tag.Make, Tag.Model, Tag.Software, Tag.DateTime, Tag.Artist}
KEPT_TAGS |= {Tag.HostComputer, Tag.Rating, Tag.RatingPercent, Tag.Copyright, IFD.Exif, IFD.GPSInfo}
KEPT_TAGS |= {Tag.XPTitle, Tag.XPComment, Tag.XPAuthor, Tag.XPKeywords, Tag.XPSubject}
PNG_XMP = "XML:com.adobe.xmp"
# Approximate gamma; x and y of white, red, green and blue.
SRGB = (1 / 2.2, 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def exif_of(image: Image.Image) -> Image.Exif:
    """Returns the EXIF tags alone; Pillow's `getexif` would add the orientation given by XMP."""
    if image.format == "TIFF":
        return image.getexif()
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif


def kept_exif(image: Image.Image) -> Image.Exif | None:
    """Returns the tags to keep in a result; None if there are none."""
    exif, kept = exif_of(image), Image.Exif()
    kept.endian = exif.endian
    for tag in KEPT_TAGS & set(exif):
        if tag not in (IFD.Exif, IFD.GPSInfo):
            kept[tag] = _as_bytes(exif[tag])
        elif found := exif.get_ifd(tag):
            found.pop(IFD.Interop, None)  # an offset
            kept.get_ifd(tag).update({key: _as_bytes(value) for key, value in found.items()})
            kept[tag] = kept.get_ifd(tag)
    kept.tobytes()  # raises here rather than after the image has been upscaled
    return kept if len(kept) else None


def _as_bytes(value: object) -> object:
    """Returns text as its original bytes: Pillow reads Latin-1 but writes ASCII."""
    odd = isinstance(value, str) and not value.isascii()
    return value.encode("latin-1", "replace") if odd else value


def result_exif(kept: Image.Exif | None, size: tuple[int, int], stamp: str) -> Image.Exif:
    """Returns the EXIF tags of a result: those kept, its width and height, and its stamp."""
    exif = deepcopy(kept) or Image.Exif()
    if IFD.Exif in exif:
        exif[IFD.Exif] |= {Tag.ExifImageWidth: size[0], Tag.ExifImageHeight: size[1]}
    if stamp:
        exif[STAMP] = stamp
    return exif


def kept_xmp(image: Image.Image) -> bytes | None:
    """Returns the XMP packet, with the orientation of the upright image."""
    xmp = image.info.get("xmp")
    if not isinstance(xmp, bytes):  # none, or from a damaged TIFF
        return None
    return re.sub(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8]""", rb"\g<1>1", xmp)


def take_texts(image: Image.Image) -> dict[str, str]:
    """Returns a PNG's text chunks by keyword.

    Removes them from Pillow's dictionary, where a text "gamma" would be taken for the gamma.
    """
    keys = [key for key, value in image.info.items() if isinstance(value, str)]
    texts = {key: image.info.pop(key) for key in keys}
    texts.pop(PNG_XMP, None)
    return texts if image.format == "PNG" else {}


def left_out(image: Image.Image) -> list[str]:
    """Returns notes on what an image has but results cannot keep; call it after `take_texts`.

    Gamma and primaries count only if they differ from sRGB's and no profile overrides them.
    """
    notes, info = [], image.info
    if Tag.IPTCNAA in getattr(image, "tag_v2", {}) or PHOTOSHOP_IPTC in info.get("photoshop", {}):
        notes.append("its IPTC data are left out")
    if info.get("comment"):
        notes.append("its comment is left out")
    colours = info.get("gamma", SRGB[0]), *info.get("chromaticity", SRGB[1:])
    differ = any(abs(one - other) > 2e-3 for one, other in zip(colours, SRGB, strict=False))
    if differ and not {"srgb", "icc_profile"} & info.keys():
        notes.append("its gamma or primaries are left out; its colours will look different")
    return notes


def dpi_of(image: Image.Image) -> tuple[float, float] | None:
    """Returns horizontal and vertical resolution, up to 65535; None if missing, or 1 (unknown)."""
    match image.info.get("dpi"):
        case (Real() as x, Real() as y) if 1 < x <= 65535 and 1 < y <= 65535:
            return float(x), float(y)
    return None
