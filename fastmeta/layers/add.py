"""The layer kind `add`: the sum of two values of one shape, as residual networks have it."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value, batched


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

MODULES: Modules = {}
FUNCTIONS: Functions = {operator.add: add, operator.iadd: _add_, torch.add: add}
METHODS: Methods = {"add": add, "add_": _add_}
