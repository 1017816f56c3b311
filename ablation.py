"""Measures what each part of the network brings, on images whose ground truth is known.

    python ablation.py [--root DIR] [--ckpts DIR] [--jpeg QUALITY]

Takes the images of TestSet/600px with a partner in TestSet/2400px; slicing makes the former where
only the latter are there. Prints the mean metrics of bicubic interpolation, of the SRResNet, and
of the generator before and after adversarial training, each with the edges of the ground truth,
with predicted edges and with none, and by how many grey levels they shift each colour; then how
well edges are predicted.
"""

import argparse
from pathlib import Path

import numpy as np

from console import UserError, existing_folder, plain_errors, progress
from dataset import through_jpeg
from device import open_device, to_tensor
from images import bicubic, canny, read_image, repeat
from inference import Enlarger
from metrics import Metrics, color_shift, compare, compare_edges, mean_of, print_table
from tiles import HR, LR, ROOT, SCALE, TEST, check_made_lr, check_size, find_images


def main() -> None:
    """Measures all variants and prints two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=existing_folder, default=ROOT, help="folder of TestSet/")
    add("--ckpts", type=Path, default=ROOT / "ckpts", help="folder of the weights")
    add(
        "--jpeg",
        type=int,
        choices=range(1, 101),
        metavar="1..100",
        help="quality of the JPEG that LR is saved as first",
    )
    options = parser.parse_args()
    lr_paths, hr_paths = (find_images(options.root / TEST / size)[0] for size in (LR, HR))
    names = [name for name in lr_paths if name in hr_paths]
    if not names:
        raise UserError(f"{options.root / TEST}: no image is in both {LR}/ and {HR}/")
    for name in names:
        check_made_lr(lr_paths[name], hr_paths[name])
        check_size(hr_paths[name], lr_paths[name])

    images: dict[str, list[Metrics]] = {}
    edges: dict[str, list[Metrics]] = {}
    with open_device() as device:
        edge_path = options.ckpts / "EdgeModel_gen.pth"
        srresnet, premodel, srmodel = (
            Enlarger.load(options.ckpts / f"{name}_gen.pth", edge_path, device)
            for name in ("SRResNet", "PreModel", "SRModel")
        )
        for name in progress(names, "Measuring", unit="image"):
            lr, hr = read_image(lr_paths[name]), read_image(hr_paths[name])
            hr = hr[: SCALE * lr.shape[0], : SCALE * lr.shape[1]]
            if options.jpeg:
                lr = through_jpeg(to_tensor(lr)[0], options.jpeg).permute(1, 2, 0).numpy()
            true, predicted = canny(hr), srmodel.predict_edges(lr)
            given = {"true": true, "predicted": predicted, "no": np.zeros_like(true)}
            made = {"bicubic": bicubic(lr, SCALE), "SRResNet": srresnet(lr)}
            for title, enlarger in {"PreModel": premodel, "SRModel": srmodel}.items():
                made |= {f"{title}, {kind} edges": enlarger(lr, e) for kind, e in given.items()}
            for title, sr in made.items():
                metrics = compare(sr, hr, device) | color_shift(sr, hr)
                images.setdefault(title, []).append(metrics)
            enlarged = repeat(canny(lr), SCALE)
            for title, found in {"edges of LR, enlarged": enlarged, "predicted": predicted}.items():
                for tolerance in (0, 1):
                    row = edges.setdefault(f"{title}, within {tolerance} px", [])
                    row.append(compare_edges(found, true, device, tolerance))
    for table in (images, edges):
        print_table([(title, mean_of(rows)) for title, rows in table.items()])


if __name__ == "__main__":
    with plain_errors():
        main()
