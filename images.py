"""Image files in and out: any common format is read, and metadata are kept.

An image is an `(H, W, 3)` uint8 array, RGB, upright. Slicing, training and `upscale` all see
the same pixels of a file; everything else stays in a `Photo` until the result is written.
"""

import errno
import io
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import skimage  # loads its submodules lazily
from PIL import Image, ImageCms, PngImagePlugin
from PIL.ExifTags import Base as Tag

import console
import files
import metadata

cv2.setNumThreads(1)  # each image has its thread; a forked process could not end OpenCV's
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that are left out anyway
PROFILE_BYTES = PngImagePlugin.MAX_TEXT_CHUNK  # other programs reject larger ones in a PNG
# The images are the user's own, however large.
Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY

CANNY_SIGMA = 2
CANNY_REACH = 4 * CANNY_SIGMA  # radius of the smoothing kernel in pixels

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".apng", ".avif", ".avifs", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
SUFFIXES |= {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
FOREIGN = {".cur", ".dds", ".dib", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpx"}
FOREIGN |= {".jxl", ".pcx", ".pfm", ".psd", ".qoi", ".svg", ".tga", ".xcf"}
FOREIGN |= {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}  # raw

FASTEST = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
FASTEST += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
JPEG_SEGMENT = 65500  # bytes
END_OF_JPEG, MOST_MISSING = b"\xff\xd9", 0.05  # fraction of the rows of a truncated JPEG file
PNG = ("PNG", {"compress_level": 1, "compress_type": zlib.Z_RLE})
JPEG = ("JPEG", {"quality": 95, "subsampling": 0})
WEBP = ("WEBP", {"lossless": True, "quality": 20, "method": 1})  # quality here means effort
TIFF = ("TIFF", {})  # in compressed ones Pillow cannot write every kind of EXIF data
# Format and options of the files that results can be written to, by suffix.
RESULTS = {".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP, ".tif": TIFF, ".tiff": TIFF}
LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels a side

TURN = Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE}
TURNS |= {6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


@dataclass
class Photo:
    """An image file: its pixels, and the metadata to keep in the result.

    Attributes:
        rgb: `(H, W, 3)` uint8, upright. Where `alpha` is 0, the nearest visible colour.
        alpha: `(H, W)` uint8; None if the image is opaque.
        icc: the colour profile of `rgb`.
        exif: the EXIF tags that describe the image, without orientation and thumbnail.
        xmp: the XMP packet.
        text: a PNG's text chunks by keyword.
        dpi: horizontal and vertical resolution.
        notes: a sentence on each thing that reading changed or dropped.
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
    """Reads an image of any mode, with the metadata to keep in the result.

    Raises:
        ImageError: the file is not an image, or is damaged.
        OSError: the file cannot be opened.
    """
    notes = []
    with _open(path) as file:
        if file.format != "MPO" and getattr(file, "is_animated", False):
            notes.append("only the first frame is used")
        orientation, packing = _orientation(path, file), file.tile[0][3] if file.tile else ""
        with _pillow(path):
            image = _load(path, file, notes)
        if _orientation(path, image) != orientation:
            notes.append("its orientation tag comes after its pixels and is ignored")
        text = metadata.take_texts(image)
        notes += metadata.left_out(image)

        # The pixels
        upright = _to_8_bits(path, image, packing, notes)
        with _pillow(path):
            upright, icc = _to_rgb(upright, image.info.get("icc_profile"), notes)
        if orientation in TURNS:
            upright = upright.transpose(TURNS[orientation])
        pixels = np.array(upright)  # RGB or RGBA
        photo = Photo(np.ascontiguousarray(pixels[..., :3]), icc=icc, text=text, notes=notes)
        if (pixels[..., 3:] < 255).any():
            photo.alpha = np.ascontiguousarray(pixels[..., 3])
            _fill_hidden(photo.rgb, photo.alpha)

        # The metadata
        photo.dpi, photo.xmp = metadata.dpi_of(image), metadata.kept_xmp(image)
        try:
            with _pillow(path):
                photo.exif = metadata.kept_exif(image)
        except console.ImageError:
            notes.append("its EXIF data are damaged and are left out")
        return photo


def read_image(path: Path) -> np.ndarray:
    """Returns the pixels of `read_photo`, `(H, W, 3)` uint8, RGB, upright; raises as that does."""
    return read_photo(path).rgb


def image_size(path: Path) -> tuple[int, int]:
    """Returns height and width of `read_image` from the header alone; raises as that does."""
    with _open(path) as image:
        return image.size if _orientation(path, image) >= 5 else image.size[::-1]


def read_stamp(path: Path) -> str:
    """Returns the stamp a file was written with; "" if there is none or the file is unreadable."""
    unreadable = suppress(console.ImageError, OSError, MemoryError)
    with unreadable, _open(path) as image, _pillow(path):
        return str(metadata.exif_of(image).get(metadata.STAMP, ""))
    return ""


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Yields the image in a file, not yet decoded."""
    if path.suffix.lower() in FOREIGN:
        raise console.ImageError(f"{path}: {path.suffix} is not supported; convert it to PNG")
    with path.open("rb") as file:  # given a name, Pillow maps some TIFF files and misrotates them
        with _pillow(path):
            image = Image.open(file, formats=FORMATS)
        yield image


@contextmanager
def _pillow(path: Path) -> Iterator[None]:
    """Raises ImageError for whatever Pillow raises on a bad file, which may be any exception.

    MemoryError and errors of the file system are passed on. Only for calls to Pillow.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file can make Pillow seek to impossible offsets: EINVAL, EOVERFLOW.
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        if "out of memory" in str(error):  # from a decoder
            raise MemoryError from error
        what = f"damaged ({console.one_line(error)}); replace or remove it"
        if isinstance(error, Image.UnidentifiedImageError):
            what = "not an image, damaged, or unsupported; replace it or convert it to PNG"
        raise console.ImageError(f"{path}: {what}") from error


def _orientation(path: Path, image: Image.Image) -> int:
    """Returns an image's EXIF orientation, 1 to 8; 1 if it is unknown or Pillow applies it."""
    if image.format != "TIFF":  # where Pillow applies it
        with suppress(console.ImageError), _pillow(path):
            value = metadata.exif_of(image).get(Tag.Orientation)
            return value if value in TURNS else 1
    return 1


def _load(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    """Decodes an image; a JPEG file may be truncated, as viewers allow."""
    if image.format == "TIFF" and Tag.Orientation not in image.tag_v2:
        image.getexif().pop(Tag.Orientation, None)  # from XMP; Pillow would apply it
    try:
        image.load()
        return image
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
    image = Image.open(io.BytesIO(path.read_bytes() + END_OF_JPEG))
    gray = np.asarray(image.convert("RGB")) == 128  # libjpeg fills missing parts with it
    missing = gray.all(axis=(1, 2)).mean()
    if missing > MOST_MISSING:
        raise OSError(f"{missing:.0%} of its rows are missing")
    notes.append("its end is missing")
    return image


def _to_8_bits(path: Path, image: Image.Image, packing: object, notes: list[str]) -> Image.Image:
    """Returns an image of any depth with 8 bits per channel.

    Args:
        packing: layout of the channels in the file as Pillow names it before decoding: "RGB;16B".
    """
    kind = image.format
    numbers = image.mode.startswith(("I", "F"))
    if image.mode == "F" or (image.mode == "I" and kind != "PPM"):
        raise console.ImageError(f"{path}: has 32 bits per channel; convert it to 8 or 16")
    deep = numbers or ";16" in str(packing)
    if deep or (kind == "PPM" and isinstance(packing, tuple) and packing[1] > 255):
        notes.append("reduced to 8 bits per channel")
    # A PNG's transparent colour is given at its own bit depth, which Pillow ignores.
    other_depth = kind == "PNG" and (deep or str(packing).startswith("L;"))
    if other_depth and image.info.pop("transparency", None) is not None:
        notes.append("its transparent colour is left out")
    if not numbers:
        return image
    white = 4095 if ";12" in str(packing) else 65535
    levels = np.rint(np.asarray(image) * np.float64(255 / white)).astype(np.uint8)
    if kind == "TIFF" and image.tag_v2.get(Tag.PhotometricInterpretation) == 0:
        levels = 255 - levels  # white is 0, which Pillow respects only up to 8 bits
    return Image.fromarray(levels)


def _to_rgb(
    image: Image.Image, icc: bytes | None, notes: list[str]
) -> tuple[Image.Image, bytes | None]:
    """Returns an image as RGB or RGBA, and its profile, or None if a result could not keep it."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    mode, cmyk = "RGBA" if image.has_transparency_data else "RGB", image.mode == "CMYK"
    if not cmyk:
        image = image.convert(mode) if image.mode != mode else image  # `convert` copies
        space = icc[16:20] if icc else b"RGB "
        fits = space == b"RGB " or (space == b"GRAY" and Photo(np.asarray(image)[..., :3]).gray)
        if not icc or (fits and len(icc) <= PROFILE_BYTES):
            return image, icc
    notes.append(f"converted from {'CMYK' if cmyk else 'its colour profile'} to sRGB")
    try:
        srgb = ImageCms.createProfile("sRGB")
        profile = io.BytesIO(icc or b"")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode=mode), None
    except (ImageCms.PyCMSError, OSError, ValueError):  # no profile, or for another colour space
        return image.convert(mode), None


def _fill_hidden(rgb: np.ndarray, alpha: np.ndarray) -> None:
    """Fills pixels of alpha 0 with the nearest visible colour, so that no hidden one bleeds in."""
    hidden = alpha == 0
    if hidden.any() and not hidden.all():
        _, nearest = cv2.distanceTransformWithLabels(
            hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        colours = np.zeros((nearest.max() + 1, 3), np.uint8)
        colours[nearest[~hidden]] = rgb[~hidden]
        rgb[hidden] = colours[nearest[hidden]]


# Writing --------------------------------------------------------------------------------------


def write_png(path: Path, image: np.ndarray, stamp: str = "", photo: Photo | None = None) -> None:
    """Writes an image as PNG with OpenCV, which is twice as fast as Pillow.

    Args:
        image: `(H, W, 3)` RGB or `(H, W)` grey, uint8.
        stamp: what the image was made from, in ASCII, for `read_stamp`.
        photo: source of the EXIF tags and the colour profile to include.
    """
    exif = metadata.result_exif(photo and photo.exif, image.shape[1::-1], stamp).tobytes()
    given = {cv2.IMAGE_METADATA_EXIF: exif.removeprefix(b"Exif\0\0")}
    given[cv2.IMAGE_METADATA_ICCP] = photo and photo.icc
    given = {kind: np.frombuffer(data, np.uint8) for kind, data in given.items() if data}
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, png = cv2.imencodeWithMetadata(".png", image, list(given), list(given.values()), FASTEST)
    with files.replacing(path) as temporary:
        temporary.write_bytes(png)


def write_image(path: Path, sr: np.ndarray, photo: Photo, stamp: str = "") -> list[str]:
    """Writes a result with what `photo` carries: alpha, greyness, colour profile, metadata, DPI.

    JPEG gets quality 95 and is white where the image is transparent; the others are lossless.

    Args:
        path: its suffix, one of `RESULTS`, determines the format.
        sr: `(4 * H, 4 * W, 3)` uint8, RGB, made from `photo.rgb`.
        stamp: as in `write_png`.

    Returns:
        A sentence on each thing that the format cannot store.

    Raises:
        ImageError: the image is too large for the format.
    """
    file_format, options = RESULTS[path.suffix.lower()]
    size, notes = sr.shape[1::-1], []
    if max(size) > LONGEST.get(file_format, math.inf):
        raise console.ImageError(f"{path}: {size[0]}x{size[1]} is too large; use .png")
    if photo.gray and (photo.icc or b"")[16:20] != b"RGB ":
        sr = np.ascontiguousarray(sr[..., 0])
    only_pillow = photo.alpha is not None or photo.xmp or photo.text or photo.dpi
    if file_format == "PNG" and not only_pillow:
        write_png(path, sr, stamp, photo)
        return notes

    # The pixels
    image = Image.fromarray(sr)
    if photo.alpha is not None:
        alpha = Image.fromarray(photo.alpha).resize(size, Image.Resampling.BICUBIC)
        if file_format == "JPEG":
            image = Image.composite(image, Image.new(image.mode, size, "white"), alpha)
            notes.append("JPEG has no transparency; transparent areas become white")
        else:
            image.putalpha(alpha)

    # The metadata
    exif = metadata.result_exif(photo.exif, size, stamp)
    carried = {"exif": exif, "xmp": photo.xmp, "icc_profile": photo.icc, "dpi": photo.dpi}
    if file_format == "PNG":
        carried["pnginfo"] = chunks = PngImagePlugin.PngInfo()
        if photo.xmp:
            chunks.add_itxt(metadata.PNG_XMP, photo.xmp)
        for key, value in photo.text.items():
            chunks.add_text(key, value)
    elif photo.text:
        notes.append(f"only .png can keep its text chunks: {', '.join(photo.text)}")
    if file_format == "TIFF" and photo.xmp:
        exif[Tag.XMLPacket] = photo.xmp
    if file_format == "JPEG" and max(len(exif.tobytes()), len(photo.xmp or b"")) > JPEG_SEGMENT:
        notes.append("its EXIF or XMP data are too long for JPEG; both are left out")
        carried |= {"exif": metadata.result_exif(None, size, stamp), "xmp": None}
    carried = {key: value for key, value in carried.items() if value}
    with files.replacing(path) as temporary:
        image.save(temporary, file_format, **options, **carried)
    return notes


# Pixels ---------------------------------------------------------------------------------------


def bicubic(image: np.ndarray, scale: float) -> np.ndarray:
    """Resizes an image by Pillow's bicubic interpolation, antialiased when downscaling.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        scale: 4, or 1/4, which drops rows and columns beyond a multiple of 4.
    """
    step = max(1, round(1 / scale))
    height, width = (length // step * step for length in image.shape[:2])
    size = round(width * scale), round(height * scale)
    whole = Image.fromarray(image[:height, :width])
    return np.array(whole.resize(size, Image.Resampling.BICUBIC))


def repeat(image: np.ndarray, scale: int) -> np.ndarray:
    """Returns an image, or edges, enlarged `scale` times by nearest neighbour."""
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def canny(image: np.ndarray) -> np.ndarray:
    """Returns scikit-image's Canny edges of the grey image, sigma 2.

    Args:
        image: `(H, W, 3)` uint8, RGB.

    Returns:
        `(H, W)` uint8 in {0, 255}.
    """
    gray = skimage.color.rgb2gray(image)
    return 255 * skimage.feature.canny(gray, sigma=CANNY_SIGMA).astype(np.uint8)
