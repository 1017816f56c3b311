"""Every loss term of every training, and its weight."""

from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from console import one_line
from metrics import original_ssim
from models import WeightError, load_file


def cross_entropy(probability: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns binary cross-entropy, NaN where PyTorch's own would end the process."""
    loss = F.binary_cross_entropy(probability.nan_to_num(0.5), label, weight)
    return loss + 0 * probability.mean()  # NaN again if there was one


# Edge generator: Edge-Informed SISR, section 3.1 ----------------------------------------------

EDGE_WEIGHT = 4  # of an edge pixel in the cross-entropy: edges are few
FEATURE_MATCHING_WEIGHT = 10


def edge_cross_entropy(edges: Tensor, hr_edges: Tensor) -> Tensor:
    """Returns binary cross-entropy; missing an edge weighs `EDGE_WEIGHT` times inventing one.

    Args:
        edges: predicted, (N, 1, H, W) in [0, 1].
        hr_edges: ground truth, (N, 1, H, W) in {0, 1}.
    """
    return cross_entropy(edges, hr_edges, weight=1 + (EDGE_WEIGHT - 1) * hr_edges)


def hinge_generator(score: Tensor) -> Tensor:
    """Returns the adversarial term of the edge generator, of the scores of its edges."""
    return -score.mean()


def hinge_discriminator(on_hr: Tensor, on_predicted: Tensor) -> Tensor:
    """Returns the loss of the edge discriminator, of its scores."""
    return (F.relu(1 - on_hr).mean() + F.relu(1 + on_predicted).mean()) / 2


def feature_matching(features: list[Tensor], hr_features: list[Tensor]) -> Tensor:
    """Returns L1 between the discriminator's features of predicted and Canny's edges, weighted."""
    pairs = zip(features, hr_features, strict=True)
    return FEATURE_MATCHING_WEIGHT * sum(F.l1_loss(a.float(), b.detach().float()) for a, b in pairs)


# HR generator: Edge.SRGAN ---------------------------------------------------------------------

PERCEPTUAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.006, 1e-3
RANGE = 2  # the original's losses are of images in [-1, 1]: differences are twice ours


def squared_error(sr: Tensor, hr: Tensor) -> Tensor:
    """Returns the mean squared error on the original's scale, of images in [0, 1]."""
    return RANGE**2 * F.mse_loss(sr, hr)


def generator_terms(sr: Tensor, hr: Tensor, perceptual: Tensor, on_sr: Tensor) -> dict[str, Tensor]:
    """Returns the weighted terms of the HR generator's loss in the GAN stage.

    Args:
        sr, hr: generated image and ground truth, (N, 3, H, W) in [0, 1], float32.
        perceptual: of `PerceptualLoss`.
        on_sr: (N,) the discriminator's answers to `sr`, in [0, 1].
    """
    return {
        "l1": RANGE * F.l1_loss(sr, hr),
        "perceptual": PERCEPTUAL_WEIGHT * perceptual,
        "ssim": 1 - original_ssim(sr, hr),
        "adversarial": ADVERSARIAL_WEIGHT * cross_entropy(on_sr, torch.ones_like(on_sr)),
    }


def discriminator_loss(on_hr: Tensor, on_sr: Tensor, softness: Tensor) -> Tensor:
    """Returns binary cross-entropy against soft labels: true in [0.7, 1], generated in [0, 0.3].

    Args:
        on_hr, on_sr: (N,) the discriminator's answers, in [0, 1].
        softness: (N, 2) random numbers in [0, 1), one for every label.
    """
    hr_label, sr_label = 1 - 0.3 * softness[:, 0], 0.3 * softness[:, 1]
    return cross_entropy(on_hr, hr_label) + cross_entropy(on_sr, sr_label)


class PerceptualLoss(nn.Module):
    """Mean squared difference of VGG19's features up to relu3_1 (Ledig et al., section 2.2.1).

    Args:
        state: of `vgg_state`.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.features = vgg_features()
        self.features.load_state_dict(state, assign=True)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Returns a scalar, from images (N, 3, H, W) in [0, 1]; no gradient reaches `hr`."""
        with torch.no_grad():
            target = self._features(hr)
        return F.mse_loss(self._features(sr).float(), target.float())

    def _features(self, image: Tensor) -> Tensor:
        return self.features((image - self.mean) / self.std)


def vgg_features() -> nn.Sequential:
    """Returns VGG19's layers up to relu3_1, without weights."""
    with torch.device("meta"):
        return torchvision.models.vgg19().features[:12]


def vgg_state(weights: Path | None) -> dict[str, Tensor]:
    """Returns the weights of VGG19's first five convolutions, by their names in `features`.

    Args:
        weights: a file that holds them, named as torchvision names them; None has torchvision
            download its own.

    Raises:
        WeightError: the weights cannot be had.
    """
    if weights is None:
        published = torchvision.models.VGG19_Weights.IMAGENET1K_V1
        try:
            state = published.get_state_dict(check_hash=True, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            cache = Path(torch.hub.get_dir()) / "checkpoints"
            raise WeightError(
                f"{published.url}: cannot be downloaded ({one_line(error)}); give the file with"
                f" --vgg, or remove a damaged one in {cache}"
            ) from error
    else:
        state = load_file(weights)
    wanted = vgg_features().state_dict()
    found = {key: state.get(f"features.{key}") for key in wanted}
    for key, value in found.items():
        fits = isinstance(value, Tensor) and value.shape == wanted[key].shape
        if not (fits and value.isfinite().all()):
            raise WeightError(
                f"{weights}: lacks VGG19's features.{key}; give torchvision's vgg19 file"
            )
    return found
