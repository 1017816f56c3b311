"""Measures what each part of the network contributes, on images with known ground truth.

    python ablation.py [--root DIR] [--ckpts DIR] [--jpeg QUALITY] [--output DIR]

Uses the images of TestSet/600px with a partner in TestSet/2400px; slicing makes the former from the
latter where they are missing. Compares bicubic interpolation, the SRResNet, the SRGAN at two
texture settings, and the generator before and after adversarial training, each with true edges,
with predicted edges and with none; then measures how well edges are predicted. Prints the means,
writes them to DIR/images.csv and DIR/edges.csv, and every image to DIR/{variant}/{id}.png.
"""

from collections import defaultdict

import numpy as np

import console
import dataset
import files
import images
import metrics
import pipeline
import tiles
from console import UserError
from device import open_device
from inference import Enlarger
from metrics import Metrics
from tiles import HR, LR, SCALE, TEST

GENERATORS = {  # by title: the stages whose weights to use, and their shares
    "SRResNet": {"SRResNet": 1},
    "SRGAN, texture 0.5": {"SRResNet": 0.5, "SRGAN": 0.5},
    "SRGAN, texture 1": {"SRGAN": 1},
    "PreModel": {"PreModel": 1},
    "SRModel": {"SRModel": 1},
}
COLORS = "red", "green", "blue"


def main(argv: list[str] | None = None) -> None:
    """Measures all variants and prints two tables."""
    parser = console.Parser(__doc__)
    add, root = parser.add_argument, console.ROOT
    quality = console.option(int, "a quality from 1 to 100", lambda n: 1 <= n <= 100)
    add("--root", type=console.existing_folder, default=root, help="folder of TestSet/")
    add("--ckpts", type=console.existing_folder, default=root / "ckpts", help="folder of weights")
    add("--jpeg", type=quality, help="JPEG quality at which to compress the LR images first")
    add("--output", type=console.path, shown="ROOT/ablation", help="folder of tables and images")
    options = parser.parse_args(argv)
    output = options.output or options.root / "ablation"
    lr_paths, hr_paths = (tiles.find_images(options.root / TEST / size)[0] for size in (LR, HR))
    pairs = {name: (lr_paths[name], hr_paths[name]) for name in lr_paths if name in hr_paths}
    if not pairs:
        raise UserError(f"{options.root / TEST}: no image is in both {LR}/ and {HR}/; slice first")
    for lr_path, hr_path in pairs.values():
        pipeline.check_hr_unchanged(lr_path, hr_path)
        pipeline.check_size(hr_path, lr_path)

    device, enlargers = open_device(), {}
    edge_generator = files.weight_path(options.ckpts, "EdgeModel")
    for title, stages in GENERATORS.items():
        shares = {files.weight_path(options.ckpts, name): part for name, part in stages.items()}
        if "SRGAN" not in stages or files.weight_path(options.ckpts, "SRGAN").exists():
            enlargers[title] = Enlarger.load(shares, edge_generator, device)
    tables: dict[str, dict[str, list[Metrics]]] = defaultdict(lambda: defaultdict(list))
    for name, paths in console.progress(pairs.items(), desc="Measuring", unit="image"):
        lr, hr = map(images.read_image, paths)
        hr = hr[: SCALE * lr.shape[0], : SCALE * lr.shape[1]]
        if options.jpeg:
            lr = dataset.through_jpeg(lr, options.jpeg)
        true = images.canny(hr)
        made, found = make_variants(lr, true, enlargers)
        for variant, sr in made.items():
            shift = (sr.mean(axis=(0, 1)) - hr.mean(axis=(0, 1))).tolist()  # in grey levels
            row = metrics.compare(sr, hr, device) | dict(zip(COLORS, shift, strict=True))
            tables["images.csv"][variant].append(row)
            images.write_png(output / variant / f"{name}.png", sr)
        for source, edges in found.items():
            for tolerance in (0, 1):
                row = metrics.compare_edges(edges, true, device, tolerance)
                tables["edges.csv"][f"{source}, within {tolerance} px"].append(row)
    for file, table in tables.items():
        rows = [(title, metrics.mean_of(each)) for title, each in table.items()]
        metrics.print_table(rows)
        metrics.write_csv(output / file, rows)
    console.info(f"Look at {output}")


def make_variants(
    lr: np.ndarray, true: np.ndarray, enlargers: dict[str, Enlarger]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the HR images by variant, and HR edges by source.

    Args:
        lr: `(H, W, 3)` uint8, RGB.
        true: `(4H, 4W)` uint8, Canny edges of the ground truth.
    """
    predicted = next(each for each in enlargers.values() if each.needs_edges).predict_edges(lr)
    given = {"true": true, "predicted": predicted, "no": np.zeros_like(true)}
    made = {"bicubic": images.bicubic(lr, SCALE)}
    for title, enlarger in enlargers.items():
        if enlarger.needs_edges:
            made |= {f"{title}, {kind} edges": enlarger(lr, e) for kind, e in given.items()}
        else:
            made[title] = enlarger(lr)
    found = {
        "edges of LR, enlarged": images.repeat(images.canny(lr), SCALE),
        "predicted edges": predicted,
        "edges of the SRResNet's image": images.canny(made["SRResNet"]),
    }
    return made, found


if __name__ == "__main__":
    with console.plain_errors():
        main()
