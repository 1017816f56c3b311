"""Image files in and out: any common format is read, and what is not pixels is carried along.

An image is an `(H, W, 3)` uint8 array, RGB, upright. Slicing, training and `upscale` all see
the same pixels of a file; what these cannot carry stays in a `Photo` until the result is written.
"""

import errno
import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import skimage  # loads its parts when they are used
from PIL import Image, ImageCms, PngImagePlugin

import console
import files
import metadata

for plugin in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Pcx", "Ppm", "Tga", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{plugin}ImagePlugin")  # Pillow would import forty
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that is left out anyway
PROFILE_BYTES = PngImagePlugin.MAX_TEXT_CHUNK  # more in a PNG is refused by other programs
# The images are the user's own, however large.
Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY

CANNY_SIGMA = 2
CANNY_REACH = 4 * CANNY_SIGMA  # pixels beyond which the smoothing takes nothing in

FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys()
VAGUE = {"DIB", "PCX", "TGA"}  # known by their suffix, for they begin like any other file
SUFFIXES = {name for name, kind in Image.EXTENSION.items() if kind in FORMATS | VAGUE | {"MPO"}}
SUFFIXES -= {".pfm"}  # floats
FOREIGN = {".cur", ".dds", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpx"}
FOREIGN |= {".avif", ".jxl", ".pfm", ".psd", ".qoi", ".svg", ".xcf"}
FOREIGN |= {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}  # raw
FOREIGN -= SUFFIXES  # AVIF is optional in Pillow

FASTEST = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
FASTEST += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
PNG_HEADER = 33  # bytes of the signature and the IHDR chunk, which must come first
JPEG_SEGMENT, JPEG_XMP = 65533, 65504  # bytes
MOST_MISSING = 0.05  # of the pixels of a JPEG file that was cut off
JPEG = ("JPEG", 65500, {"quality": 95, "subsampling": 0})
WEBP = ("WEBP", 16383, {"lossless": True, "quality": 20, "method": 1})  # quality means effort
TIFF = ("TIFF", 2**31 - 1, {})  # compressed, Pillow cannot write EXIF data of every kind
# Format, most pixels a side, and options of the files that results can be written to.
RESULTS = {".png": ("PNG", 1_000_000, {}), ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP}
RESULTS |= {".tif": TIFF, ".tiff": TIFF}

WHITE_IS_ZERO = 0x0106  # tag of TIFF
TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


@dataclass
class Photo:
    """An image file: its pixels, and what is to come back with the result.

    Attributes:
        rgb: `(H, W, 3)` uint8, upright. Where `alpha` is 0, the nearest visible colour.
        alpha: `(H, W)` uint8; None if all is opaque.
        icc: the colour profile that `rgb` is to be seen with.
        gamma: of a PNG without a profile: 0.45455 for sRGB.
        primaries: of a PNG without a profile: x and y of white, red, green, blue.
        exif: the EXIF tags that tell about the image, without orientation and thumbnail.
        xmp: the XMP packet.
        text: PNG texts by keyword; the comment of a JPEG or GIF is "Comment".
        dpi: horizontal and vertical.
        notes: a sentence for every change that reading made.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    gamma: float | None = None
    primaries: tuple[float, ...] | None = None
    exif: Image.Exif | None = None
    xmp: bytes | None = None
    text: dict[str, str] = field(default_factory=dict)
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
        ImageError: the file is not an image, or damaged.
        OSError: the file cannot be opened.
    """
    with _open(path) as (image, notes):
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("only its first frame is used")
        photo = Photo(*_decode(path, image, notes), notes=notes)
        space = photo.icc[16:20] if photo.icc else b"RGB "
        if space != b"RGB " and not (space == b"GRAY" and photo.gray):
            notes.append("its colour profile does not fit its colours and is left out")
            photo.icc = None
        if image.format == "PNG" and not photo.icc:
            photo.gamma, photo.primaries = metadata.gamma_and_primaries(image)
        try:
            with _pillow(path):
                photo.exif = metadata.kept_exif(image)
        except console.ImageError:
            notes.append("its EXIF data are damaged and left out")
        photo.dpi, photo.xmp = metadata.dpi_of(image), metadata.kept_xmp(image)
        photo.text, lost = metadata.kept_text(image)
        if lost:
            notes.append(f"these data are left out: {', '.join(lost)}")
        return photo


def read_image(path: Path) -> np.ndarray:
    """Returns the pixels of `read_photo`, `(H, W, 3)` uint8, RGB, upright; raises as that does."""
    with _open(path) as (image, notes):
        return _decode(path, image, notes)[0]


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width of `read_image` from the header alone; raises as that does."""
    with _open(path) as (image, _):
        if image.format == "PNG" and "exif" not in image.info:
            for kind, length in metadata.chunks(image.fp):
                if kind == b"eXIf":  # after the pixels
                    image.info["exif"] = image.fp.read(length)
        sideways = _orientation(path, image) >= 5
        return (image.width, image.height) if sideways else (image.height, image.width)


def read_stamp(path: Path) -> str:
    """Returns the stamp a file was written with; "" without one, or without a readable file."""
    with (
        suppress(console.ImageError, OSError, MemoryError),
        _open(path) as (image, _),
        _pillow(path),
    ):
        return str(metadata.exif_of(image).get(metadata.STAMP, ""))
    return ""


@contextmanager
def _open(path: Path) -> Iterator[tuple[Image.Image, list[str]]]:
    """Gives the image in a file, not decoded yet, and notes about what had to be mended."""
    formats = FORMATS | (VAGUE & {Image.EXTENSION.get(path.suffix.lower())})
    notes = []
    try:
        file = path.open("rb")  # Pillow would map some TIFF files by name, and turn them wrongly
    except (IsADirectoryError, PermissionError) as error:  # the latter of folders, on Windows
        reason = "is a folder, not an image" if path.is_dir() else "no permission to read it"
        raise console.ImageError(f"{path}: {reason}") from error
    with file:
        try:
            with _pillow(path):
                image = Image.open(file, formats=sorted(formats))
        except console.ImageError:
            sound, lost = metadata.without_damaged_chunks(file)
            if not lost:
                raise
            notes.append(f"its damaged parts are left out: {', '.join(sorted(lost))}")
            with _pillow(path):
                image = Image.open(sound, formats=["PNG"])
        with image:
            yield image, notes


@contextmanager
def _pillow(path: Path) -> Iterator[None]:
    """Raises ImageError for what Pillow raises over a bad file, which may be any exception.

    Full memory, and errors of the file system, stay what they are. Only for calls of Pillow.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # EINVAL and EOVERFLOW come from seeking to where a damaged file points.
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EOVERFLOW):
            error.filename = error.filename or str(path)
            raise
        if "out of memory" in str(error):  # of a decoder
            raise MemoryError(f"{path}: not enough memory") from error
        raise console.ImageError(f"{path}: {_describe(path, error)}") from error


def _describe(path: Path, error: Exception) -> str:
    if not isinstance(error, Image.UnidentifiedImageError):
        return f"damaged ({console.one_line(error)}); replace or remove it"
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        return "is empty; replace or remove it"
    if suffix in FOREIGN or head[4:] == b"ftyp":  # HEIC, often under the name .jpg
        return "of a format that cannot be read here; convert it to PNG"
    return "not an image" + " or damaged; replace or remove it" * (suffix in SUFFIXES)


def _orientation(path: Path, image: Image.Image) -> int:
    """Returns how an image is to be turned by its tag alone, 1 to 8; 1 if that is not known."""
    if image.format != "TIFF":  # which Pillow turns itself
        with suppress(console.ImageError), _pillow(path):
            value = metadata.exif_of(image).get(metadata.ORIENTATION)
            return value if value in TURNS else 1
    return 1


def _decode(
    path: Path, image: Image.Image, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None, bytes | None]:
    """Returns RGB, alpha and ICC profile of an open image, and notes what it had to change."""
    kind, unpacking = image.format, image.tile[0][3] if image.tile else ""  # such as "RGB;16B"
    image = _load(path, image, notes)
    turn, icc = TURNS.get(_orientation(path, image)), metadata.icc_of(image)
    deep = kind == "PPM" and isinstance(unpacking, tuple) and unpacking[1] > 255
    if deep or ";16" in str(unpacking) or image.mode.startswith(("I", "F")):
        notes.append("reduced to 8 bits per channel")
    if image.mode.startswith(("I", "F")):
        image = _from_numbers(path, image, 4095 if ";12" in str(unpacking) else 65535)
    elif image.mode in ("CMYK", "LAB"):
        notes.append(f"converted from {image.mode} to sRGB")
        image, icc = _to_srgb(image, icc), None
    elif image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if kind == "PNG":
        _scale_transparency(image, str(unpacking))
    with _pillow(path):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if icc and len(icc) > PROFILE_BYTES:
        notes.append("converted to sRGB from a profile too large for PNG")
        image, icc = _to_srgb(image, icc), None
    pixels = np.array(image if turn is None else image.transpose(turn))
    if pixels.shape[2] == 3:
        return pixels, None, icc
    rgb, alpha = np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3])
    if alpha.min() == 255 or (kind == "TGA" and not alpha.any()):  # there 0 can mean opaque
        return rgb, None, icc
    _fill_hidden(rgb, alpha)
    return rgb, alpha, icc


def _load(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    """Decodes an image; a JPEG file may lack its last bytes, as for other programs.

    Which pixels they were to tell is known by putting nothing, and noise, in their place.
    """
    try:
        with _pillow(path):
            if image.format == "TIFF" and metadata.ORIENTATION not in image.tag_v2:
                image.getexif().pop(metadata.ORIENTATION, None)  # of XMP; Pillow would turn by it
            image.load()
        return image
    except console.ImageError:
        if image.format not in ("JPEG", "MPO"):
            raise
        data, end = path.read_bytes(), b"\xff\xd9"
        noise = bytes(range(255)) * (len(data) // 255 + 1)
        with _pillow(path):
            seen, other = (Image.open(io.BytesIO(data + each + end)) for each in (b"", noise))
            differs = np.asarray(seen) != np.asarray(other)
        missing = differs.reshape(seen.height, seen.width, -1).any(axis=2).mean()
        if missing > MOST_MISSING:
            raise
        notes.append(f"its end is missing, and {missing:.1%} of its pixels with it")
        return seen


def _from_numbers(path: Path, image: Image.Image, white: int) -> Image.Image:
    """Returns an image of 16 bits per pixel with 8, "L" or, with transparency, "LA"."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise console.ImageError(f"{path}: has 32 bits per channel; convert it to 8 or 16")
    values = np.asarray(image)
    levels = np.rint(values * np.float64(255 / white)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(WHITE_IS_ZERO) == 0:
        levels = 255 - levels  # Pillow does it only up to 8 bits
    result = Image.fromarray(levels)
    if isinstance(see_through := image.info.get("transparency"), int):
        result.putalpha(Image.fromarray((values != see_through).astype(np.uint8) * 255))
    return result


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Returns an image in sRGB, by its profile if it has one that fits."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        lab = image.mode == "LAB"
        profile = ImageCms.createProfile("LAB") if lab else io.BytesIO(icc or b"")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert(mode)


def _scale_transparency(image: Image.Image, unpacking: str) -> None:
    """Brings a PNG's transparent colour, which is in the file's depth, to Pillow's 8 bits."""
    value = image.info.get("transparency")
    if image.mode == "RGB" and ";16" in unpacking and isinstance(value, tuple):
        image.info["transparency"] = tuple(each >> 8 for each in value)
    elif image.mode == "L" and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}.get(unpacking, 1)


def _fill_hidden(rgb: np.ndarray, alpha: np.ndarray) -> None:
    """Gives pixels of alpha 0 the colour of the nearest visible one, so that none bleeds in."""
    hidden = alpha == 0
    if hidden.any() and not hidden.all():
        _, nearest = cv2.distanceTransformWithLabels(
            hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        colours = np.zeros((nearest.max() + 1, 3), np.uint8)
        colours[nearest[~hidden]] = rgb[~hidden]
        rgb[hidden] = colours[nearest[hidden]]


# Writing --------------------------------------------------------------------------------------


def write_png(path: Path, image: np.ndarray, stamp: str = "") -> None:
    """Writes an image as PNG, fast.

    Args:
        image: `(H, W)`, or `(H, W, C)` with grey and alpha, RGB, or RGBA; uint8.
        stamp: what the image was made from, in ASCII, for `read_stamp`.
    """
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        _save_png(file, image, Photo(image), metadata.result_exif(None, image, stamp))


def write_image(path: Path, sr: np.ndarray, photo: Photo, stamp: str = "") -> list[str]:
    """Writes a result with what `photo` carries: alpha, grey, colours, metadata, DPI.

    JPEG gets quality 95 and is white where the image is transparent; the others are lossless.

    Args:
        path: its suffix, one of `RESULTS`, tells the format.
        sr: `(4 * H, 4 * W, 3)` uint8, RGB, made from `photo.rgb`.
        stamp: as in `write_png`.

    Returns:
        A sentence for all that the format cannot carry.

    Raises:
        ImageError: there is no such format, or the image is too large for it.
    """
    suffix = path.suffix.lower()
    if suffix not in RESULTS:
        known = ", ".join(RESULTS)
        raise console.ImageError(f"{path}: {suffix or 'no suffix'} is not one of {known}")
    file_format, longest, options = RESULTS[suffix]
    height, width = sr.shape[:2]
    if max(height, width) > longest:
        other = ".tif" if file_format == "PNG" else ".png"
        raise console.ImageError(f"{path}: {width}x{height} pixels are too many; take {other}")
    sr, notes = _with_channels(sr, photo, on_white=file_format == "JPEG"), []
    if file_format == "JPEG" and photo.alpha is not None:
        notes.append("JPEG has no transparency; it is white instead")
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        if file_format == "PNG":
            _save_png(file, sr, photo, metadata.result_exif(photo.exif, sr, stamp))
        else:
            carried, lost = _carried(file_format, sr, photo, stamp)
            image = Image.fromarray(sr[..., 0] if sr.shape[2] == 1 else sr)
            image.save(file, file_format, **options, **carried)
            notes += lost
    return notes


def _with_channels(sr: np.ndarray, photo: Photo, on_white: bool) -> np.ndarray:
    """Returns a result with the channels that the photo had: grey or RGB, and alpha."""
    if photo.gray:
        sr = cv2.cvtColor(sr, cv2.COLOR_RGB2GRAY)[..., None]
        if photo.icc and photo.icc[16:20] == b"RGB ":
            sr = np.repeat(sr, 3, axis=2)
    if photo.alpha is None:
        return sr
    alpha = _resize(photo.alpha, *sr.shape[:2])[..., None]
    if not on_white:
        return np.concatenate([sr, alpha], axis=2)
    opacity = alpha / np.float32(255)
    return np.rint(sr * opacity + 255 * (1 - opacity)).astype(np.uint8)


def _carried(
    file_format: str, sr: np.ndarray, photo: Photo, stamp: str
) -> tuple[dict[str, object], list[str]]:
    """Returns Pillow's options for what belongs to a result, and notes on what does not fit."""
    notes, text = [], dict(photo.text)
    exif, xmp, comment = metadata.result_exif(photo.exif, sr, stamp), photo.xmp or b"", b""
    if file_format == "TIFF" and xmp:
        exif[metadata.XMP] = xmp
    if file_format == "JPEG":
        if len(exif.tobytes()) > JPEG_SEGMENT:
            notes.append("its EXIF data are too long for JPEG and are left out")
            exif = metadata.result_exif(None, sr, stamp)
        if len(xmp) > JPEG_XMP:
            notes.append("its XMP data are too long for JPEG and are left out")
            xmp = b""
        if len(text.get("Comment", "").encode()) <= JPEG_SEGMENT:
            comment = text.pop("Comment", "").encode()
    if text:
        notes.append(f"only .png keeps its texts: {', '.join(text)}")
    if not metadata.is_srgb(photo):
        notes.append("only .png keeps its gamma and primaries: its colours will look different")
    options = {"exif": exif, "icc_profile": photo.icc, "dpi": photo.dpi, "xmp": xmp}
    options["comment"] = comment
    return {key: value for key, value in options.items() if value}, notes


def _save_png(file: BinaryIO, image: np.ndarray, photo: Photo, exif: Image.Exif) -> None:
    """Writes a PNG: OpenCV's, which is made twice as fast as Pillow's, and chunks it lacks."""
    if image.ndim == 3 and image.shape[2] == 2:  # grey and alpha, which OpenCV cannot write
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        png = buffer.getbuffer()
    else:
        to_bgr = {(3,): cv2.COLOR_RGB2BGR, (4,): cv2.COLOR_RGBA2BGRA}.get(image.shape[2:])
        bgr = image if to_bgr is None else cv2.cvtColor(image, to_bgr)
        png = memoryview(cv2.imencode(".png", bgr, FASTEST)[1].ravel())
    file.write(png[:PNG_HEADER])
    for kind, data, _ in metadata.png_info(photo, exif).chunks:
        PngImagePlugin.putchunk(file, kind, data)
    file.write(png[PNG_HEADER:])


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
