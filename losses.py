"""Every loss term of every stage, and its weight.

Images `sr` and `hr`, generated and ground truth, are (N, 3, H, W) in [0, 1], float32; a
discriminator's outputs `on_sr` and `on_hr` are (N,) logits.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import weights
from console import UserError, one_line
from metrics import original_ssim
from tiles import SCALE

# Edge generator: Edge-Informed SISR, section 3.1 ----------------------------------------------

EDGE_WEIGHT = 4  # of edge pixels in the cross-entropy, as they are few
FEATURE_MATCHING_WEIGHT = 10


def edge_cross_entropy(logits: Tensor, hr_edges: Tensor) -> Tensor:
    """Returns binary cross-entropy; a missed edge costs `EDGE_WEIGHT` times as much as a false one.

    Args:
        logits: of the predicted edges, (N, 1, H, W).
        hr_edges: ground truth, (N, 1, H, W) in {0, 1}.
    """
    weight = logits.new_full((), EDGE_WEIGHT)  # `new_tensor` would synchronise with the GPU
    return F.binary_cross_entropy_with_logits(logits, hr_edges, pos_weight=weight)


def hinge_generator(score: Tensor) -> Tensor:
    """Returns the adversarial term of the edge generator, from the scores of its edges."""
    return -score.mean()


def hinge_discriminator(on_hr: Tensor, on_predicted: Tensor) -> Tensor:
    """Returns the loss of the edge discriminator, from its scores."""
    return (F.relu(1 - on_hr).mean() + F.relu(1 + on_predicted).mean()) / 2


def feature_matching(features: list[Tensor], hr_features: list[Tensor]) -> Tensor:
    """Returns weighted L1 between the discriminator's features of predicted and true edges."""
    pairs = zip(features, hr_features, strict=True)
    return FEATURE_MATCHING_WEIGHT * sum(F.l1_loss(a.float(), b.detach().float()) for a, b in pairs)


# HR generator: Edge.SRGAN ---------------------------------------------------------------------

PERCEPTUAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.006, 1e-3
# For `texture_terms`: ESRGAN's sum, with weights set by the gradients its terms send to the image.
TEXTURE_L1_WEIGHT, TEXTURE_WEIGHT, TEXTURE_ADVERSARIAL_WEIGHT = 10, 0.5, 0.05
SPECTRUM_WEIGHT, SUBPIXEL_WEIGHT = 80, 1000
WINDOW = 32  # side in pixels of the windows for spectra and means
RANGE = 2  # the original's losses are on images in [-1, 1], where differences are twice ours

real_or_fake = F.binary_cross_entropy_with_logits


def squared_error(sr: Tensor, hr: Tensor) -> Tensor:
    """Returns the mean squared error of images in [0, 1], on the original's scale."""
    return RANGE**2 * F.mse_loss(sr, hr)


def generator_terms(sr: Tensor, hr: Tensor, perceptual: Tensor, on_sr: Tensor) -> dict[str, Tensor]:
    """Returns the weighted terms of the HR generator's loss in the GAN stage."""
    return {
        "l1": RANGE * F.l1_loss(sr, hr),
        "perceptual": PERCEPTUAL_WEIGHT * perceptual,
        "ssim": 1 - original_ssim(sr, hr),
        "adversarial": ADVERSARIAL_WEIGHT * real_or_fake(on_sr, torch.ones_like(on_sr)),
    }


def texture_terms(
    sr: Tensor, hr: Tensor, perceptual: Tensor, on_sr: Tensor, on_hr: Tensor
) -> dict[str, Tensor]:
    """Returns the weighted terms of ESRGAN's generator (arXiv 1809.00219, eq. 3), and two more."""
    return {
        "l1": TEXTURE_L1_WEIGHT * F.l1_loss(sr, hr),
        "perceptual": TEXTURE_WEIGHT * perceptual,
        "adversarial": TEXTURE_ADVERSARIAL_WEIGHT * relativistic(on_sr, on_hr),
        "spectrum": SPECTRUM_WEIGHT * spectral_distance(sr, hr),
        "sub-pixel means": SUBPIXEL_WEIGHT * subpixel_means(sr, hr),
    }


def spectral_distance(sr: Tensor, hr: Tensor) -> Tensor:
    """Returns L1 between the amplitude spectra of windows (Fuoli et al., arXiv 2106.00783).

    Amplitudes tell how much texture there is at each frequency, but not where: the generator, which
    cannot know where, must still produce that much, and no hatching.
    """
    line = torch.hann_window(WINDOW, device=sr.device)

    def amplitudes(image: Tensor) -> Tensor:
        windows = image.unfold(2, WINDOW, WINDOW // 2).unfold(3, WINDOW, WINDOW // 2)
        return torch.fft.rfft2(windows * line[:, None] * line, norm="ortho").abs()

    return F.l1_loss(amplitudes(sr), amplitudes(hr))


def subpixel_means(sr: Tensor, hr: Tensor) -> Tensor:
    """Returns the mean square of errors that repeat everywhere: a grid, a colour cast.

    Each of the 16 sub-pixels that the generator makes of an LR pixel is averaged over windows:
    texture cancels out in these means, a checkerboard or a colour cast remains.
    """
    subpixels = F.pixel_unshuffle(sr - hr, SCALE)  # (N, 48, H / 4, W / 4)
    return F.avg_pool2d(subpixels, WINDOW // SCALE).square().mean()


def relativistic(more_real: Tensor, less_real: Tensor) -> Tensor:
    """Returns ESRGAN's relativistic average loss (eq. 1 and 2).

    One side has to look more real than the mean of the other. The discriminator's loss takes
    (HR, SR), the generator's (SR, HR).
    """
    above, below = more_real - less_real.mean(), less_real - more_real.mean()
    on_real, on_fake = torch.ones_like(above), torch.zeros_like(below)
    return (real_or_fake(above, on_real) + real_or_fake(below, on_fake)) / 2


def discriminator_loss(on_hr: Tensor, on_sr: Tensor, softness: Tensor) -> Tensor:
    """Returns binary cross-entropy against soft labels: real in [0.7, 1], generated in [0, 0.3].

    Args:
        softness: (N, 2) random numbers in [0, 1), one per label.
    """
    hr_label, sr_label = 1 - 0.3 * softness[:, 0], 0.3 * softness[:, 1]
    return real_or_fake(on_hr, hr_label) + real_or_fake(on_sr, sr_label)


RELU1_2, RELU2_2, RELU3_1 = 3, 8, 11  # layers of VGG19


class PerceptualLoss(nn.Module):
    """Distance between VGG19 features, squared error at relu3_1 by default.

    Args:
        state: from `vgg_state`.
        layers: layers whose distances are summed (Ledig et al., section 2.2.1, use one).
        distance: of two feature tensors.
        smooth: pool without aliasing, with `L2Pool`.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        layers: tuple[int, ...] = (RELU3_1,),
        distance: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.layers, self.distance = vgg_features(), layers, distance
        self.features.load_state_dict(state, assign=True)
        for i, layer in enumerate(self.features):
            if smooth and isinstance(layer, nn.MaxPool2d):
                self.features[i] = L2Pool()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Returns a scalar, from images (N, 3, H, W) in [0, 1]; no gradient reaches `hr`."""
        found, wanted = ((image - self.mean) / self.std for image in (sr, hr.detach()))
        total = sr.new_zeros(())
        for i, layer in enumerate(self.features):
            found, wanted = layer(found), layer(wanted)
            if i in self.layers:
                total = total + self.distance(found.float(), wanted.float())
        return total


class L2Pool(nn.Module):
    """The root of the blurred square, at half the size (Ding et al., DISTS, arXiv 2004.07728)."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", line[:, None] * line)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        blurred = F.conv2d(x * x, kernel, stride=2, padding=1, groups=x.shape[1])
        return (blurred + 1e-6).sqrt()


def vgg_features() -> nn.Sequential:
    """Returns VGG19's layers up to relu3_1, without weights."""
    with torch.device("meta"):
        return torchvision.models.vgg19().features[:12]


def vgg_state(path: Path | None) -> dict[str, Tensor]:
    """Returns the weights of VGG19's first five convolutions, by their names in `features`.

    Args:
        path: a file with them under torchvision's names; None: torchvision's own, downloaded to
            the folder TORCH_HOME if necessary.
    """
    if path is None:
        published = torchvision.models.VGG19_Weights.IMAGENET1K_V1
        try:
            state = published.get_state_dict(check_hash=True, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(
                f"{published.url}: cannot be downloaded ({one_line(error)}); download it"
                f" elsewhere, then pass the file as --vgg or put it in {folder}"
            ) from error
    else:
        state = weights.load_file(path, "use torchvision's vgg19 file, or omit --vgg")
    wanted = vgg_features().state_dict()
    found = {key: state.get(f"features.{key}") for key in wanted}
    for key, value in found.items():
        if not (isinstance(value, Tensor) and value.shape == wanted[key].shape):
            raise UserError(f"--vgg {path}: lacks features.{key}; use torchvision's vgg19 file")
    return found
