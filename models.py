"""The four networks of Edge.SRGAN, the baseline they start from, and their weight files.

Edge generator and discriminator: Nazeri et al., Edge-Informed Single Image Super-Resolution,
arXiv 1909.05305, section 3.1. HR generator and discriminator: Ledig et al., SRGAN,
arXiv 1609.04802, figure 4, the generator extended by an edge stage. The attribute names are
those of the published checkpoints, so these load as they are.

Shapes: LR pictures are (N, 3, H, W), HR pictures (N, 3, 4H, 4W), LR edges (N, 1, H, W), HR
edges (N, 1, 4H, 4W); float.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from tiles import SCALE, replacing

# Layers ---------------------------------------------------------------------------------------


class FewChannelConv(nn.Conv2d):
    """A large convolution to very few channels, which processors do badly, in two steps.

    First every column of the kernel by itself, to its own channel; then the columns' sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, into, size, _ = self.weight.shape
        (rows, columns), device = self.padding, self.weight.device
        kernels = self.weight.permute(0, 3, 1, 2).reshape(out * size, into, size, 1)
        x = F.conv2d(x, kernels, padding=(rows, 0))
        shifts = torch.eye(size, device=device).repeat(out, 1).view(out, size, 1, size)
        return F.conv2d(x, shifts, self.bias, padding=(0, columns), groups=out)


class PReLU(nn.PReLU):
    """PReLU with a single slope; on processors PyTorch's own is slow backwards."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        return torch.lerp(F.relu(x), x, self.weight.to(x.dtype))


class InstanceNorm(nn.InstanceNorm2d):
    """Every channel of every picture to mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:  # then it is batch norm, which PyTorch has a faster kernel for
            return F.batch_norm(x, None, None, training=True, eps=self.eps)
        return super().forward(x)


# Edges ----------------------------------------------------------------------------------------


class EdgeGenerator(nn.Module):
    """Predicts the HR picture's Canny edges from the LR picture and its Canny edges.

    Args:
        width: channels of the first convolution.
        blocks: residual blocks in the middle.
    """

    def __init__(self, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.arguments = {"width": width, "blocks": blocks}
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(3),
            spectral_norm(nn.Conv2d(4, width, 7)),
            InstanceNorm(width),
            nn.ReLU(inplace=True),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            InstanceNorm(2 * width),
            nn.ReLU(inplace=True),
            spectral_norm(nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)),
            InstanceNorm(4 * width),
            nn.ReLU(inplace=True),
        )
        self.middle = nn.Sequential(*(EdgeResidualBlock(4 * width) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            spectral_norm(nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1)),
            InstanceNorm(2 * width),
            nn.ReLU(inplace=True),
            spectral_norm(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)),
            InstanceNorm(width),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(3),
            FewChannelConv(width, 1, 7),
        )

    def forward(self, lr: Tensor, lr_edges: Tensor) -> Tensor:
        """HR edges in [0, 1] from `lr` in [0, 1] and `lr_edges` in {0, 1}."""
        x = torch.cat([lr, lr_edges], dim=1)
        x = F.interpolate(x, scale_factor=SCALE, mode="nearest")
        return torch.sigmoid(self.decoder(self.middle(self.encoder(x))).float())


class EdgeResidualBlock(nn.Module):
    """Dilated convolution, convolution, each normalised; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(2),
            spectral_norm(nn.Conv2d(channels, channels, 3, dilation=2, bias=False)),
            InstanceNorm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            spectral_norm(nn.Conv2d(channels, channels, 3, bias=False)),
            InstanceNorm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class EdgeDiscriminator(nn.Module):
    """PatchGAN: tells true from predicted edges, a patch at a time, given the HR picture.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.arguments = {"width": width}
        channels = [4, width, 2 * width, 4 * width, 8 * width, 1]
        for i, stride in enumerate([2, 2, 2, 1, 1], start=1):
            conv = nn.Conv2d(channels[i - 1], channels[i], 4, stride, padding=1, bias=False)
            setattr(self, f"conv{i}", nn.Sequential(spectral_norm(conv)))
            if i < 5:
                getattr(self, f"conv{i}").append(nn.LeakyReLU(0.2))

    def forward(self, hr: Tensor, hr_edges: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Unbounded scores, one for every 8 x 8 pixels or so, and the five feature maps.

        Args:
            hr: HR picture in [0, 1].
            hr_edges: in [0, 1].
        """
        x = torch.cat([hr, hr_edges], dim=1)
        features = []
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = conv(x)
            features.append(x)
        return x, features


# Pictures -------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Convolution, norm, PReLU, convolution, norm, identity added; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = PReLU()
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(residual))


class UpsamplingBlock(nn.Module):
    """Twice the height and width by sub-pixel convolution (Shi et al., arXiv 1609.05158)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.prelu = PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(F.pixel_shuffle(self.conv(x), 2))


class SRResNet(nn.Module):
    """The generator of Ledig et al. as it stands, without edges.

    Args:
        width: channels.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 20) -> None:
        super().__init__()
        self.arguments = {"width": width, "blocks": blocks}
        self.blocks = blocks
        self.conv1 = nn.Conv2d(3, width, 9, padding=4)
        self.prelu = PReLU()
        for i in range(1, blocks + 1):
            setattr(self, f"residual_block{i}", ResidualBlock(width))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.upsample1 = UpsamplingBlock(width)
        self.upsample2 = UpsamplingBlock(width)
        self.conv5 = FewChannelConv(width, 3, 9, padding=4)

    def trunk(self, lr: Tensor) -> Tensor:
        """(N, width, H, W) features from `lr` in [-1, 1]: the stage at LR size."""
        first = x = self.prelu(self.conv1(lr))
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"residual_block{i}")(x)
        return first + self.bn2(self.conv2(x))

    def render(self, features: Tensor) -> Tensor:
        """HR picture in [-1, 1] from the trunk's features: the stage at HR size."""
        return torch.tanh(self.conv5(self.upsample2(self.upsample1(features))).float())

    def forward(self, lr: Tensor) -> Tensor:
        """HR picture in [-1, 1] from `lr` in [-1, 1]."""
        return self.render(self.trunk(lr))


class Generator(SRResNet):
    """The HR generator of Edge.SRGAN: SRResNet's features meet the HR edges at HR size.

    Args:
        width: channels before the edges come in, half of those after.
        blocks: residual blocks at LR size; a quarter as many follow at HR size.
    """

    def __init__(self, width: int = 64, blocks: int = 20) -> None:
        super().__init__(width, blocks)
        self.conv3 = nn.Conv2d(width + 1, 2 * width, 3, padding=1)
        for i in range(1, blocks // 4 + 1):
            setattr(self, f"residual_block_edges{i}", ResidualBlock(2 * width))
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.conv5 = FewChannelConv(2 * width, 3, 9, padding=4)

    def render(self, features: Tensor, hr_edges: Tensor) -> Tensor:
        """HR picture in [-1, 1] from the trunk's features and `hr_edges` in [-1, 1]."""
        x = torch.cat([self.upsample2(self.upsample1(features)), hr_edges], dim=1)
        first = x = self.prelu(self.conv3(x))
        for i in range(1, self.blocks // 4 + 1):
            x = getattr(self, f"residual_block_edges{i}")(x)
        x = first + self.bn4(self.conv4(x))
        return torch.tanh(self.conv5(x).float())

    def forward(self, lr: Tensor, hr_edges: Tensor) -> Tensor:
        """HR picture in [-1, 1] from `lr` in [-1, 1] and `hr_edges` in [-1, 1]."""
        return self.render(self.trunk(lr), hr_edges)

    @classmethod
    def from_trunk(cls, trunk: SRResNet) -> "Generator":
        """A generator that gives the trunk's own pictures, whatever the edges, until trained.

        The edge stage starts with the features and their negatives; what a PReLU of slope a
        makes of the two differs by (1 + a) times the feature, which the last convolution undoes.
        """
        generator = cls(**trunk.arguments)
        generator.load_state_dict(trunk.state_dict() | generator.edge_state())
        with torch.no_grad():
            channels = torch.arange(trunk.arguments["width"])
            for parameter in (generator.conv3.weight, generator.conv3.bias, generator.bn4.weight):
                parameter.zero_()
            generator.conv3.weight[channels, channels, 1, 1] = 1
            generator.conv3.weight[len(channels) + channels, channels, 1, 1] = -1
            head = trunk.conv5.weight / (1 + trunk.prelu.weight)
            generator.conv5.weight.copy_(torch.cat([head, -head], dim=1))
            generator.conv5.bias.copy_(trunk.conv5.bias)
        return generator

    def edge_state(self) -> dict[str, Tensor]:
        """The part of the state dict that SRResNet lacks or has in another shape."""
        stages = ("conv3.", "residual_block_edges", "conv4.", "bn4.", "conv5.")
        return {key: value for key, value in self.state_dict().items() if key.startswith(stages)}


class Discriminator(nn.Module):
    """Tells true HR pictures from generated ones; of any size.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.arguments = {"width": width}
        channels = [3, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width]
        channels.append(8 * width)
        for i in range(1, 9):
            stride = 2 - i % 2
            conv = nn.Conv2d(channels[i - 1], channels[i], 3, stride, padding=1)
            setattr(self, f"conv{i}", conv)
            if i > 1:
                setattr(self, f"bn{i}", nn.BatchNorm2d(channels[i]))
        self.conv9 = nn.Conv2d(8 * width, 1, 1)

    def forward(self, hr: Tensor) -> Tensor:
        """(N,) probability of being true, in [0, 1], float32, from `hr` in [-1, 1]."""
        x = F.silu(self.conv1(hr))
        for i in range(2, 9):
            x = F.silu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return torch.sigmoid(self.conv9(x).float().mean(dim=(1, 2, 3)))


# Weight files ---------------------------------------------------------------------------------


class WeightError(Exception):
    """A weight file cannot be used; the message names it and the way out."""


NETWORKS = {
    cls.__name__: cls
    for cls in (EdgeGenerator, EdgeDiscriminator, SRResNet, Generator, Discriminator)
}


def save_network(network: nn.Module, path: Path) -> None:
    """Writes a network's weights, halved in precision, and what it takes to build it again."""
    state = {
        key: value.half() if value.ndim > 1 else value  # vectors weigh nothing
        for key, value in network.state_dict().items()
    }
    content = {
        "network": type(network).__name__,
        "arguments": network.arguments,
        "state_dict": state,
    }
    save_file(content, path)


def load_network(path: Path) -> nn.Module:
    """The network a file of `save_network`, or a published Edge.SRGAN checkpoint, holds.

    Returns:
        The network in float32, in evaluation mode.

    Raises:
        WeightError: there is no such file, or it holds none of this module's networks.
    """
    content = load_file(path)
    if content.get("network") in NETWORKS:
        network = NETWORKS[content["network"]](**content["arguments"])
        state = content["state_dict"]
    elif "generator" in content:
        network, state = EdgeGenerator(), content["generator"]
    elif "state_dict" in content:
        network, state = Generator(), content["state_dict"]
    else:
        raise WeightError(f"{path}: holds none of the networks {', '.join(NETWORKS)}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightError(f"{path}: does not fit {type(network).__name__}: {error}") from error
    return network.eval()


def save_file(content: dict, path: Path) -> None:
    """`torch.save` that leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_file(path: Path) -> dict:
    """`torch.load` onto the CPU, of tensors and plain values only.

    Raises:
        WeightError: there is no such file, or it is damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightError(f"{path}: no such file; train it first, or give another") from error
    except Exception as error:
        raise WeightError(f"{path}: not a weight file, or a damaged one; give another") from error
    if not isinstance(content, dict):
        raise WeightError(f"{path}: holds no state dict")
    return content
