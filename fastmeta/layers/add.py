"""The layer kind `add`: the sum of two values of one shape, as residual networks have it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmeta.capture.build import Builder, Refused, Value, batched
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind


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


KIND = LayerKind(
    name="add",
    family="linear_map",
    forward=forward,
    inputs=2,
    functions={operator.add: add, operator.iadd: _add_, torch.add: add},
    methods={"add": add, "add_": _add_},
)
