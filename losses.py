"""Losses of all trainings, and the figures pictures are judged by."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

from dataset import to_tensor
from models import WeightError, load_file
from tiles import SCALE

EDGE_WEIGHT = 4  # edges are few, and rarely certain to the pixel

# Figures --------------------------------------------------------------------------------------


def ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Structural similarity (Wang et al., 2004): 11 x 11 Gaussian window, sigma 1.5, mean.

    Only windows that lie within the picture count, as in scikit-image.

    Args:
        a, b: (N, C, H, W), sides of at least 11.
        data_range: largest minus smallest possible value.

    Returns:
        A scalar, at most 1.
    """
    channels = a.shape[1]
    x = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    line = (line / line.sum()).expand(channels, 1, 1, 11)

    def blur(picture: Tensor) -> Tensor:
        picture = F.conv2d(picture, line, groups=channels)
        return F.conv2d(picture, line.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean()


def luma(picture: Tensor) -> Tensor:
    """(N, 1, H, W) in [16, 235] of (N, 3, H, W) RGB in [0, 255]: BT.601, as the papers measure."""
    weights = picture.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1) / 255
    return 16 + (picture * weights).sum(dim=1, keepdim=True)


def precision_recall(predicted: Tensor, true: Tensor, tolerance: int = 0) -> tuple[Tensor, Tensor]:
    """Precision and recall, scalars in [0, 1], of edges at threshold 0.5.

    Args:
        predicted, true: (N, 1, H, W) in [0, 1].
        tolerance: pixels by which an edge may be missed and still count as hit.
    """
    predicted, true = (predicted > 0.5).float(), (true > 0.5).float()
    size = 2 * tolerance + 1
    near_predicted, near_true = (
        F.max_pool2d(edges, size, stride=1, padding=tolerance) for edges in (predicted, true)
    )
    precision = (predicted * near_true).sum() / predicted.sum().clamp(min=1)
    recall = (true * near_predicted).sum() / true.sum().clamp(min=1)
    return precision, recall


def mean_of(figures: list[dict[str, float]]) -> dict[str, float]:
    """Each figure's mean."""
    return {key: float(np.mean([each[key] for each in figures])) for key in figures[0]}


def judge_picture(lr: np.ndarray, hr: np.ndarray, sr: np.ndarray) -> dict[str, float]:
    """Figures of a generated picture and, beside them, of the bicubic one.

    Args:
        lr, hr, sr: `(H, W, 3)`, `(4H, 4W, 3)`, `(4H, 4W, 3)`, uint8, RGB; of `hr` rows and
            columns beyond a multiple of `SCALE` are left out.
    """
    hr = hr[: sr.shape[0], : sr.shape[1]]
    plain = compare(bicubic(lr), hr)
    return compare(sr, hr) | {f"{key} bicubic": value for key, value in plain.items()}


def bicubic(lr: np.ndarray) -> np.ndarray:
    """`(4H, 4W, 3)` uint8 of an LR picture `(H, W, 3)` uint8, by Pillow's bicubic interpolation."""
    size = SCALE * lr.shape[1], SCALE * lr.shape[0]
    return np.array(Image.fromarray(lr).resize(size, Image.Resampling.BICUBIC))


def compare(picture: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The original's figures: L1 in the tanh range and SSIM, both of RGB; the papers' figures:
    PSNR in dB and SSIM, both of luma without the outermost `SCALE` pixels.

    Args:
        picture, truth: `(H, W, 3)` uint8, RGB.
    """

    def luma_error(a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(luma(a), luma(b))

    def luma_ssim(a: Tensor, b: Tensor) -> Tensor:
        return ssim(luma(a), luma(b), data_range=255)

    inner = [each[SCALE:-SCALE, SCALE:-SCALE] for each in (picture, truth)]
    error = by_strips(luma_error, *inner)
    return {
        "L1": by_strips(F.l1_loss, picture, truth) / 127.5,
        "SSIM RGB": by_strips(partial(ssim, data_range=255), picture, truth, reach=10),
        "PSNR": 10 * math.log10(255**2 / error) if error else math.inf,
        "SSIM": by_strips(luma_ssim, *inner, reach=10),
    }


def by_strips(
    figure: Callable[[Tensor, Tensor], Tensor], a: np.ndarray, b: np.ndarray, reach: int = 0
) -> float:
    """A figure that is a mean over pixels, strip by strip: memory does not grow with the picture.

    Args:
        reach: how many rows fewer than pixel rows the figure is a mean over.
    """
    height, total = len(a) - reach, 0.0
    for top in range(0, height, 256):
        bottom = min(top + 256, height)
        strip = slice(top, bottom + reach)
        total += float(figure(to_tensor(a[strip]), to_tensor(b[strip]))) * (bottom - top)
    return total / height


def judge_edges(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Precision, recall and their harmonic mean at threshold 0.5, a miss by 1 pixel forgiven.

    Args:
        predicted: `(4H, 4W)` in [0, 1].
        true: `(4H, 4W)` in {0, 1}; rows and columns beyond a multiple of `SCALE` are left out.
    """
    true = true[: predicted.shape[0], : predicted.shape[1]]
    pair = [to_tensor(each[..., None]) for each in (predicted, true)]
    precision, recall = (float(each) for each in precision_recall(*pair, tolerance=1))
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"precision": precision, "recall": recall, "F1": f1}


# Edge-Informed SISR, section 3.1 --------------------------------------------------------------


def hinge_discriminator(on_true: Tensor, on_predicted: Tensor) -> Tensor:
    """What the edge discriminator minimises, given its scores."""
    return (F.relu(1 - on_true).mean() + F.relu(1 + on_predicted).mean()) / 2


def edge_cross_entropy(predicted: Tensor, true: Tensor) -> Tensor:
    """Binary cross-entropy, a scalar; missing an edge weighs `EDGE_WEIGHT` times inventing one.

    Args:
        predicted: (N, 1, H, W) in [0, 1].
        true: (N, 1, H, W) in {0, 1}.
    """
    return F.binary_cross_entropy(predicted, true, weight=1 + (EDGE_WEIGHT - 1) * true)


def hinge_generator(on_predicted: Tensor) -> Tensor:
    """The adversarial part of what the edge generator minimises."""
    return -on_predicted.mean()


def feature_matching(predicted: list[Tensor], true: list[Tensor]) -> Tensor:
    """L1 between the discriminator's feature maps of predicted and of true edges."""
    return sum(
        F.l1_loss(a.float(), b.detach().float()) for a, b in zip(predicted, true, strict=True)
    )


# Edge.SRGAN -----------------------------------------------------------------------------------


class PerceptualLoss(nn.Module):
    """Mean squared difference of VGG19's features up to relu3_1 (Ledig et al., section 2.2.1).

    Args:
        weights: a file with VGG19's weights, or at least those of its first five convolutions,
            named as torchvision names them; None has torchvision download its own.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        if weights is None:
            published = torchvision.models.VGG19_Weights.IMAGENET1K_V1
            try:
                state = published.get_state_dict(check_hash=True, weights_only=True)
            except OSError as error:
                raise WeightError(
                    f"{published.url}: cannot be downloaded ({error}); give the file with --vgg"
                ) from error
        else:
            state = load_file(weights)
        with torch.device("meta"):
            self.features = torchvision.models.vgg19().features[:12]
        prefix = "features."
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        wanted = self.features.state_dict().keys()
        if missing := wanted - state.keys():
            raise WeightError(f"{weights}: lacks VGG19's {prefix}{min(missing)}")
        self.features.load_state_dict({key: state[key] for key in wanted}, assign=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar, from pictures (N, 3, H, W) in [-1, 1]; no gradient reaches `hr`."""
        with torch.no_grad():
            target = self._features(hr)
        return F.mse_loss(self._features(sr).float(), target.float())

    def _features(self, picture: Tensor) -> Tensor:
        return self.features(((picture + 1) / 2 - self.mean) / self.std)


def generator_loss(
    sr: Tensor, hr: Tensor, perceptual: Tensor, on_generated: Tensor
) -> dict[str, Tensor]:
    """The terms of the HR generator's loss in the GAN stage, weighted; their sum is minimised.

    Args:
        sr, hr: generated and true picture, (N, 3, H, W) in [-1, 1], float32.
        perceptual: of `PerceptualLoss`.
        on_generated: (N,) what the discriminator says of `sr`, in [0, 1].
    """
    return {
        "l1": F.l1_loss(sr, hr),
        "perceptual": 0.006 * perceptual,
        "ssim": 1 - ssim(sr, hr, data_range=2),
        "adversarial": 1e-3 * F.binary_cross_entropy(on_generated, torch.ones_like(on_generated)),
    }


def discriminator_loss(on_true: Tensor, on_generated: Tensor, softness: Tensor) -> Tensor:
    """Binary cross-entropy against soft labels: true in [0.7, 1], generated in [0, 0.3].

    Args:
        on_true, on_generated: (N,) the discriminator's answers, in [0, 1].
        softness: (N, 2) random numbers in [0, 1), one for every label.
    """
    true, generated = 1 - 0.3 * softness[:, 0], 0.3 * softness[:, 1]
    return F.binary_cross_entropy(on_true, true) + F.binary_cross_entropy(on_generated, generated)
