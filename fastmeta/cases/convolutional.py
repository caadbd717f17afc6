"""Networks of images for the cases: small, of odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.case import Case


def image_net(*layers: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int = 3) -> nn.Sequential:
    """The layers, and a linear head on what they make of an example of this shape."""
    body = nn.Sequential(*[make() for make in layers])
    with torch.no_grad():
        features = body.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(*body.train(), nn.Flatten(), nn.Linear(features, outputs))


def image_case(
    label: str, shape: tuple[int, ...], *layers: Callable[[], nn.Module], **options: object
) -> Case:
    """A case of `image_net`, by default of few tasks and examples, with cross-entropy."""
    options = {"tasks": 2, "shots": 4, "queries": 3, "loss": "ce", **options}
    return Case(label, partial(image_net, *layers, shape=shape), shape, **options)  # type: ignore[arg-type]


#: `conv(...)` makes an nn.Conv2d(...) when it is called.
conv = partial(partial, nn.Conv2d)


class ResidualImage(nn.Module):
    """A residual block with a shortcut of its own, the same convolution twice, means over the
    image, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.first(x)))
        y = self.shared(torch.tanh(self.shared(y))) + self.shortcut(x)
        y = torch.cat([torch.tanh(y), x], dim=1)
        return self.head(torch.cat([y.mean((2, 3)), torch.tanh(self.shortcut(x)).mean((-2, -1))], 1))


class Joined(nn.Module):
    """Concats along every dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(5, 2, 3)
        self.head = nn.Linear(2 * 8 * 2 + 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.tanh(self.conv(x)), x], 1)  # [N, 5, 5, 4]
        z = torch.tanh(self.second(torch.cat([y, y], 2)))  # [N, 2, 8, 2]
        wide = torch.cat((z, z, z), dim=3).mean(dim=(2, 3))  # [N, 2]
        return self.head(torch.cat([z.flatten(1), wide, self.conv(x).mean((2, 3))], 1))


class Reshaped(nn.Module):
    """An image made of rows, and read again under another height and width: the numbers stay where
    they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.conv = nn.Conv2d(8, 6, 2, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * (4 + 4), 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(self.first(x).unflatten(1, (8, 1, 1))))  # [N, 6, 4, 4]
        flat = y.view(y.shape[0], 6, 2, 8)
        pooled = F.max_pool2d(self.norm(flat), 2)  # [N, 6, 1, 4]
        return self.head(torch.cat([F.adaptive_avg_pool2d(flat, (2, 2)).flatten(1), pooled.flatten(1)], 1))


class Stems(nn.Module):
    """Several first convolutions with norms, the last of which reads its image under another height
    and width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.second_norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)
        self.third, self.third_norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.head = nn.Linear(5 + 3 + 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first_norm(self.first(x))).mean((2, 3))
        z = torch.tanh(self.second_norm(self.second(x))).mean((2, 3))
        flat = self.third_norm(self.third(x).view(x.shape[0], 2, 2, 8))
        return self.head(torch.cat([y, z, F.avg_pool2d(torch.tanh(flat), (1, 8)).flatten(1)], 1))
