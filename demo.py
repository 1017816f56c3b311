"""Shows the whole way on photographs that scikit-image carries: slice, test, join, evaluate.

    python demo.py

Works in the folder demo/ and ends with one picture to look at: bicubic, predicted edges,
generated and true, side by side.
"""

import csv
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from inference import for_inference, predict_edges
from losses import bicubic
from models import load_network
from tiles import HR, JOINED, LR, OUTPUT, ROOT, TEST, read_picture, write_png
from training import runtime

DEMO = ROOT / "demo"
PHOTOGRAPHS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "chelsea": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
}
CENTRES = {  # of the details on the sheet: row and column as parts of height and width
    "astronaut": (0.25, 0.45),
    "chelsea": (0.40, 0.50),
    "coffee": (0.45, 0.50),
    "rocket": (0.45, 0.50),
    "motorcycle": (0.50, 0.45),
}
SIDE, GAP, CAPTION = 256, 8, 20  # pixels of the sheet


def main() -> None:
    """Runs the scripts one after the other, then draws the sheet."""
    truth = DEMO / TEST / HR
    truth.mkdir(parents=True, exist_ok=True)
    for name, load in PHOTOGRAPHS.items():
        if not (truth / f"{name}.png").exists():
            write_png(truth / f"{name}.png", load())
    run_script("slice_images_w_overlapping.py")
    run_script("main.py", "test")
    run_script("join_slice_images.py")
    run_script("main.py", "evaluate")
    sheet = DEMO / "comparison.png"
    write_png(sheet, draw_sheet())
    print(f"Look at {sheet}")


def run_script(script: str, *command: str) -> None:
    """Runs one of the scripts on the demo's folder, as a user would."""
    print(f"\n$ python {' '.join([script, *command])} --root {DEMO.name}", flush=True)
    subprocess.run([sys.executable, ROOT / script, *command, "--root", DEMO], check=True)


def draw_sheet() -> np.ndarray:
    """A detail of every photograph, a row each, with the figures of the whole photograph."""
    folder = DEMO / TEST / LR
    with (folder / OUTPUT / JOINED / "figures.csv").open(newline="") as file:
        figures = {row["picture"]: row for row in csv.DictReader(file)}
    width, height = 4 * (SIDE + GAP) + GAP, len(PHOTOGRAPHS) * (SIDE + CAPTION + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    with runtime() as run:
        edge_generator = for_inference(load_network(ROOT / "ckpts" / "EdgeModel_gen.pth"), run)
        for row, name in enumerate(PHOTOGRAPHS):
            lr = read_picture(folder / f"{name}.png")
            edges = 255 * (1 - predict_edges(lr, edge_generator, run))
            pictures = {
                "bicubic  {PSNR bicubic:.5} dB  SSIM {SSIM bicubic:.5}": bicubic(lr),
                "predicted edges": np.repeat(edges[..., None], 3, axis=2).astype(np.uint8),
                "generated  {PSNR:.5} dB  SSIM {SSIM:.5}": read_picture(
                    folder / OUTPUT / JOINED / f"candidate_{name}.png"
                ),
                "truth": read_picture(DEMO / TEST / HR / f"{name}.png"),
            }
            y = GAP + row * (SIDE + CAPTION + GAP)
            for column, (caption, picture) in enumerate(pictures.items()):
                x = GAP + column * (SIDE + GAP)
                draw.text((x, y), caption.format_map(figures[name]), "black", font)
                sheet.paste(Image.fromarray(detail(picture, *CENTRES[name])), (x, y + CAPTION))
    return np.asarray(sheet)


def detail(picture: np.ndarray, row: float, column: float) -> np.ndarray:
    """The square of the sheet's size around a place, as far inside as need be."""
    top, left = (
        min(max(round(place * length) - SIDE // 2, 0), length - SIDE)
        for place, length in zip((row, column), picture.shape[:2], strict=True)
    )
    return picture[top : top + SIDE, left : left + SIDE]


if __name__ == "__main__":
    main()
