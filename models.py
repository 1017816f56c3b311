"""The four networks of Edge.SRGAN, and the SRResNet that its HR generator starts from.

Edge generator and discriminator: Nazeri et al., Edge-Informed Single Image Super-Resolution,
arXiv 1909.05305, section 3.1. HR generator and discriminator: Ledig et al., SRGAN,
arXiv 1609.04802, figure 4, the generator extended by an edge stage.

Images and edges enter and leave every network in [0, 1], float. LR images are (N, 3, H, W), HR
images (N, 3, 4H, 4W), LR edges (N, 1, H, W), HR edges (N, 1, 4H, 4W).
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from device import SumOverProcesses
from tiles import SCALE

# Layers ---------------------------------------------------------------------------------------


class FewChannelConv(nn.Conv2d):
    """A large convolution to very few channels, which is slow on CPUs, in two steps.

    First every column of the kernel separately, each into its own channel; then their sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, into, size, _ = self.weight.shape
        (rows, columns), device = self.padding, self.weight.device
        kernels = self.weight.permute(0, 3, 1, 2).reshape(out * size, into, size, 1)
        x = F.conv2d(x, kernels, padding=(rows, 0))
        shifts = torch.eye(size, device=device).repeat(out, 1).view(out, size, 1, size)
        return F.conv2d(x, shifts, self.bias, padding=(0, columns), groups=out)


class PReLU(nn.PReLU):
    """PReLU with a single slope; PyTorch's own has a slow backward pass on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        return torch.lerp(F.relu(x), x, self.weight.to(x.dtype))


class InstanceNorm(nn.InstanceNorm2d):
    """Normalises every channel of every image to mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:  # equal to batch norm, for which PyTorch has a faster kernel
            return F.batch_norm(x, None, None, training=True, eps=self.eps)
        return super().forward(x)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all training processes, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        exact = x.float()
        moments = torch.stack([exact.mean((0, 2, 3)), (exact * exact).mean((0, 2, 3))])
        mean, square = SumOverProcesses.apply(moments) / dist.get_world_size()
        var = (square - mean**2).clamp(min=0)
        with torch.no_grad():
            count = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (exact * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


# Edges ----------------------------------------------------------------------------------------


def normalised(conv: nn.Module) -> list[nn.Module]:
    """Returns a convolution with spectral norm, then instance norm and ReLU, as in the paper."""
    return [spectral_norm(conv), InstanceNorm(conv.out_channels), nn.ReLU(inplace=True)]


class EdgeGenerator(nn.Module):
    """Predicts the HR image's Canny edges from the LR image and its Canny edges.

    `width` channels at first, four times as many in the `blocks` residual blocks in the middle.
    """

    def __init__(self, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.arguments = {"width": width, "blocks": blocks}
        self.encoder = nn.Sequential(
            nn.ReflectionPad2d(3),
            *normalised(nn.Conv2d(4, width, 7)),
            *normalised(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            *normalised(nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)),
        )
        self.middle = nn.Sequential(*(EdgeResidualBlock(4 * width) for _ in range(blocks)))
        self.decoder = nn.Sequential(
            *normalised(nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1)),
            *normalised(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)),
            nn.ReflectionPad2d(3),
            FewChannelConv(width, 1, 7),
        )

    def logits(self, lr: Tensor, lr_edges: Tensor) -> Tensor:
        """Returns the logits of an HR edge, (N, 1, 4H, 4W), float32."""
        x = torch.cat([lr, lr_edges], dim=1)
        x = F.interpolate(x, scale_factor=SCALE, mode="nearest")
        return self.decoder(self.middle(self.encoder(x))).float()

    def forward(self, lr: Tensor, lr_edges: Tensor) -> Tensor:
        """Returns the probability of an HR edge, (N, 1, 4H, 4W), float32."""
        return torch.sigmoid(self.logits(lr, lr_edges))


class EdgeResidualBlock(nn.Module):
    """Dilated convolution, convolution, each normalised; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(2),
            *normalised(nn.Conv2d(channels, channels, 3, dilation=2, bias=False)),
            nn.ReflectionPad2d(1),
            *normalised(nn.Conv2d(channels, channels, 3, bias=False))[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class EdgeDiscriminator(nn.Module):
    """PatchGAN: tells Canny's edges from predicted ones, given HR; `width` channels at first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        channels, strides = [4, width, 2 * width, 4 * width, 8 * width, 1], [2, 2, 2, 1, 1]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(into, out, 4, stride, padding=1, bias=False))
            for (into, out), stride in zip(pairwise(channels), strides, strict=True)
        )

    def forward(self, hr: Tensor, hr_edges: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns unbounded scores, one per 8 x 8 pixels or so, and the five feature maps."""
        x = torch.cat([hr, hr_edges], dim=1)
        features = []
        for conv in self.convs:
            x = conv(x)
            if conv is not self.convs[-1]:
                x = F.leaky_relu(x, 0.2)
            features.append(x)
        return x, features


# Images ---------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Convolution, norm, PReLU, convolution, norm, skip connection; initially the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = SyncBatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = SyncBatchNorm(channels)
        self.prelu = PReLU()
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(residual))


class UpsamplingBlock(nn.Module):
    """Doubles height and width by sub-pixel convolution (Shi et al., arXiv 1609.05158)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.prelu = PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(F.pixel_shuffle(self.conv(x), 2))


class SRResNet(nn.Module):
    """The generator of Ledig et al., without edges: `width` channels, `blocks` residual blocks."""

    def __init__(self, width: int = 64, blocks: int = 20) -> None:
        super().__init__()
        self.arguments = {"width": width, "blocks": blocks}
        self.conv1 = nn.Conv2d(3, width, 9, padding=4)
        self.prelu = PReLU()
        self.residual_blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = SyncBatchNorm(width)
        self.upsample1 = UpsamplingBlock(width)
        self.upsample2 = UpsamplingBlock(width)
        self.conv5 = FewChannelConv(width, 3, 9, padding=4)

    def trunk(self, lr: Tensor) -> Tensor:
        """Returns (N, width, H, W) features: the part at LR size."""
        first = self.prelu(self.conv1(2 * lr - 1))
        return first + self.bn2(self.conv2(self.residual_blocks(first)))

    def render(self, features: Tensor) -> Tensor:
        """Returns the HR image, float32, from the trunk's features: the part at HR size."""
        return self.head(self.upsample2(self.upsample1(features)))

    def head(self, x: Tensor) -> Tensor:
        """Returns the image in [0, 1] from the last features, by way of tanh's [-1, 1]."""
        return (torch.tanh(self.conv5(x).float()) + 1) / 2

    def forward(self, lr: Tensor) -> Tensor:
        return self.render(self.trunk(lr))


class Generator(SRResNet):
    """The HR generator of Edge.SRGAN: SRResNet's features are joined with HR edges at HR size.

    Args:
        width: channels before the edges are added; there are twice as many after.
        blocks: residual blocks at LR size; a quarter as many follow at HR size.
    """

    def __init__(self, width: int = 64, blocks: int = 20) -> None:
        super().__init__(width, blocks)
        self.conv3 = nn.Conv2d(width + 1, 2 * width, 3, padding=1)
        self.residual_blocks_edges = nn.Sequential(
            *(ResidualBlock(2 * width) for _ in range(blocks // 4))
        )
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.bn4 = SyncBatchNorm(2 * width)
        self.conv5 = FewChannelConv(2 * width, 3, 9, padding=4)

    def render(self, features: Tensor, hr_edges: Tensor) -> Tensor:
        """Returns the HR image, float32, from the trunk's features and the HR edges."""
        x = self.upsample2(self.upsample1(features))
        x = torch.cat([x, (2 * hr_edges - 1).to(x.dtype)], dim=1)
        first = self.prelu(self.conv3(x))
        return self.head(first + self.bn4(self.conv4(self.residual_blocks_edges(first))))

    def forward(self, lr: Tensor, hr_edges: Tensor) -> Tensor:
        return self.render(self.trunk(lr), hr_edges)

    @property
    def trunk_layers(self) -> list[nn.Module]:
        """Returns the layers before the edges, except the PReLU, which the edge stage shares."""
        lr_layers = [self.conv1, self.residual_blocks, self.conv2, self.bn2]
        return [*lr_layers, self.upsample1, self.upsample2]

    @classmethod
    def from_trunk(cls, srresnet: SRResNet) -> "Generator":
        """Returns a generator that initially gives the SRResNet's images, whatever the edges.

        The edge stage starts with the features and their negatives. PReLU p of slope a has
        p(x) - p(-x) = (1 + a) x, so the last convolution can recover the SRResNet's features.
        """
        generator = cls(**srresnet.arguments)
        shared = {k: v for k, v in srresnet.state_dict().items() if not k.startswith("conv5.")}
        generator.load_state_dict(shared, strict=False)
        with torch.no_grad():
            channels = torch.arange(srresnet.arguments["width"])
            for parameter in (generator.conv3.weight, generator.conv3.bias, generator.bn4.weight):
                parameter.zero_()
            generator.conv3.weight[channels, channels, 1, 1] = 1
            generator.conv3.weight[len(channels) + channels, channels, 1, 1] = -1
            head = srresnet.conv5.weight / (1 + srresnet.prelu.weight)
            generator.conv5.weight.copy_(torch.cat([head, -head], dim=1))
            generator.conv5.bias.copy_(srresnet.conv5.bias)
        return generator


class Discriminator(nn.Module):
    """Tells real HR images from generated ones, of any size; `width` channels at first."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        channels = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        for i, (into, out) in enumerate(pairwise(channels)):
            conv = nn.Conv2d(into, out, 3, stride=2 - i % 2, padding=1)
            layers += [conv, SyncBatchNorm(out), nn.SiLU()]
        # the original pads this 1 x 1 convolution, so that a border of biases enters the mean
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 1, padding=1))

    def forward(self, hr: Tensor) -> Tensor:
        """Returns the (N,) logits of being real, float32."""
        return self.layers(2 * hr - 1).float().mean(dim=(1, 2, 3))
