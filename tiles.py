"""Pictures and tiles on disk: names, folders, tile geometry, safe reading and writing.

Slicing, testing and joining ask this module where tile (row, col) lies. It does not need
torch. Pictures are `(H, W, 3)` uint8 arrays, RGB, in [0, 255]; LR is the picture to enlarge,
HR the one `SCALE` times its size.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # the pictures are the user's own, however large

SCALE = 4
ROOT = Path(__file__).resolve().parent
TRAINING, TEST = "TrainingSet", "TestSet"
LR, HR, TILES, OUTPUT, JOINED = "600px", "2400px", "croppedoverl", "output", "final"
SUFFIXES = {".png", ".jpg", ".jpeg"}
JPEG = {"JPEG", "MPO"}  # the latter of phones, several pictures in a file


class PictureError(Exception):
    """A picture or tile cannot be used; the message names the file and the way out."""


# Geometry -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """How a picture of `height` x `width` LR pixels is cut into `tiles` x `tiles` tiles.

    The cut lines divide the picture evenly. A tile is its cell between two cut lines and
    `pad // 2` LR pixels more on every side, so neighbours share `pad` LR pixels.
    """

    height: int
    width: int
    tiles: int = 6
    pad: int = 8

    def __post_init__(self) -> None:
        if self.tiles < 1 or self.pad < 0 or self.pad % 2:
            raise PictureError(f"--tiles {self.tiles} --pad {self.pad}: at least 1, and even")
        if min(self.height, self.width) < self.tiles:
            raise PictureError(
                f"{self.width}x{self.height} pixels are too few for {self.tiles}x{self.tiles} tiles"
            )

    @classmethod
    def of(cls, path: Path, tiles: int, pad: int) -> "Grid":
        """The grid of an LR picture; PictureError names the file that it does not suit."""
        size = picture_size(path)
        try:
            return cls(*size, tiles, pad)
        except PictureError as error:
            raise PictureError(f"{path}: {error}") from error

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields every (row, col), both counted from 1."""
        return ((r, c) for r in range(1, self.tiles + 1) for c in range(1, self.tiles + 1))

    def cell(self, row: int, col: int, scale: int = 1) -> tuple[slice, slice]:
        """The pixels between tile (row, col)'s cut lines in a picture of `scale` times LR size."""
        return self._between(self.height, row, scale), self._between(self.width, col, scale)

    def tile_shape(self, row: int, col: int, scale: int = 1) -> tuple[int, int]:
        """Height and width of tile (row, col), overlap included."""
        rows, cols = self.cell(row, col, scale)
        pad = self.pad * scale
        return rows.stop - rows.start + pad, cols.stop - cols.start + pad

    def _between(self, length: int, index: int, scale: int) -> slice:
        cuts = ((index - 1) * length // self.tiles, index * length // self.tiles)
        return slice(cuts[0] * scale, cuts[1] * scale)


def cut(picture: np.ndarray, grid: Grid, scale: int = 1) -> dict[tuple[int, int], np.ndarray]:
    """All tiles of a picture, {(row, col): tile}, as `cut_tile` makes them."""
    return {at: cut_tile(picture, grid, *at, scale) for at in grid}


def cut_tile(picture: np.ndarray, grid: Grid, row: int, col: int, scale: int = 1) -> np.ndarray:
    """One tile; what lies beyond the picture's border is reflected.

    The mirror is the border itself, not the outermost pixel: there LR and HR agree.

    Args:
        picture: `(scale * grid.height, scale * grid.width, 3)`.

    Returns:
        Of shape `grid.tile_shape(row, col, scale)`, a view if it lies within the picture.
    """
    margin = grid.pad // 2 * scale
    inside, beyond = [], []
    for cell, length in zip(grid.cell(row, col, scale), picture.shape[:2], strict=True):
        start, stop = cell.start - margin, cell.stop + margin
        inside.append(slice(max(start, 0), min(stop, length)))
        beyond += [max(-start, 0), max(stop - length, 0)]
    tile = picture[*inside]
    return cv2.copyMakeBorder(tile, *beyond, cv2.BORDER_REFLECT) if any(beyond) else tile


def join(tiles: dict[tuple[int, int], np.ndarray], grid: Grid, scale: int = 1) -> np.ndarray:
    """The picture that `tiles` cover, neighbours cross-faded over the pixels they share.

    The inverse of `cut`, to the bit.
    """
    overlap = grid.pad * scale
    numbers = range(1, grid.tiles + 1)
    strips = [_crossfade([tiles[row, col] for col in numbers], overlap, axis=1) for row in numbers]
    padded = _crossfade(strips, overlap, axis=0)
    margin = overlap // 2
    return padded[margin : padded.shape[0] - margin, margin : padded.shape[1] - margin]


def _crossfade(parts: list[np.ndarray], overlap: int, axis: int) -> np.ndarray:
    """Concatenates parts of which each shares its first `overlap` pixels with the one before."""
    if not overlap or len(parts) == 1:
        return np.concatenate(parts, axis)
    weight = ((np.arange(overlap) + 0.5) / overlap).astype(np.float32)
    weight = weight[:, None, None] if axis == 0 else weight[:, None]
    done, last = [], parts[0]
    for part in parts[1:]:
        settled, tail = np.split(last, [last.shape[axis] - overlap], axis)
        head, rest = np.split(part, [overlap], axis)
        faded = np.rint(tail + (head.astype(np.float32) - tail) * weight).astype(part.dtype)
        done.append(settled)
        last = np.concatenate([faded, rest], axis)
    return np.concatenate([*done, last], axis)


# Names and folders ----------------------------------------------------------------------------


def picture_id(path: Path) -> str:
    """`0006` for `image_600px_0006.png`; any other file's own name without its suffix."""
    match = re.fullmatch(r"image_\d+px_(.+)", path.stem)
    return match[1] if match else path.stem


def find_pictures(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The pictures of a folder by id, in the order of their ids, and complaints about twins."""
    found: dict[str, Path] = {}
    complaints = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        twin = found.setdefault(picture_id(path), path)
        if twin != path:
            complaints.append(f"{path}: has the same id as {twin.name}; rename one of them")
    return dict(sorted(found.items())), complaints


def tile_name(name: str, row: int, col: int) -> str:
    return f"{name}_{row:02d}_{col:02d}.png"


def find_tiles(folder: Path) -> dict[str, dict[tuple[int, int], Path]]:
    """{id: {(row, col): path}} of all files of a folder that are named like tiles."""
    found: dict[str, dict[tuple[int, int], Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)_(\d{2,})_(\d{2,})", path.stem)
        if match and not path.name.startswith("."):
            found.setdefault(match[1], {})[int(match[2]), int(match[3])] = path
    return found


# Files ----------------------------------------------------------------------------------------


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width as `read_picture` would give them, from the file's header.

    Raises:
        PictureError: the file cannot be read as a picture.
    """
    with _open(path) as image:
        sideways = image.format in JPEG and image.getexif().get(0x0112, 1) >= 5
        return (image.width, image.height) if sideways else (image.height, image.width)


def read_picture(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8, RGB, a JPEG turned upright as the camera's EXIF tag says.

    Raises:
        PictureError: the file cannot be read as an 8-bit picture.
    """
    with _open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise PictureError(f"{path}: more than 8 bits a channel; save it with 8 bits")
        upright = ImageOps.exif_transpose(image) if image.format in JPEG else image
        return np.array(upright.convert("RGB"))


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise PictureError(f"{path}: not readable ({error}); replace or remove it") from error


def read_stamp(path: Path) -> str | None:
    """The stamp `write_png` put into a file; None without one, or without a readable file."""
    try:
        with Image.open(path) as image:
            return image.info.get("Source")
    except (OSError, SyntaxError, ValueError):
        return None


def write_png(path: Path, picture: np.ndarray, stamp: str = "") -> None:
    """Writes a picture under a temporary name, then renames it: never half a file under `path`.

    Args:
        picture: `(H, W, 3)` uint8, RGB.
        stamp: what the picture was made from, kept as the PNG's `Source` text.
    """
    fastest = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    fastest += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), fastest)
    png = encoded.tobytes()
    text = b"tEXtSource\0" + stamp.encode("latin-1", "replace")
    text = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    header = 33  # the signature and the IHDR chunk, which must come first
    with replacing(path) as temporary:
        temporary.write_bytes(png[:header] + text + png[header:])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which takes the name `path` when all went well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Work over many pictures ----------------------------------------------------------------------


def in_parallel(
    job: Callable[..., list[str]], arguments: Iterable[tuple], workers: int, title: str
) -> list[str]:
    """Runs `job(*arguments)` for each of the arguments in several threads, with a progress bar.

    Threads are enough: the picture codecs and NumPy let each other run.

    Returns:
        The complaints of all jobs: one sentence for everything that had to be left out.
    """
    complaints = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(job, *each) for each in arguments]
        try:
            for future in tqdm(futures, title, unit="picture", disable=not futures):
                complaints += future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return complaints
