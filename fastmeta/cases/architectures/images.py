"""Convolutions in one, two and three dimensions, and norms of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.architectures.small import small

WIDTH = 4


class Mean(nn.Module):
    """The mean over all positions of [N, C, ...]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def conv1d() -> nn.Module:
    """Strided convolutions along a signal."""
    return nn.Sequential(
        nn.Conv1d(2, WIDTH, 3, stride=2), nn.Tanh(), nn.Conv1d(WIDTH, 3, 2), nn.Flatten(), nn.Linear(6, 2)
    )


def conv3d() -> nn.Module:
    """Convolutions of a volume, pooled by the mean."""
    return nn.Sequential(
        nn.Conv3d(1, WIDTH, 2), nn.Tanh(), nn.AvgPool3d(2, 1), nn.Conv3d(WIDTH, 2, 1), Mean()
    )


def dilated() -> nn.Module:
    """Convolutions with holes, circular padding and replicated borders (Yu, Koltun, 2016)."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.Softplus(),
        nn.Conv2d(WIDTH, 3, 3, padding=1, padding_mode="replicate"),
        Mean(),
    )


def separable() -> nn.Module:
    """Depthwise, then pointwise; and in groups (Howard et al., 2017; Xie et al., 2017)."""
    return nn.Sequential(
        nn.Conv2d(2, WIDTH, 3, groups=2),
        nn.Hardswish(),
        nn.Conv2d(WIDTH, WIDTH, 1),
        nn.Conv2d(WIDTH, 2 * WIDTH, 2, groups=2),
        nn.SiLU(),
        nn.Conv2d(2 * WIDTH, 3, 1),
        Mean(),
    )


def autoencoder() -> nn.Module:
    """Strided convolutions down, transposed ones up."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(WIDTH, 1, 3, padding=1, bias=False),
    )


def super_resolution() -> nn.Module:
    """Channels become pixels (Shi et al., 2016)."""
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), nn.Tanh(), nn.PixelShuffle(2))


def alexnet() -> nn.Module:
    """PReLU, local maxima, an adaptive mean, a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.PReLU(WIDTH),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(WIDTH, WIDTH, 2),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, 3),
    )


def instance_norm() -> nn.Module:
    """Norms of every feature map by itself (Ulyanov et al., 2016)."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 2), nn.InstanceNorm2d(WIDTH, affine=True), nn.ELU(), nn.Conv2d(WIDTH, 2, 2)
    )


class UNet(nn.Module):
    """Down by a maximum, up by nearest neighbours, side by side with what was there (Ronneberger et
    al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.bottom = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.up = nn.Conv2d(2 * WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.gelu(self.down(x))
        low = F.gelu(self.bottom(F.max_pool2d(high, 2)))
        return self.up(torch.cat([high, F.interpolate(low, scale_factor=2, mode="nearest")], 1))


class StandardConv(nn.Conv2d):
    """A convolution whose weights have mean zero and variance one (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=self.padding)


class ResNet(nn.Module):
    """Residual blocks with standardised weights and group norms, without batch norm (Kolesnikov et
    al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = StandardConv(1, WIDTH, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, WIDTH) for _ in range(2))
        self.convs = nn.ModuleList(StandardConv(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(x.mean(dim=(-2, -1)))


class ConvNext(nn.Module):
    """Depthwise convolution, layer norm over channels, an MLP, a learned scale (Liu et al.,
    2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.wide, self.narrow = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(F.gelu(self.wide(h)))
        return self.head((x + h.permute(0, 3, 1, 2)).mean([2, 3]))


class DenseBlock(nn.Module):
    """Every layer reads all before it, averaged at last (Huang et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.head = nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], 1)
        return self.head(F.avg_pool2d(x, 4)).flatten(1)


class CoordConv(nn.Module):
    """The position of each pixel as two more channels (Liu et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, WIDTH, 2), nn.Linear(WIDTH * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, size, dtype=x.dtype) for size in x.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        return self.head(torch.sigmoid(self.conv(torch.cat([x, grid], 1))).flatten(1))


class LocallyConnected(nn.Module):
    """A weight of its own for each window, the windows by `unfold` (Taigman et al., 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, WIDTH, 4) / 2)
        self.head = nn.Linear(9 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x, 2)  # [N, 4, 9]
        return self.head(torch.tanh(torch.einsum("ntp,pwt->npw", windows, self.weight)).flatten(1))


class Pyramid(nn.Module):
    """Three sizes of an image, enlarged bilinearly and summed (Lin et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(1, WIDTH, 1) for _ in range(2))
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small_side = torch.tanh(self.sides[1](F.avg_pool2d(x, 2)))
        large = F.interpolate(small_side, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.tanh(self.sides[0](x)) + large)


_IMAGE = (1, 4, 4)

CASES = (
    small("conv1d", conv1d, (2, 7)),
    small("conv3d", conv3d, (1, 3, 3, 3)),
    small("dilated", dilated, _IMAGE, loss="ce"),
    small("separable", separable, (2, 4, 4), loss="ce", kinks=True),
    small("autoencoder", autoencoder, _IMAGE),
    small("super_resolution", super_resolution, (1, 3, 3)),
    small("alexnet", alexnet, (1, 5, 5), loss="ce", kinks=True),
    small("instance_norm", instance_norm, _IMAGE, kinks=True),
    small("u_net", UNet, _IMAGE, kinks=True),
    small("standardised_resnet", ResNet, _IMAGE, loss="ce", kinks=True),
    small("convnext", ConvNext, (1, 6, 6), loss="ce"),
    small("dense_block", DenseBlock, _IMAGE, loss="ce"),
    small("locally_connected", LocallyConnected, _IMAGE),
    small("pyramid", Pyramid, _IMAGE),
    small("coord_conv", CoordConv, _IMAGE),
)
