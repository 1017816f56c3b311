"""Measures images against their ground truth perceptually rather than per pixel.

    python tools/perceptual.py HR_FOLDER SR_FOLDER [SR_FOLDER ...]

Prints for each folder the mean ST-LPIPS (Ghildyal and Liu, ECCV 2022), lower is better, and the
strength of the 4 x 4 pixel grid that adversarial training can leave: the rms, over blocks of
32 x 32 pixels, of the 16 phase means of the high-passed luma. Far above the ground truth's it is
visible. Files are paired by id: `image_2400px_7.png`, `candidate_7.png`, `7_HR.png`.
Needs requirements-dev.txt.
"""

import contextlib
import io
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import console
import images
import tiles

for name, function in (("IPython", "embed"), ("torchsummary", "summary")):  # imported, never used
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], function, None)
from stlpips_pytorch import stlpips  # noqa: E402


@torch.no_grad()
def main() -> None:
    """Prints a line for each folder of generated images."""
    parser = console.Parser(__doc__)
    folder = console.existing_folder
    parser.add_argument("hr", type=folder, help="folder of the ground truth")
    parser.add_argument("sr", type=folder, nargs="+", help="folders of generated images")
    options = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        distance = stlpips.LPIPS(net="alex", variant="shift_tolerant").eval()
    truth = {image_id(path): path for path in paths_in(options.hr) if not path.stem.endswith("_LR")}
    for folder in options.sr:
        rows = []
        pairs = [(path, truth.get(image_id(path))) for path in paths_in(folder)]
        for path, hr_path in console.progress(pairs, desc=folder.name, leave=False):
            if hr_path:
                sr, hr = images.read_image(path), images.read_image(hr_path)
                hr = hr[: sr.shape[0], : sr.shape[1]]
                rows.append((float(distance(to_input(sr), to_input(hr))), grid(sr), grid(hr)))
        if not rows:
            raise console.UserError(f"{folder}: no image has its ground truth in {options.hr}")
        perceptual, sr_grid, hr_grid = np.mean(rows, axis=0)
        console.info(
            f"{folder.name:32} {len(rows):4} images  ST-LPIPS {perceptual:.4f}"
            f"  grid {sr_grid:.2f} (ground truth {hr_grid:.2f})"
        )


def paths_in(folder: Path) -> list[Path]:
    """Returns the images of a folder."""
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in images.SUFFIXES]


def image_id(path: Path) -> str:
    """Returns the id shared by the names of all files of one image."""
    return tiles.image_id(path).removeprefix("candidate_").removesuffix("_HR").removesuffix("_LR")


def to_input(image: np.ndarray) -> torch.Tensor:
    """Returns an `(H, W, 3)` uint8 image as a (1, 3, H, W) tensor in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1


def grid(image: np.ndarray) -> float:
    """Returns the strength of the 4 x 4 pixel grid, in grey levels."""
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    high = luma - cv2.GaussianBlur(luma, (0, 0), 2)
    rows, columns = (side // 32 for side in high.shape)
    blocks = high[: 32 * rows, : 32 * columns].reshape(rows, 8, 4, columns, 8, 4)
    return float(np.sqrt((blocks.mean(axis=(1, 4)) ** 2).mean()))


if __name__ == "__main__":
    with console.plain_errors():
        main()
