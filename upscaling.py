"""Enlarges images where they lie, in memory, and draws comparison sheets."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from console import PARTS_BAR, UserError, problem, progress, warn
from images import (
    ONE_IMAGE_ERRORS,
    RESULTS,
    SUFFIXES,
    ImageError,
    bicubic,
    check_writable,
    read_image,
    read_photo,
    read_stamp,
    write_image,
    write_png,
)
from inference import Enlarger
from models import Generator
from tiles import FOREIGN, SCALE, edges_stamp, source_stamp

ENDING, PREVIEW = f"_x{SCALE}", "_preview"  # of the names of results
DETAIL, GAP, CAPTION = 192, 8, 20  # pixels of a sheet, which GitHub shows at 100 %

Job = tuple[Path, Path]  # an image and where its result goes
Cell = tuple[str, np.ndarray]  # caption and image


def find_jobs(paths: list[Path], options: Namespace) -> tuple[list[Job], list[str]]:
    """Returns what there is to enlarge, and a line for each file that has to be left out.

    Args:
        paths: images, and folders whose images are taken except for earlier results.
        options: `output` and `recursive` of the command line.

    Raises:
        UserError: there is nothing to enlarge, or no such format to write.
    """
    output = options.output
    single = len(paths) == 1 and not paths[0].is_dir()
    suffix = output.suffix.lower() if output and not output.is_dir() else ""
    if suffix and (single or suffix in RESULTS):
        if suffix not in RESULTS:
            raise UserError(f"--output {output}: the suffix is not one of {', '.join(RESULTS)}")
        if not single:
            raise UserError(f"--output {output}: is one file; give a folder for several images")
        return [(paths[0], output)], []
    jobs: dict[Path, Path] = {}  # by result
    problems = []
    for given in paths:
        if given.is_dir():
            found, foreign = images_in(given, options)
            problems += [f"{path}: cannot be read here; convert it to PNG" for path in foreign]
        else:
            found = [given]
        for path in found:
            base = given if given.is_dir() else given.parent
            folder = output / path.parent.relative_to(base) if output else path.parent
            result = folder / f"{path.stem}{ENDING}.png"
            if jobs.setdefault(result, path) != path:
                problems.append(f"{path}: its result would replace that of {jobs[result]}; rename")
    if not jobs and not problems:
        raise UserError(
            f"{', '.join(map(str, paths))}: no images; give --recursive for sub-folders"
        )
    return [(path, result) for result, path in jobs.items()], problems


def images_in(folder: Path, options: Namespace) -> tuple[list[Path], list[Path]]:
    """Returns a folder's images, without earlier results, and its images of foreign formats."""
    files = sorted(folder.rglob("*") if options.recursive else folder.iterdir())
    files = [path for path in files if not (path.is_dir() or path.name.startswith("."))]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    stems = {path.with_suffix("") for path in images}
    output = options.output and options.output.resolve()
    found = []
    for path in images:
        plain = path.stem.removesuffix(PREVIEW).removesuffix(ENDING)
        in_output = output and path.resolve().is_relative_to(output)
        if plain in ("", path.stem) or not (path.parent / plain in stems or in_output):
            found.append(path)
    return found, [path for path in files if path.suffix.lower() in FOREIGN]


def upscale_all(
    jobs: list[Job], enlarger: Enlarger, weights: str, options: Namespace
) -> tuple[int, int, int, list[str]]:
    """Enlarges images whose results are not there already, from the same image and weights.

    Args:
        weights: the part of the results' stamps that names weights and precision.
        options: `overwrite`, `edges` and `preview` of the command line.

    Returns:
        How many were made and how many were there already, how many pixels were made, and a line
        for each image that was left out.
    """
    made, present, pixels, problems = 0, 0, 0, []
    with progress(total=len(jobs), desc="Upscaling", bar_format=PARTS_BAR) as bar:
        for count, (path, result) in enumerate(jobs):
            bar.update(count - bar.n)
            try:
                new_pixels = upscale_one(path, result, enlarger, weights, options, bar.update)
            except ONE_IMAGE_ERRORS as error:
                problems.append(problem(path, error))
                continue
            made += new_pixels > 0
            present += new_pixels == 0
            pixels += new_pixels
        bar.update(len(jobs) - bar.n)
    return made, present, pixels, problems


def upscale_one(
    path: Path,
    result: Path,
    enlarger: Enlarger,
    weights: str,
    options: Namespace,
    on_progress: Callable[[float], object],
) -> int:
    """Enlarges one image; returns how many pixels were made, 0 if the result was there already.

    Raises:
        ImageError: the image cannot be read, or something else is where the result is to go.
    """
    sheet = result.with_name(f"{result.stem}{PREVIEW}.png")
    targets = [result, sheet] if options.preview else [result]
    stamp = f"{source_stamp(path)} | {weights}{edges_stamp(options.edges)}"
    there = [target for target in targets if target.exists()]
    for target in there:
        if target.samefile(path):
            raise ImageError(f"{target}: is the image itself; give another --output")
        if not options.overwrite and read_stamp(target) != stamp:
            raise ImageError(f"{target}: is there already; give --overwrite to replace it")
    if there == targets and not options.overwrite:
        return 0
    photo = read_photo(path)
    edges = read_edges(options.edges, photo.rgb) if options.edges else None
    check_writable(result.parent)
    with_edges = isinstance(enlarger.generator, Generator)
    if options.preview and with_edges and edges is None:
        edges = enlarger.predict_edges(photo.rgb)
    hr = enlarger(photo.rgb, edges, on_progress)
    for note in photo.notes + write_image(result, hr, photo, stamp):
        warn(f"{path}: {note}")
    if options.preview:
        cells = [("bicubic", bicubic(photo.rgb, SCALE)), ("Edge.SRGAN", hr)]
        if with_edges:
            cells.insert(1, ("edges", drawn(edges)))
        write_png(sheet, draw_sheet([cells], [(0.5, 0.5)]), stamp)
    return hr.shape[0] * hr.shape[1]


def read_edges(path: Path, lr: np.ndarray) -> np.ndarray:
    """Returns the HR edges for an LR image, `(4H, 4W)` uint8, from a file.

    Raises:
        ImageError: the file cannot be read, or is not of the HR image's size.
    """
    edges, wanted = read_image(path)[..., 0], tuple(SCALE * side for side in lr.shape[:2])
    if edges.shape != wanted:
        raise ImageError(
            f"{path}: {edges.shape[1]}x{edges.shape[0]} pixels instead of"
            f" {wanted[1]}x{wanted[0]}; edges are {SCALE} times the size of the LR image"
        )
    return edges


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
        max(0, min(round(place * length) - DETAIL // 2, length - DETAIL))
        for place, length in zip(center, image.shape[:2], strict=True)
    ]
    return image[*(slice(start, start + DETAIL) for start in starts)]
