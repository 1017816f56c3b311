"""Runs the whole pipeline on scikit-image's photographs: slice, test, join, edges, evaluate.

    python demo.py

Works in the folder demo/ and ends with one image to look at: bicubic, predicted edges, generated
and ground truth, side by side.
"""

import csv
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import skimage.data

import console
import images
from sheets import Cell, draw_edges, draw_sheet
from tiles import HR, JOINED, LR, OUTPUT, SCALE, TEST

DEMO = console.ROOT / "demo"
# How to load each, and the center of its detail on the sheet, as fractions of height and width.
PHOTOGRAPHS: dict[str, tuple[Callable[[], np.ndarray], tuple[float, float]]] = {
    "astronaut": (skimage.data.astronaut, (0.25, 0.45)),
    "chelsea": (skimage.data.chelsea, (0.40, 0.50)),
    "coffee": (skimage.data.coffee, (0.45, 0.50)),
    "rocket": (skimage.data.rocket, (0.45, 0.50)),
    "motorcycle": (lambda: skimage.data.stereo_motorcycle()[0], (0.50, 0.45)),
}


def main() -> None:
    """Runs the scripts one after the other, then draws the sheet."""
    console.Parser(__doc__).parse_args()
    ground_truth = DEMO / TEST / HR
    ground_truth.mkdir(parents=True, exist_ok=True)
    for name, (load, _) in PHOTOGRAPHS.items():
        if not (ground_truth / f"{name}.png").exists():
            images.write_png(ground_truth / f"{name}.png", load())
    run_script("slice_images_w_overlapping.py")
    run_script("main.py", "test")
    run_script("join_slice_images.py")
    run_script("main.py", "edges")
    run_script("main.py", "evaluate")
    sheet = DEMO / "comparison.png"
    centers = [center for _, center in PHOTOGRAPHS.values()]
    images.write_png(sheet, draw_sheet(rows(), centers))
    console.info(f"Look at {sheet}")


def run_script(script: str, *command: str) -> None:
    """Runs one of the scripts on the demo's folder, as a user would."""
    print(f"\n$ python {' '.join([script, *command])} --root {DEMO.name}", flush=True)
    arguments = [sys.executable, console.ROOT / script, *command, "--root", DEMO]
    if status := subprocess.run(arguments, check=False).returncode:
        sys.exit(status)


def rows() -> list[list[Cell]]:
    """Returns each photograph's row of the sheet, with the metrics of the whole photograph."""
    folder = DEMO / TEST / LR
    with (folder / OUTPUT / JOINED / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = {row["image"]: row for row in csv.DictReader(file)}
    found = []
    for name in PHOTOGRAPHS:
        lr, edges, sr, hr = map(
            images.read_image,
            (
                folder / f"{name}.png",
                folder / OUTPUT / "edges" / f"{name}.png",
                folder / OUTPUT / JOINED / f"candidate_{name}.png",
                DEMO / TEST / HR / f"{name}.png",
            ),
        )
        found.append(
            [
                (caption("bicubic", table[name], " bicubic"), images.bicubic(lr, SCALE)),
                ("predicted edges", draw_edges(edges[..., 0])),
                (caption("generated", table[name]), sr),
                ("ground truth", hr),
            ]
        )
    return found


def caption(title: str, row: dict[str, str], suffix: str = "") -> str:
    """Returns a title with PSNR and SSIM, rounded."""
    psnr, ssim = (float(row[key + suffix]) for key in ("PSNR", "SSIM"))
    return f"{title}  {psnr:.2f} dB, {ssim:.3f}"


if __name__ == "__main__":
    with console.plain_errors():
        main()
