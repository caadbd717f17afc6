"""The layer kind `mul`: the product of two values, element by element.

One of the two may stand for several elements of the other: a factor for each example, channel or
position, as gates, FiLM (Perez et al. 2018), squeeze-and-excitation (Hu et al. 2018), SwiGLU
(Shazeer 2020) and factorised models have it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Refused, Value, batched
from fastmeta.cases.case import Case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Apply, Example, LayerKind, Order

Shape = tuple[int, ...]


def mul(build: Builder, input: Any, other: Any, *, inplace: bool = False) -> Any:
    """[N, ...] and [N, ...] of as many dimensions -> the shape of the larger one."""
    if not (isinstance(input, Value) and isinstance(other, Value)):
        return NotImplemented
    swap = not _orders(input.shape, other.shape)
    a, b = (other, input) if swap else (input, other)
    if not _orders(a.shape, b.shape) or (swap and inplace):
        raise Refused(f"it would broadcast {batched(input.shape)} and {batched(other.shape)}")
    return build.layer("mul", (a, b), a.shape, inplace=inplace)


def _orders(a: Shape, b: Shape) -> list[Order]:
    """The orders of memory in which b has all rows of a or one, and all columns or one."""
    if len(a) != len(b):
        return []
    # whose columns are the first dimension, and the last
    splits: dict[Order, tuple[slice, slice]] = {
        "image": (slice(1, None), slice(1)),
        "rows": (slice(-1), slice(-1, None)),
    }
    return [order for order, parts in splits.items() if all(_all_or_one(a[p], b[p]) for p in parts)]


def _all_or_one(a: Shape, b: Shape) -> bool:
    return b == a or set(b) <= {1}


def order(layer: Layer, a: Shape, b: Shape) -> Order:
    """The one order that does, or whatever the first value lies in."""
    orders = _orders(a, b)
    return "either" if len(orders) == 2 else orders[0]


def forward(layer: Layer, params: Mapping[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """[N, ...] and [N, ...] -> [N, ...]."""
    return a * b


class Gated(nn.Module):
    """SwiGLU between two linear layers, and a factor for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(3, 7), nn.Linear(3, 7), nn.Linear(7, 2)
        self.scale = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 2]."""
        return self.down(F.silu(self.gate(x)) * self.up(x)) * torch.sigmoid(self.scale(x))


class Excited(nn.Module):
    """Squeeze-and-excitation: a factor for each channel of an image, from the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, H, W] -> [N, 3]."""
        y = self.conv(x)
        factor = torch.sigmoid(self.squeeze(y.mean((2, 3))))
        y = torch.tanh(y * factor.unsqueeze(2).unsqueeze(3))
        return self.head((y * y).mean((2, 3)))


class Modulated(nn.Module):
    """FiLM: features of rows scaled and shifted by what another layer makes of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.shift = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, 4] -> [N, S, 2]."""
        y = self.body(x)
        y *= self.scale(x)
        return self.head(torch.tanh(y + self.shift(x)))


def cases() -> Iterator[Case]:
    """Gates, FiLM and squeeze-and-excitation."""
    gated = partial(Case, "gated", Gated, (3,))
    yield gated()
    yield gated(memory="recompute", steps=3, rates="element_step_task", momentum=0.9, weight_decay=0.05)
    yield gated(order="first", weighted="sqt")
    yield Case("modulated", Modulated, (3, 4), loss="mse")
    yield Case("excited", Excited, (2, 4, 3), loss="ce", tasks=2, shots=4, queries=3)


class Convolved(nn.Module):
    """The product of an image that kernels keep channels-last and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, 2, H, W] and [N, 3, H, W] -> [N, 3, H, W]."""
        return self.a(a) * b


_product = partial(Apply, operator.mul)
KIND = LayerKind(
    name="mul",
    family="bilinear",
    forward=forward,
    inputs=2,
    order=order,
    functions={operator.mul: mul, operator.imul: partial(mul, inplace=True), torch.mul: mul},
    methods={"mul": mul, "mul_": partial(mul, inplace=True)},
    examples=(
        Example("vectors", _product, ((13,), (13,))),
        Example("squares", partial(Apply, lambda x: x * x), ((3, 5),)),
        Example("a factor for each example", _product, ((13,), (1,))),
        Example("a factor for each row", _product, ((3, 5), (3, 1))),
        Example("a factor for each column", _product, ((1, 5), (3, 5))),
        Example("a factor for the last dimension", _product, ((2, 3, 5), (1, 1, 5))),
        Example("a factor for each channel", _product, ((2, 3, 5), (2, 1, 1))),
        Example("a factor for each position", _product, ((2, 3, 5), (1, 3, 5))),
        Example("images", Convolved, ((2, 4, 5), (3, 4, 5))),
    ),
    cases=cases,
)
