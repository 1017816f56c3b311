"""Measures what each part of the network brings, on pictures whose truth is known.

    python ablation.py [--root DIR] [--ckpts DIR]

Takes the pictures of TestSet/600px with a partner in TestSet/2400px; slicing makes the former
where only the latter are there. Prints the mean figures of bicubic interpolation, of the SRResNet,
of the generator before and after adversarial training, the latter with the edges of the true
picture, with predicted edges and with none; then how well edges are predicted.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset import canny
from inference import for_inference, predict_edges, render
from losses import bicubic, compare, judge_edges, mean_of
from main import plain_errors
from models import load_network
from tiles import HR, LR, ROOT, SCALE, TEST, PictureError, find_pictures, read_picture
from training import runtime


def main() -> None:
    """Measures all variants and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="holds TestSet/")
    parser.add_argument("--ckpts", type=Path, default=ROOT / "ckpts", help="holds the weights")
    options = parser.parse_args()
    lr_paths, hr_paths = (find_pictures(options.root / TEST / size)[0] for size in (LR, HR))
    names = [name for name in lr_paths if name in hr_paths]
    if not names:
        raise PictureError(f"{options.root / TEST}: no picture is in both {LR}/ and {HR}/")

    pictures: dict[str, list[dict[str, float]]] = {}
    edges: dict[str, list[dict[str, float]]] = {}
    with runtime() as run:
        edge_generator, trunk, before, after = (
            for_inference(load_network(options.ckpts / f"{name}_gen.pth"), run)
            for name in ("EdgeModel", "SRResNet", "PreModel", "SRModel")
        )
        for name in tqdm(names, "Measuring", unit="picture"):
            lr, hr = read_picture(lr_paths[name]), read_picture(hr_paths[name])
            hr = hr[: SCALE * lr.shape[0], : SCALE * lr.shape[1]]
            true, predicted = canny(hr), predict_edges(lr, edge_generator, run)
            repeated = np.kron(canny(lr), np.ones((SCALE, SCALE), np.uint8))
            for title, sr in {
                "bicubic": bicubic(lr),
                "SRResNet": render(lr, trunk, None, run),
                "before the GAN stage": render(lr, before, predicted, run),
                "predicted edges": render(lr, after, predicted, run),
                "true edges": render(lr, after, true, run),
                "no edges": render(lr, after, np.zeros_like(true), run),
            }.items():
                pictures.setdefault(title, []).append(compare(sr, hr))
            for title, found in {"LR edges, repeated": repeated, "predicted": predicted}.items():
                edges.setdefault(title, []).append(judge_edges(found, true))
    for figures in (pictures, edges):
        show({title: mean_of(each) for title, each in figures.items()})


def show(table: dict[str, dict[str, float]]) -> None:
    """Prints figures by title, a row each."""
    print(f"\n{'':22}", *(f"{key:>10}" for key in next(iter(table.values()))))
    for title, figures in table.items():
        print(f"{title:22}", *(f"{value:10.4f}" for value in figures.values()))


if __name__ == "__main__":
    with plain_errors():
        main()
