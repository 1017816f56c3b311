"""Shows the whole way on photographs that scikit-image carries: slice, test, join, evaluate.

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

from console import plain_errors, say
from device import open_device
from images import bicubic, read_image, write_png
from inference import Enlarger
from tiles import HR, JOINED, LR, OUTPUT, ROOT, SCALE, TEST
from upscaling import Cell, draw_sheet, drawn

DEMO = ROOT / "demo"
# How to load each, and the center of its detail on the sheet, as parts of height and width.
PHOTOGRAPHS: dict[str, tuple[Callable[[], np.ndarray], tuple[float, float]]] = {
    "astronaut": (skimage.data.astronaut, (0.25, 0.45)),
    "chelsea": (skimage.data.chelsea, (0.40, 0.50)),
    "coffee": (skimage.data.coffee, (0.45, 0.50)),
    "rocket": (skimage.data.rocket, (0.45, 0.50)),
    "motorcycle": (lambda: skimage.data.stereo_motorcycle()[0], (0.50, 0.45)),
}


def main() -> None:
    """Runs the scripts one after the other, then draws the sheet."""
    ground_truth = DEMO / TEST / HR
    ground_truth.mkdir(parents=True, exist_ok=True)
    for name, (load, _) in PHOTOGRAPHS.items():
        if not (ground_truth / f"{name}.png").exists():
            write_png(ground_truth / f"{name}.png", load())
    run_script("slice_images_w_overlapping.py")
    run_script("main.py", "test")
    run_script("join_slice_images.py")
    run_script("main.py", "evaluate")
    sheet = DEMO / "comparison.png"
    write_png(sheet, draw_sheet(list(rows()), [center for _, center in PHOTOGRAPHS.values()]))
    say(f"Look at {sheet}")


def run_script(script: str, *command: str) -> None:
    """Runs one of the scripts on the demo's folder, as a user would."""
    print(f"\n$ python {' '.join([script, *command])} --root {DEMO.name}", flush=True)
    done = subprocess.run([sys.executable, ROOT / script, *command, "--root", DEMO], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def rows() -> list[list[Cell]]:
    """Returns each photograph's row of the sheet, with the metrics of the whole photograph."""
    folder = DEMO / TEST / LR
    with (folder / OUTPUT / JOINED / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = {row["image"]: row for row in csv.DictReader(file)}
    found = []
    with open_device() as device:
        ckpts = ROOT / "ckpts"
        enlarger = Enlarger.load(ckpts / "SRModel_gen.pth", ckpts / "EdgeModel_gen.pth", device)
        for name in PHOTOGRAPHS:
            lr = read_image(folder / f"{name}.png")
            sr = read_image(folder / OUTPUT / JOINED / f"candidate_{name}.png")
            found.append(
                [
                    (caption("bicubic", table[name], " bicubic"), bicubic(lr, SCALE)),
                    ("predicted edges", drawn(enlarger.predict_edges(lr))),
                    (caption("generated", table[name]), sr),
                    ("ground truth", read_image(DEMO / TEST / HR / f"{name}.png")),
                ]
            )
    return found


def caption(title: str, row: dict[str, str], suffix: str = "") -> str:
    """Returns a title with PSNR and SSIM, rounded."""
    psnr, ssim = (float(row[key + suffix]) for key in ("PSNR", "SSIM"))
    return f"{title}  {psnr:.2f} dB, {ssim:.3f}"


if __name__ == "__main__":
    with plain_errors():
        main()
