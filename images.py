"""Reading and writing images: any common format in, its metadata kept, files replaced whole.

An image is an `(H, W, 3)` uint8 array, RGB, upright. Slicing, training and `upscale` all see
the same pixels of a file; what these cannot carry stays in a `Photo` until the result is written.
"""

import io
import os
import secrets
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import skimage  # loads its parts when they are used
from PIL import Image, ImageCms

from console import FILE_ERRORS, StorageError, UserError, one_line

Image.MAX_IMAGE_PIXELS = None  # the images are the user's own, however large
warnings.filterwarnings("ignore", module=r"PIL\.")  # about EXIF data that is left out anyway

CANNY_SIGMA = 2
CANNY_REACH = 4 * CANNY_SIGMA  # pixels beyond which the smoothing takes nothing in

KNOWN = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif")
MAYBE = (".avif", ".heic", ".heif")  # if the installed Pillow can open them
READERS = {
    suffix: Image.registered_extensions()[suffix]
    for suffix in KNOWN + MAYBE
    if Image.registered_extensions().get(suffix) in Image.OPEN
}
SUFFIXES, FORMATS = set(READERS), list(set(READERS.values()))
FASTEST = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
FASTEST += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
PNG_HEADER = 33  # bytes of the signature and the IHDR chunk, which must come first
JPEG_SEGMENT = 65533  # bytes
JPEG = ("JPEG", 65500, {"quality": 95, "subsampling": 0})
WEBP = ("WEBP", 16383, {"lossless": True, "quality": 20, "method": 1})  # quality means effort
TIFF = ("TIFF", 2**31 - 1, {})  # compressed, Pillow cannot write EXIF data of every kind
# Format, most pixels a side, and options of the files that results can be written to.
RESULTS = {".png": ("PNG", 1_000_000, {}), ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP}
RESULTS |= {".tif": TIFF, ".tiff": TIFF}

ORIENTATION, EXIF_IFD, GPS_IFD, INTEROPERABILITY = 0x0112, 0x8769, 0x8825, 0xA005
X_RESOLUTION = 0x011A
EXIF_WIDTH, EXIF_HEIGHT = 0xA002, 0xA003
# What tells about the image, not how its file was laid out: description, camera, software,
# date, author, host, rating, copyright, Exif, GPS, Windows' title to subject.
KEPT_TAGS = {270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, EXIF_IFD, GPS_IFD}
KEPT_TAGS |= set(range(40091, 40096))
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """One file cannot be used; the message names it and the way out."""


ONE_IMAGE_ERRORS = (ImageError, OSError, MemoryError, cv2.error)  # the next one may do well


@dataclass
class Photo:
    """An image file: its pixels, and what is to come back with the result.

    Attributes:
        rgb: `(H, W, 3)` uint8, upright. Where `alpha` is 0, the nearest visible colour.
        alpha: `(H, W)` uint8; None if all is opaque.
        icc: the colour profile that `rgb` is to be seen with.
        exif: the EXIF data that tell about the image, without orientation and thumbnail.
        dpi: horizontal and vertical.
        notes: a sentence for every change that reading made.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def gray(self) -> bool:
        """Whether the three channels are equal everywhere, whatever the file's mode."""
        return bool((self.rgb[..., :1] == self.rgb[..., 1:]).all())


# Reading --------------------------------------------------------------------------------------


def read_photo(path: Path) -> Photo:
    """Reads an image of any mode, with all that is to come back with the result.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    with _open(path) as image:
        notes: list[str] = []
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("only its first frame is used")
        rgb, alpha, icc = _decode(image, notes)
        photo = Photo(rgb, alpha, icc, _kept_exif(image, notes), _dpi(image), notes)
        if icc and icc[16:20] != b"RGB " and not (icc[16:20] == b"GRAY" and photo.gray):
            notes.append("its colour profile does not fit its colours and is left out")
            photo.icc = None
        return photo


def read_image(path: Path) -> np.ndarray:
    """Returns the pixels of `read_photo`, `(H, W, 3)` uint8, RGB, upright.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    with _open(path) as image:
        return _decode(image, [])[0]


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width of `read_image`, from the file's header alone.

    Raises:
        ImageError: the file cannot be read as an image.
    """
    with _open(path) as image:
        if image.format == "PNG" and _goes_on_after_pixels(path):
            image.load()  # reads EXIF data at the end of the file
        sideways = _orientation(image) >= 5
        return (image.width, image.height) if sideways else (image.height, image.width)


def read_stamp(path: Path) -> str | None:
    """Returns the stamp `write_png` gave a file; None without one, or without a readable file."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[str | None, tuple[int, int]]:
    """Returns stamp, height and width of a file of `write_png`; None and zeros of any other."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            stamp = image.info.get("Source")
            return None if stamp is None else str(stamp), (image.height, image.width)
    except FILE_ERRORS:
        return None, (0, 0)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        # Not by its name: Pillow would map some TIFF files into memory and turn them wrongly.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{path}: not an image that can be read here; convert it to PNG"
        ) from error
    except FILE_ERRORS as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ImageError(f"{path}: not readable ({reason}); replace or remove it") from error


def _decode(
    image: Image.Image, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None, bytes | None]:
    """Returns RGB, alpha and ICC profile of an open image, and notes what it had to change."""
    layout = str(image.tile[0][3]) if image.tile else ""  # how Pillow unpacks: "RGB;16B"
    if image.format == "TIFF" and ORIENTATION not in image.tag_v2:
        image.getexif().pop(ORIENTATION, None)  # from XMP; Pillow would turn the image by it
    image.load()
    icc, turn = image.info.get("icc_profile"), TURNS.get(_orientation(image))
    if ";16" in layout or image.mode.startswith(("I", "F")):
        notes.append("reduced to 8 bits per channel")
    if image.mode.startswith(("I", "F")):
        image = _from_numbers(image, layout)
    elif image.mode in ("CMYK", "LAB"):
        notes.append(f"converted from {image.mode} to sRGB")
        image, icc = _to_srgb(image, icc), None
    elif image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        _scale_transparency(image, layout)
        image = image.convert("RGBA")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    pixels = np.array(image if turn is None else image.transpose(turn))
    if pixels.shape[2] == 3:
        return pixels, None, icc
    rgb, alpha = np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3])
    _fill_hidden(rgb, alpha)
    return rgb, alpha if alpha.min() < 255 else None, icc


def _from_numbers(image: Image.Image, layout: str) -> Image.Image:
    """Returns an image of 16 or 32 bits per pixel with 8, "L" or, with transparency, "LA".

    Floats count as 0 to 1 or 0 to 255, integers of 32 bits as 0 to 255 or 0 to 65535, whichever
    holds them all.
    """
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F":
        white = 1 if most <= 1 else 255
    elif image.mode == "I":
        white = 255 if most <= 255 else 65535
    else:
        white = 4095 if ";12" in layout else 65535
    if not (least >= 0 and most <= white):
        raise ValueError(f"values from {least:g} to {most:g} have no meaning as grey levels")
    result = Image.fromarray(np.rint(values * np.float64(255 / white)).astype(np.uint8))
    if isinstance(see_through := image.info.get("transparency"), int):
        result.putalpha(Image.fromarray((values != see_through).astype(np.uint8) * 255))
    return result


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Returns a CMYK or LAB image in sRGB, by its profile if it has one that fits."""
    try:
        lab = image.mode == "LAB"
        profile = ImageCms.createProfile("LAB") if lab else io.BytesIO(icc or b"")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")


def _scale_transparency(image: Image.Image, layout: str) -> None:
    """Brings a PNG's transparent colour, which is in the file's depth, to Pillow's 8 bits."""
    value = image.info.get("transparency")
    if image.mode == "RGB" and ";16" in layout:
        image.info["transparency"] = tuple(each >> 8 for each in value)
    elif image.mode == "L" and image.format == "PNG" and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}.get(layout, 1)


def _fill_hidden(rgb: np.ndarray, alpha: np.ndarray) -> None:
    """Gives pixels of alpha 0 the colour of the nearest visible one, so that none bleeds in."""
    hidden = alpha == 0
    if hidden.all():
        rgb[:] = 0
    elif hidden.any():
        _, nearest = cv2.distanceTransformWithLabels(
            hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        colours = np.zeros((nearest.max() + 1, 3), np.uint8)
        colours[nearest[~hidden]] = rgb[~hidden]
        rgb[hidden] = colours[nearest[hidden]]


def _exif(image: Image.Image) -> Image.Exif:
    if image.format == "TIFF":
        return image.getexif()
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    return exif


def _orientation(image: Image.Image) -> int:
    """Returns how an image is to be turned by its tag alone, 1 to 8; 1 if that is not known."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        value = _exif(image).get(ORIENTATION)
        return value if value in TURNS else 1
    except FILE_ERRORS:
        return 1


def _kept_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        exif, kept = _exif(image), Image.Exif()
        kept.endian = exif.endian
        for tag in KEPT_TAGS & set(exif):
            kept[tag] = exif[tag]
            if tag in (EXIF_IFD, GPS_IFD):
                kept[tag] = dict(exif.get_ifd(tag))
                kept[tag].pop(INTEROPERABILITY, None)
                _keep_text(kept[tag])
        _keep_text(kept)
        return kept.tobytes() if len(kept) else None
    except FILE_ERRORS:
        notes.append("its EXIF data are damaged and left out")
        return None


def _keep_text(directory: Image.Exif | dict) -> None:
    """Makes text in EXIF data the bytes it was: Pillow reads Latin-1 but writes ASCII."""
    for tag, value in list(directory.items()):
        if isinstance(value, str) and not value.isascii():
            directory[tag] = value.encode("latin-1", "replace")


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    if image.format == "TIFF" and X_RESOLUTION not in image.tag_v2:
        return None  # Pillow says 1
    try:
        x, y = map(float, image.info["dpi"])
    except FILE_ERRORS:
        return None
    return (x, y) if 1 <= x <= 65535 and 1 <= y <= 65535 else None


def _goes_on_after_pixels(path: Path) -> bool:
    """Returns whether anything but the end mark follows the pixels of a PNG file."""
    with path.open("rb") as file:
        file.seek(8)
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels_seen and kind != b"IDAT":
                return kind != b"IEND"
            pixels_seen |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


# Writing --------------------------------------------------------------------------------------


def write_png(path: Path, image: np.ndarray, stamp: str = "") -> None:
    """Writes an image as PNG, fast.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        stamp: what the image was made from, any text; kept as the PNG's `Source`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(_encode_png(image, Photo(image), stamp))


def write_image(path: Path, sr: np.ndarray, photo: Photo, stamp: str = "") -> list[str]:
    """Writes a result with what `photo` carried: alpha, grey, profile, EXIF, DPI.

    JPEG gets quality 95 and is white where the image is transparent; the others are lossless.

    Args:
        path: its suffix, one of `RESULTS`, tells the format.
        sr: `(4 * H, 4 * W, 3)` uint8, RGB, made from `photo.rgb`.
        stamp: for PNG, as in `write_png`.

    Returns:
        A sentence for all that the format cannot carry.

    Raises:
        ImageError: there is no such format, or the image is too large for it.
    """
    suffix, notes = path.suffix.lower(), []
    height, width = sr.shape[:2]
    if suffix not in RESULTS:
        raise ImageError(f"{path}: {suffix or 'no suffix'} is not one of {', '.join(RESULTS)}")
    file_format, longest, options = RESULTS[suffix]
    if max(height, width) > longest:
        other = ".tif" if file_format == "PNG" else ".png"
        raise ImageError(f"{path}: {width}x{height} pixels are too many for {suffix}; take {other}")
    exif = _resized_exif(photo.exif, width, height) if photo.exif else None
    photo = replace(photo, exif=exif and exif.tobytes())
    if file_format == "JPEG" and len(photo.exif or b"") > JPEG_SEGMENT:
        notes.append("its EXIF data are too long for JPEG and are left out")
        exif = None

    if photo.gray:
        sr = cv2.cvtColor(sr, cv2.COLOR_RGB2GRAY)[..., None]
        if photo.icc and photo.icc[16:20] == b"RGB ":
            sr = np.repeat(sr, 3, axis=2)
    if photo.alpha is not None:
        alpha = _resize(photo.alpha, height, width)[..., None]
        if file_format == "JPEG":
            notes.append("JPEG has no transparency; it is white instead")
            opacity = alpha / np.float32(255)
            sr = np.rint(sr * opacity + 255 * (1 - opacity)).astype(np.uint8)
        else:
            sr = np.concatenate([sr, alpha], axis=2)

    with replacing(path) as temporary:
        if file_format == "PNG":
            temporary.write_bytes(_encode_png(sr, photo, stamp))
        else:
            carried = {"icc_profile": photo.icc, "exif": exif, "dpi": photo.dpi}
            options = options | {key: value for key, value in carried.items() if value}
            Image.fromarray(sr[..., 0] if sr.shape[2] == 1 else sr).save(
                temporary, file_format, **options
            )
    return notes


def _resized_exif(data: bytes, width: int, height: int) -> Image.Exif:
    exif = Image.Exif()
    exif.load(data)
    if sizes := exif.get_ifd(EXIF_IFD):
        sizes |= {EXIF_WIDTH: width, EXIF_HEIGHT: height}
    for directory in (exif, exif.get_ifd(EXIF_IFD), exif.get_ifd(GPS_IFD)):
        _keep_text(directory)
    return exif


def _encode_png(image: np.ndarray, photo: Photo, stamp: str) -> bytes:
    """Returns a PNG file: OpenCV's, which is twice as fast as Pillow's, and chunks it lacks."""
    if image.ndim == 3 and image.shape[2] == 2:  # grey and alpha, which OpenCV cannot write
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        png = memoryview(file.getvalue())
    else:
        to_bgr = {(3,): cv2.COLOR_RGB2BGR, (4,): cv2.COLOR_RGBA2BGRA}.get(image.shape[2:])
        bgr = image if to_bgr is None else cv2.cvtColor(image, to_bgr)
        png = memoryview(cv2.imencode(".png", bgr, FASTEST)[1].ravel())
    chunks = b""
    if photo.icc:
        chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(photo.icc))
    if photo.dpi:
        chunks += _chunk(b"pHYs", struct.pack(">IIB", *(round(x / 0.0254) for x in photo.dpi), 1))
    if photo.exif:
        chunks += _chunk(b"eXIf", photo.exif.removeprefix(b"Exif\0\0"))
    if stamp:
        text = stamp.encode("utf-8", "backslashreplace")
        chunks += _chunk(b"iTXt", b"Source\0\0\0\0\0" + text)
    return b"".join((png[:PNG_HEADER], chunks, png[PNG_HEADER:]))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Gives a path to write to, which takes the name `path` when all went well.

    Never half a file stands under `path`, and no two processes write to the same one.

    Args:
        durable: flush the file to disk before it is renamed, so that it outlives a power cut.

    Raises:
        StorageError: the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.replace(path)
        if durable and os.name != "nt":
            _flush(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
            if stop := StorageError.of(error, path.parent):
                raise stop from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises StorageError unless files can be written to a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise StorageError.of(error, folder) or error from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Pixels ---------------------------------------------------------------------------------------


def bicubic(image: np.ndarray, scale: float) -> np.ndarray:
    """Resizes an image as Pillow does, antialiased when it shrinks.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        scale: 4, or 1/4, for which rows and columns beyond a multiple of 4 are left out.
    """
    step = max(1, round(1 / scale))
    height, width = (length // step * step for length in image.shape[:2])
    return _resize(image[:height, :width], round(height * scale), round(width * scale))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def repeat(image: np.ndarray, scale: int) -> np.ndarray:
    """Returns an image, or edges, at `scale` times the size, each pixel a block."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def canny(image: np.ndarray) -> np.ndarray:
    """Returns Canny edges of the grey image, sigma 2, as scikit-image computes them.

    Args:
        image: `(H, W, 3)` uint8, RGB.

    Returns:
        `(H, W)` uint8 in {0, 255}.
    """
    gray = skimage.color.rgb2gray(image)
    return 255 * skimage.feature.canny(gray, sigma=CANNY_SIGMA).astype(np.uint8)
