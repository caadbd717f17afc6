"""The layer kind `concat`: two values one behind the other; more are concatenated two by two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.capture.build import Builder, Refused, Value, batched, described, integer
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import Joined
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Apply, Example, LayerKind


def concat(build: Builder, tensors: Any, dim: Any = 0) -> Value:
    """[N, ..., A, ...] and [N, ..., B, ...] -> [N, ..., A + B, ...]."""
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise Refused(f"it takes a sequence of tensors, got {described(tensors)}")
    for tensor in tensors:
        if not isinstance(tensor, Value):
            raise Refused(f"a traced tensor was expected, got {described(tensor)}")
    rank = len(tensors[0].shape) + 1
    if not -rank <= integer(dim) < rank:
        raise Refused(f"dimension {dim} is out of range for {rank} dimensions")
    at = dim % rank - 1
    if at < 0:
        raise Refused("it would concatenate along the batch dimension")

    def both(a: Value, b: Value) -> Value:
        if (
            len(a.shape) != len(b.shape)
            or a.shape[:at] + a.shape[at + 1 :] != b.shape[:at] + b.shape[at + 1 :]
        ):
            raise Refused(f"{batched(a.shape)} and {batched(b.shape)} differ outside of dimension {dim}")
        shape = (*a.shape[:at], a.shape[at] + b.shape[at], *a.shape[at + 1 :])
        return build.layer("concat", (a, b), shape, constants=(float(at),))

    return reduce(both, tensors)


def forward(layer: Layer, params: Mapping[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """[N, ..., A, ...] and [N, ..., B, ...] -> [N, ..., A + B, ...]."""
    return torch.cat([a, b], int(layer.constants[0]) + 1)


def _joined(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return torch.cat([a, b], dim)


class _Convolved(nn.Module):
    """Two images that kernels keep channels-last, one after the other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.a, self.b = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, 2, ...] and [N, 2, ...] -> [N, 3, ...] with one size larger."""
        return torch.cat([self.a(a), self.b(b)], self.dim)


def cases() -> Iterator[Case]:
    """Along every dimension of an image."""
    yield Case("joined", Joined, (2, 5, 4), 2, 4, 3, loss="ce")


KIND = LayerKind(
    name="concat",
    family="linear_map",
    forward=forward,
    inputs=2,
    constants=(1, 1),
    functions={torch.cat: concat, torch.concat: concat, torch.concatenate: concat},
    examples=(
        Example("vectors", partial(Apply, _joined, 1), ((5,), (8,))),
        Example("rows", partial(Apply, _joined, 1), ((2, 5), (3, 5))),
        Example("columns", partial(Apply, _joined, 2), ((3, 5), (3, 2))),
        Example("channels of images", partial(_Convolved, 1), ((2, 4, 3), (2, 4, 3))),
        Example("heights of images", partial(_Convolved, 2), ((2, 4, 3), (2, 3, 3))),
        Example("widths of images", partial(_Convolved, 3), ((2, 4, 3), (2, 4, 2))),
    ),
    cases=cases,
)
