"""Runs the whole pipeline on scikit-image's photographs: slice, test, join, edges, evaluate.

    python demo.py

Works in the folder demo/, and ends with one sheet to look at: bicubic, predicted edges, generated
image and ground truth, side by side.
"""

import csv
import subprocess
import sys

import skimage.data

import console
import images
from sheets import Cell, draw_edges, draw_sheet
from tiles import HR, JOINED, LR, OUTPUT, SCALE, TEST

DEMO = console.ROOT / "demo"
# Loader of each, and the center of its detail on the sheet, as fractions of height and width.
PHOTOGRAPHS = {
    "astronaut": (skimage.data.astronaut, (0.25, 0.45)),
    "chelsea": (skimage.data.chelsea, (0.40, 0.50)),
    "coffee": (skimage.data.coffee, (0.45, 0.50)),
    "rocket": (skimage.data.rocket, (0.45, 0.50)),
    "motorcycle": (lambda: skimage.data.stereo_motorcycle()[0], (0.50, 0.45)),
}
COMMANDS = ["slice_images_w_overlapping.py", "main.py test", "join_slice_images.py"]
COMMANDS += ["main.py edges", "main.py evaluate"]


def main() -> None:
    """Runs the scripts one after the other, then draws the sheet."""
    console.Parser(__doc__).parse_args()
    for name, (load, _) in PHOTOGRAPHS.items():
        images.write_png(DEMO / TEST / HR / f"{name}.png", load())
    for command in COMMANDS:
        print(f"\n$ python {command} --root {DEMO.name}", flush=True)
        script, *given = command.split()
        arguments = [sys.executable, console.ROOT / script, *given, "--root", DEMO]
        if status := subprocess.run(arguments, check=False).returncode:
            sys.exit(status)
    metrics = DEMO / TEST / LR / OUTPUT / JOINED / "metrics.csv"
    with metrics.open(newline="", encoding="utf-8") as file:
        table = {row["image"]: row for row in csv.DictReader(file)}
    rows = [row_of(table[name]) for name in PHOTOGRAPHS]
    sheet = DEMO / "comparison.png"
    images.write_png(sheet, draw_sheet(rows, [center for _, center in PHOTOGRAPHS.values()]))
    console.info(f"Look at {sheet}")


def row_of(metrics: dict[str, str]) -> list[Cell]:
    """Returns a photograph's row of the sheet, with the metrics of the whole photograph."""
    folder, file = DEMO / TEST / LR, f"{metrics['image']}.png"
    lr, hr = images.read_image(folder / file), images.read_image(DEMO / TEST / HR / file)
    edges = images.read_image(folder / OUTPUT / "edges" / file)[..., 0]
    sr = images.read_image(folder / OUTPUT / JOINED / f"candidate_{file}")
    return [
        (caption("bicubic", metrics, " bicubic"), images.bicubic(lr, SCALE)),
        ("predicted edges", draw_edges(edges)),
        (caption("generated", metrics), sr),
        ("ground truth", hr),
    ]


def caption(title: str, row: dict[str, str], suffix: str = "") -> str:
    """Returns a title with PSNR and SSIM, rounded."""
    psnr, ssim = (float(row[key + suffix]) for key in ("PSNR", "SSIM"))
    return f"{title}  {psnr:.2f} dB, {ssim:.3f}"


if __name__ == "__main__":
    with console.plain_errors():
        main()
