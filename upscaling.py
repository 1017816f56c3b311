"""Enlarges images where they lie, in memory, and draws comparison sheets."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from console import progress, warn
from images import RESULTS, SUFFIXES, ImageError, bicubic, read_image, read_photo, write_image
from inference import Enlarger
from models import Generator
from tiles import SCALE

ENDING, PREVIEW = f"_x{SCALE}", "_preview"  # of the names of results
DETAIL, GAP, CAPTION = 256, 8, 20  # pixels of a sheet
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"

Cell = tuple[str, np.ndarray]  # caption and image


def upscale_all(
    paths: list[Path], enlarger: Enlarger, options: Namespace
) -> tuple[int, int, list[str], Path, int]:
    """Enlarges images and the images of folders.

    Args:
        options: `output`, `recursive`, `overwrite`, `edges` and `preview` of the command line.

    Returns:
        How many were made, of how many, a line for each that was left out, the folder of the last
        result, and how many pixels were made.
    """
    made, pixels, problems, where = 0, 0, [], Path()
    jobs = list(find_jobs(paths, options))
    with progress(total=len(jobs), desc="Upscaling", bar_format=BAR) as bar:
        for count, (path, result) in enumerate(jobs):
            bar.update(count - bar.n)
            where = result.parent
            try:
                hr = upscale_one(path, result, enlarger, options, bar.update)
            except (ImageError, OSError, MemoryError) as error:
                problems.append(str(error))
                continue
            made += 1
            pixels += hr.shape[0] * hr.shape[1]
        bar.update(len(jobs) - bar.n)
    return made, len(jobs), problems, where, pixels


def find_jobs(paths: list[Path], options: Namespace) -> Iterator[tuple[Path, Path]]:
    """Yields each image and the path of its result; earlier results in folders are no images."""
    for given in paths:
        if not given.is_dir():
            yield given, result_path(given, given.parent, options, len(paths) == 1)
            continue
        for path in sorted(given.rglob("*") if options.recursive else given.iterdir()):
            if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != ".":
                stem = path.stem.removesuffix(PREVIEW).removesuffix(ENDING)
                if stem == path.stem or not any(path.parent.glob(f"{stem}.*")):
                    yield path, result_path(path, given, options, False)


def result_path(path: Path, base: Path, options: Namespace, alone: bool) -> Path:
    """Returns where the result of an image goes.

    Args:
        base: the folder that was given, below which results keep their places.
        alone: whether `--output` may name a file.
    """
    output = options.output
    if output and alone and output.suffix.lower() in RESULTS and not output.is_dir():
        return output
    folder = output / path.parent.relative_to(base) if output else path.parent
    return folder / f"{path.stem}{ENDING}.png"


def upscale_one(
    path: Path, result: Path, enlarger: Enlarger, options: Namespace, progress: object
) -> np.ndarray:
    """Enlarges one image; returns the result.

    Raises:
        ImageError: the image cannot be read, or the result is there already.
    """
    if result.exists() and not options.overwrite:
        raise ImageError(f"{result}: is there already; give --overwrite to replace it")
    photo = read_photo(path)
    edges = None
    if options.edges:
        edges = read_image(options.edges)[..., 0]
        if edges.shape != tuple(SCALE * side for side in photo.rgb.shape[:2]):
            raise ImageError(f"{options.edges}: is not {SCALE} times the size of {path}")
    hr = enlarger(photo.rgb, edges, progress)
    result.parent.mkdir(parents=True, exist_ok=True)
    for note in photo.notes + write_image(result, hr, photo):
        warn(f"{path}: {note}")
    if options.preview:
        cells = [("bicubic", bicubic(photo.rgb, SCALE)), ("Edge.SRGAN", hr)]
        if isinstance(enlarger.generator, Generator):
            found = enlarger.predict_edges(photo.rgb) if edges is None else edges
            cells.insert(1, ("edges", drawn(found)))
        sheet = result.with_name(f"{result.stem}{PREVIEW}.png")
        Image.fromarray(draw_sheet([cells], [(0.5, 0.5)])).save(sheet)
    return hr


def drawn(edges: np.ndarray) -> np.ndarray:
    """Returns edges `(H, W)` uint8 as an image `(H, W, 3)`, dark on white."""
    return np.repeat(255 - edges[..., None], 3, axis=2)


def draw_sheet(rows: list[list[Cell]], centers: list[tuple[float, float]]) -> np.ndarray:
    """Returns a sheet with a detail of every image at 100 %, captions above.

    Args:
        rows: of images of one size each.
        centers: of each row's details: parts of height and width.
    """
    columns = max(map(len, rows))
    width, height = columns * (DETAIL + GAP) + GAP, len(rows) * (DETAIL + CAPTION + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (cells, center) in enumerate(zip(rows, centers, strict=True)):
        y = GAP + row * (DETAIL + CAPTION + GAP)
        for column, (caption, image) in enumerate(cells):
            x = GAP + column * (DETAIL + GAP)
            draw.text((x, y), caption, "black", font)
            sheet.paste(Image.fromarray(detail(image, center)), (x, y + CAPTION))
    return np.asarray(sheet)


def detail(image: np.ndarray, center: tuple[float, float]) -> np.ndarray:
    """Returns the square of the sheet's size around a place, as far inside as need be."""
    starts = [
        max(0, min(max(round(place * length) - DETAIL // 2, 0), length - DETAIL))
        for place, length in zip(center, image.shape[:2], strict=True)
    ]
    return image[*(slice(start, start + DETAIL) for start in starts)]
