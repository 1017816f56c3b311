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
metadata.skip_checksums_of_extras()

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
JPEG_SEGMENT = 65500  # bytes
END_OF_JPEG, MOST_MISSING = b"\xff\xd9", 0.05  # of the rows of a JPEG file that was cut off
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
        exif: the EXIF tags that tell about the image, without orientation and thumbnail.
        xmp: the XMP packet.
        text: PNG texts by keyword; the comment of a JPEG or GIF is "Comment".
        dpi: horizontal and vertical.
        notes: a sentence for every change that reading made.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
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
    with _open(path) as image:
        notes = []
        if image.format != "MPO" and getattr(image, "is_animated", False):
            notes.append("only its first frame is used")
        photo = Photo(*_decode(path, image, notes), notes=notes)
        try:
            with _pillow(path):
                photo.exif = metadata.kept_exif(image)
        except console.ImageError:
            notes.append("its EXIF data are damaged and left out")
        photo.dpi, photo.xmp = metadata.dpi_of(image), metadata.kept_xmp(image)
        photo.text = metadata.text_of(image)
        if metadata.has_iptc(image):
            notes.append("its IPTC data are left out")
        return photo


def read_image(path: Path) -> np.ndarray:
    """Returns the pixels of `read_photo`, `(H, W, 3)` uint8, RGB, upright; raises as that does."""
    with _open(path) as image:
        return _decode(path, image, [])[0]


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width of `read_image` from the header alone; raises as that does."""
    with _open(path) as image:
        sideways = _orientation(path, image) >= 5
        return (image.width, image.height) if sideways else (image.height, image.width)


def read_stamp(path: Path) -> str:
    """Returns the stamp a file was written with; "" without one, or without a readable file."""
    unreadable = suppress(console.ImageError, OSError, MemoryError)
    with unreadable, _open(path) as image, _pillow(path):
        return str(metadata.exif_of(image).get(metadata.STAMP, ""))
    return ""


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Gives the image in a file, not decoded yet."""
    formats = FORMATS | (VAGUE & {Image.EXTENSION.get(path.suffix.lower())})
    with path.open("rb") as file:  # Pillow would map some TIFF files by name, and turn them wrongly
        with _pillow(path):
            image = Image.open(file, formats=sorted(formats))
        with image:
            yield image


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
    kind, packing = image.format, image.tile[0][3] if image.tile else ""  # such as "RGB;16B"
    orientation = _orientation(path, image)
    with _pillow(path):
        image = _load(path, image, notes)
    if _orientation(path, image) != orientation:
        notes.append("its orientation stands behind its pixels and is ignored")
    turn, icc = TURNS.get(orientation), metadata.icc_of(image)
    gamma = None if icc or kind != "PNG" else metadata.gamma_of(image, notes)
    image = _to_8_bits(path, image, kind, packing, notes)
    with _pillow(path):
        image, icc = _to_rgb(image, icc, notes)
    pixels = np.array(image if turn is None else image.transpose(turn))
    rgb, alpha = np.ascontiguousarray(pixels[..., :3]), pixels[..., 3:]
    if gamma:
        rgb = np.rint(255 * (np.arange(256) / 255) ** (1 / (2.2 * gamma))).astype(np.uint8)[rgb]
    # In TGA, alpha that is 0 everywhere can mean opaque.
    if alpha.size == 0 or alpha.min() == 255 or (kind == "TGA" and not alpha.any()):
        return rgb, None, icc
    alpha = np.ascontiguousarray(alpha[..., 0])
    _fill_hidden(rgb, alpha)
    return rgb, alpha, icc


def _load(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    """Decodes an image; a JPEG file may lack its end, as for viewers."""
    if image.format == "TIFF" and metadata.ORIENTATION not in image.tag_v2:
        image.getexif().pop(metadata.ORIENTATION, None)  # of XMP; Pillow would turn by it
    try:
        image.load()
        return image
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
    image = Image.open(io.BytesIO(path.read_bytes() + END_OF_JPEG))
    gray = np.asarray(image.convert("RGB")) == 128  # libjpeg's for what is missing
    missing = gray.all(axis=(1, 2)).mean()
    if missing > MOST_MISSING:
        raise console.ImageError(f"{path}: {missing:.0%} are missing at its end; replace it")
    notes.append("its end is missing")
    return image


def _to_8_bits(
    path: Path, image: Image.Image, kind: str, packing: object, notes: list[str]
) -> Image.Image:
    """Returns an image of any depth with 8 bits per channel."""
    numbers = image.mode.startswith(("I", "F"))
    if image.mode == "F" or (image.mode == "I" and kind != "PPM"):
        raise console.ImageError(f"{path}: has 32 bits per channel; convert it to 8 or 16")
    deep = numbers or ";16" in str(packing)
    if deep or (kind == "PPM" and isinstance(packing, tuple) and packing[1] > 255):
        notes.append("reduced to 8 bits per channel")
    # A PNG's transparent colour has its depth, which Pillow ignores.
    other_depth = kind == "PNG" and (deep or str(packing).startswith("L;"))
    if other_depth and image.info.pop("transparency", None) is not None:
        notes.append("its transparent colour is left out")
    if not numbers:
        return image
    white = 4095 if ";12" in str(packing) else 65535
    levels = np.rint(np.asarray(image) * np.float64(255 / white)).astype(np.uint8)
    if kind == "TIFF" and image.tag_v2.get(WHITE_IS_ZERO) == 0:
        levels = 255 - levels  # Pillow does it only up to 8 bits
    return Image.fromarray(levels)


def _to_rgb(
    image: Image.Image, icc: bytes | None, notes: list[str]
) -> tuple[Image.Image, bytes | None]:
    """Returns an image as RGB or RGBA, and its profile unless a result could not have it."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    mode, cmyk = "RGBA" if image.has_transparency_data else "RGB", image.mode == "CMYK"
    if not cmyk:
        image = image.convert(mode)
        space = icc[16:20] if icc else b"RGB "
        fits = space == b"RGB " or (space == b"GRAY" and Photo(np.asarray(image)[..., :3]).gray)
        if not icc or (fits and len(icc) <= PROFILE_BYTES):
            return image, icc
    notes.append(f"converted from {'CMYK' if cmyk else 'its colour profile'} to sRGB")
    try:
        srgb = ImageCms.createProfile("sRGB")
        profile = io.BytesIO(icc or b"")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode), None
    except (ImageCms.PyCMSError, OSError, ValueError):  # none, or of other colours
        return image.convert(mode), None


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
    """Writes an image as PNG.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        stamp: what the image was made from, in ASCII, for `read_stamp`.
    """
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        _save_png(file, image, exif=metadata.result_exif(None, image, stamp))


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
    sr = _with_channels(sr, photo, on_white=file_format == "JPEG")
    carried, notes = _carried(file_format, sr, photo, stamp)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        if file_format == "PNG":
            _save_png(file, sr, **carried)
        else:
            Image.fromarray(sr.squeeze(2) if sr.shape[2] == 1 else sr).save(
                file, file_format, **options, **carried
            )
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
    exif = metadata.result_exif(photo.exif, sr, stamp)
    carried = {"exif": exif, "xmp": photo.xmp, "icc_profile": photo.icc, "dpi": photo.dpi}
    if file_format == "PNG":
        return carried | {"pnginfo": metadata.png_info(photo.xmp, text)}, notes
    if file_format == "TIFF" and photo.xmp:
        exif[metadata.XMP] = photo.xmp
    if file_format == "JPEG":
        if photo.alpha is not None:
            notes.append("JPEG has no transparency; it is white instead")
        carried["comment"] = text.pop("Comment", "").encode()
        sizes = {key: len(carried[key] or b"") for key in ("xmp", "comment")}
        for key, size in (sizes | {"exif": len(exif.tobytes())}).items():
            if size > JPEG_SEGMENT:
                notes.append(f"its {key.upper()} data are too long for JPEG and are left out")
                carried[key] = metadata.result_exif(None, sr, stamp) if key == "exif" else None
    if text:
        notes.append(f"only .png keeps its texts: {', '.join(text)}")
    return {key: value for key, value in carried.items() if value}, notes


def _save_png(file: BinaryIO, image: np.ndarray, **carried: object) -> None:
    """Writes a PNG: OpenCV's pixels, twice as fast as Pillow's, and Pillow's other chunks."""
    gray_alpha, extras = image.shape[2] == 2, io.BytesIO()  # the one OpenCV cannot write
    pixels = Image.fromarray(image) if gray_alpha else Image.new("L", (1, 1))
    pixels.save(extras, "PNG", compress_level=1, **carried)
    png = extras.getvalue()
    if not gray_alpha:
        to_bgr = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(image.shape[2])
        bgr = image if to_bgr is None else cv2.cvtColor(image, to_bgr)
        whole = cv2.imencode(".png", bgr, FASTEST)[1].tobytes()
        png = whole[:PNG_HEADER] + png[PNG_HEADER : png.rindex(b"IDAT") - 4] + whole[PNG_HEADER:]
    file.write(png)


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
