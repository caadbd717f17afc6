"""The layer kind `add`: the sum of two values of one shape, as residual networks have it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.capture.build import Builder, Refused, Value, batched
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import ResidualImage
from fastmeta.cases.networks import Residual
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Apply, Example, LayerKind


def add(build: Builder, input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Any:
    """[N, ...] and [N, ...] -> [N, ...], without broadcasting."""
    if not (isinstance(input, Value) and isinstance(other, Value)):
        return NotImplemented
    if alpha != 1:
        raise Refused(f"alpha must be 1, got {alpha!r}")
    if input.shape != other.shape:
        raise Refused(f"it would broadcast {batched(input.shape)} and {batched(other.shape)}")
    return build.layer("add", (input, other), input.shape, inplace=inplace)


_add_ = partial(add, inplace=True)


def forward(layer: Layer, params: Mapping[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N, ...]."""
    return a + b


class Convolved(nn.Module):
    """The sum of two images that kernels keep channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, 2, H, W] and [N, 2, H, W] -> [N, 3, H, W]."""
        return self.a(a) + self.b(b)


def cases() -> Iterator[Case]:
    """Residual networks of rows and of images."""
    yield Case("residual", partial(Residual, 3, 13, 5, nn.SiLU), (3,), loss="ce")
    yield Case("residual_relu", partial(Residual, 3, 13, 5, nn.ReLU), (3,), kinks=True)
    image = partial(Case, "residual_image", ResidualImage, (2, 5, 4), 2, 4, 3, loss="ce")
    yield image()
    yield image(memory="recompute", rates="element")


KIND = LayerKind(
    name="add",
    family="linear_map",
    forward=forward,
    inputs=2,
    functions={operator.add: add, operator.iadd: _add_, torch.add: add},
    methods={"add": add, "add_": _add_},
    examples=(
        Example("vectors", partial(Apply, operator.add), ((13,), (13,))),
        Example("twice the same", partial(Apply, lambda x: x + x), ((3, 5),)),
        Example("images", Convolved, ((2, 4, 3), (2, 4, 3))),
    ),
    cases=cases,
)
