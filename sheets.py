"""Comparison sheets: crops of images at 100 %, side by side, with captions."""

import cv2
import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

import images
import tiles

DETAIL, GAP, CAPTION = 192, 8, 20  # pixels; GitHub shows such a sheet at 100 %

Cell = tuple[str, np.ndarray]  # caption and image, `(H, W, 3)` uint8


def draw_edges(edges: np.ndarray) -> np.ndarray:
    """Returns edges `(H, W)` uint8 as an image `(H, W, 3)`, dark on white."""
    return np.repeat(255 - edges[..., None], 3, axis=2)


def draw_sheet(rows: list[list[Cell]], centers: list[tuple[float, float]]) -> np.ndarray:
    """Returns a sheet with a detail of every image at 100 %, captions above.

    Args:
        rows: cells; within a row, all images have the same size.
        centers: of each row's details, as fractions of height and width.
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
            sheet.paste(Image.fromarray(crop_detail(image, center)), (x, y + CAPTION))
    return np.asarray(sheet)


def draw_preview(lr: np.ndarray, sr: np.ndarray, hr_edges: np.ndarray | None) -> np.ndarray:
    """Returns a sheet of one result: a thumbnail, and the details with the most structure.

    Each detail is shown in bicubic interpolation, as edges if there are any, and in the result.
    """
    cells = [("bicubic", images.bicubic(lr, tiles.SCALE)), ("generated", sr)]
    if hr_edges is not None:
        cells.insert(1, ("edges", draw_edges(hr_edges)))
    small = Image.fromarray(sr)
    small.thumbnail((DETAIL, DETAIL))
    centers = find_details(lr, DETAIL // tiles.SCALE)
    rows = [[("whole image", np.asarray(small))]] + [cells] * len(centers)
    return draw_sheet(rows, [(0.5, 0.5), *centers])


def find_details(image: np.ndarray, side: int, most: int = 3) -> list[tuple[float, float]]:
    """Returns the centers of the most structured squares, as fractions of height and width."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    structure = cv2.boxFilter(np.abs(cv2.Laplacian(gray, cv2.CV_32F)), -1, (side, side))
    found = skimage.feature.peak_local_max(
        structure, min_distance=side, num_peaks=most, exclude_border=False
    )
    return [(float(row / len(gray)), float(col / gray.shape[1])) for row, col in found]


def crop_detail(image: np.ndarray, center: tuple[float, float]) -> np.ndarray:
    """Returns the `DETAIL`-sized square around a center, moved inside the image if necessary."""
    starts = [
        max(0, min(round(place * length) - DETAIL // 2, length - DETAIL))
        for place, length in zip(center, image.shape[:2], strict=True)
    ]
    return image[*(slice(start, start + DETAIL) for start in starts)]
