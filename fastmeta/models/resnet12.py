"""The twelve-layer residual network of few-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastmeta.models.check import positive, positives


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, a 1x1 shortcut with batch norm, and a 2x2 max-pool.

    Shapes: [N, inputs, H, W] -> [N, outputs, H // 2, W // 2].
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, outputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1),
            ]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.activation = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H // 2, W // 2]."""
        return self.pool(self.activation(self.body(x) + self.shortcut(x)))


class ResNet12(nn.Module):
    """Four residual blocks, the mean over the image, and a linear head.

    Args:
        ways: outputs.
        in_channels: C of the images.
        widths: filters of the blocks; (64, 160, 320, 640) is the wide one.

    Shapes: [N, C, H, W] -> [N, ways], H and W at least 16.

    Initialisation: He's normal convolutions, batch norm as the identity.

    Raises:
        TypeError, ValueError: an argument is not a positive int, or there are not four widths.

    Source: Oreshkin et al., "TADAM" (2018), section 4.1; Lee et al., "Meta-Learning with
    Differentiable Convex Optimization" (2019), section 4.1, without DropBlock.
    """

    def __init__(
        self, ways: int, *, in_channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512)
    ) -> None:
        super().__init__()
        positive("ResNet12", "ways", ways)
        positive("ResNet12", "in_channels", in_channels)
        widths = positives("ResNet12", "widths", widths, "four", 4, 4)
        self.blocks = nn.Sequential(*[ResidualBlock(a, b) for a, b in pairwise((in_channels, *widths))])
        self.head = nn.Linear(widths[-1], ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, ways]."""
        return self.head(self.blocks(x).mean((2, 3)))
