"""Metrics of images and of edges, and the table in which they are printed."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import console
import files
import images
from device import Device, to_tensor
from tiles import SCALE

STRIP = 256  # rows at a time, which bounds memory

Metrics = dict[str, float]


def ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Returns structural similarity (Wang et al., 2004), a scalar: the mean over 11 x 11 Gaussian
    windows of sigma 1.5. Only those that lie within the image count, as in scikit-image.

    Args:
        a, b: (N, C, H, W), sides of at least 11.
        data_range: largest minus smallest possible value.
    """
    channels = a.shape[1]
    line = torch.signal.windows.gaussian(11, std=1.5, dtype=a.dtype, device=a.device)
    line = (line / line.sum()).expand(channels, 1, 1, 11)

    def blur(image: Tensor) -> Tensor:
        image = F.conv2d(image, line, groups=channels)
        return F.conv2d(image, line.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean()


def original_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Returns SSIM of (N, 3, H, W) RGB in [0, 1] by Edge.SRGAN's formula: on [-1, 1], range 2."""
    return ssim(2 * a - 1, 2 * b - 1, data_range=2)


def luma(image: Tensor) -> Tensor:
    """Returns (N, 1, H, W) luma in [16, 235] of (N, 3, H, W) RGB in [0, 1], by BT.601."""
    weights = image.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return 16 + (image * weights).sum(dim=1, keepdim=True)


def precision_recall(edges: Tensor, hr_edges: Tensor, tolerance: int = 0) -> tuple[Tensor, Tensor]:
    """Returns precision and recall, scalars in [0, 1], of edges at threshold 0.5.

    Args:
        edges, hr_edges: predicted and ground truth, (N, 1, H, W) in [0, 1].
        tolerance: pixels by which an edge may be off and still count as a hit.
    """
    edges, hr_edges = (edges > 0.5).float(), (hr_edges > 0.5).float()
    near = nn.MaxPool2d(2 * tolerance + 1, stride=1, padding=tolerance)
    precision = (edges * near(hr_edges)).sum() / edges.sum().clamp(min=1)
    recall = (hr_edges * near(edges)).sum() / hr_edges.sum().clamp(min=1)
    return precision, recall


def compare(sr: np.ndarray, hr: np.ndarray, device: Device) -> Metrics:
    """Returns the papers' metrics, PSNR in dB and SSIM, both of luma without the outermost `SCALE`
    pixels; and the original's, L1 and SSIM, both of RGB in [-1, 1].

    Args:
        sr, hr: `(H, W, 3)` uint8, RGB; surplus rows and columns of `hr` are ignored.
    """
    hr = hr[: sr.shape[0], : sr.shape[1]]
    inner = [each[SCALE:-SCALE, SCALE:-SCALE] for each in (sr, hr)]
    if min(inner[0].shape[:2]) < 11:
        inner = [sr, hr]
    error = by_strips(lambda a, b: F.mse_loss(luma(a), luma(b)), *inner, device)
    return {
        "PSNR": 10 * math.log10(255**2 / error) if error else math.inf,
        "SSIM": by_strips(lambda a, b: ssim(luma(a), luma(b), 255), *inner, device, reach=10),
        "L1": 2 * by_strips(F.l1_loss, sr, hr, device),
        "SSIM original": by_strips(original_ssim, sr, hr, device, reach=10),
    }


def by_strips(
    metric: Callable[[Tensor, Tensor], Tensor],
    a: np.ndarray,
    b: np.ndarray,
    device: Device,
    reach: int = 0,
) -> float:
    """Returns a metric that is a mean over pixels, computed strip by strip.

    Args:
        metric: of two tensors in [0, 1].
        reach: rows by which the map that the metric averages is smaller than the image.
    """
    height, total = len(a) - reach, 0.0
    if height < 1 or a.shape[1] <= reach:
        return math.nan
    for top in range(0, height, STRIP):
        bottom = min(top + STRIP, height)
        strip = slice(top, bottom + reach)
        pair = (device.send(to_tensor(each[strip])) for each in (a, b))
        total += float(metric(*pair)) * (bottom - top)
    return total / height


def compare_edges(
    edges: np.ndarray, hr_edges: np.ndarray, device: Device, tolerance: int = 1
) -> Metrics:
    """Returns precision, recall and F1, their harmonic mean, at threshold 0.5.

    Args:
        edges: predicted, `(4H, 4W)` uint8.
        hr_edges: ground truth, `(4H, 4W)` uint8 in {0, 255}; surplus rows and columns are left out.
        tolerance: as in `precision_recall`.
    """
    hr_edges = hr_edges[: edges.shape[0], : edges.shape[1]]
    pair = (device.send(to_tensor(each)) for each in (edges, hr_edges))
    precision, recall = (float(each) for each in precision_recall(*pair, tolerance))
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "recall": recall, "F1": f1}


def against_bicubic(lr: np.ndarray, hr: np.ndarray, sr: np.ndarray, device: Device) -> Metrics:
    """Returns the metrics of a generated image, and those of the bicubic one.

    Args:
        lr, hr, sr: `(H, W, 3)`, `(4H, 4W, 3)`, `(4H, 4W, 3)`, uint8, RGB.
    """
    baseline = compare(images.bicubic(lr, SCALE), hr, device)
    return compare(sr, hr, device) | {f"{key} bicubic": value for key, value in baseline.items()}


def mean_of(rows: list[Metrics] | list[dict[str, Tensor]]) -> Metrics:
    """Returns each metric's mean; scalar tensors are summed on their device."""
    return {key: float(sum(row[key] for row in rows)) / len(rows) for key in rows[0]}


def write_csv(path: Path, rows: list[tuple[str, Metrics]]) -> None:
    """Writes titles and metrics as a CSV file, one row each."""
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with files.replacing(path) as temporary, temporary.open("w", **text) as file:
        writer = csv.DictWriter(file, ["image", *rows[-1][1]])
        writer.writeheader()
        writer.writerows({"image": title, **row} for title, row in rows)


def print_table(rows: list[tuple[str, Metrics]]) -> None:
    """Prints titles and metrics, one row each, above any progress bar."""
    columns = list(rows[0][1])
    width = max(len(title) for title, _ in rows)
    console.info(" ".join([" " * width, *(f"{key:>{max(9, len(key))}}" for key in columns)]))
    for title, row in rows:
        cells = (f"{row[key]:{max(9, len(key))}.4f}" for key in columns)
        console.info(" ".join([f"{title:{width}}", *cells]))
