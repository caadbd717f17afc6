"""Sizes in a forward: x.shape, x.size(0), arithmetic on numbers. They become no layer."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from fastmeta.capture.build import (
    BATCH,
    Builder,
    Functions,
    Methods,
    Modules,
    Parameter,
    Refused,
    Value,
    described,
)

_OPERATORS = "add sub mul truediv floordiv mod pow neg getitem"
#: Functions of numbers and sizes, evaluated during capture; the batch size has no arithmetic.
ARITHMETIC: frozenset[Callable[..., Any]] = frozenset(
    (*(getattr(operator, name) for name in _OPERATORS.split()), math.prod, math.sqrt, math.log, math.exp)
)
#: Their forms in augmented assignments; sizes and numbers are immutable, so that both do the same.
AUGMENTED = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def shape(build: Builder, input: Any) -> tuple[Any, ...]:
    """The sizes of a traced tensor, (N, ...), or of a parameter."""
    if isinstance(input, Value):
        return (BATCH, *input.shape)
    if isinstance(input, Parameter):
        return input.shape
    raise Refused(f"the shape of {described(input)} is not known")


def size(build: Builder, input: Any, dim: int | None = None) -> Any:
    """`x.size()` or `x.size(dim)`."""
    return shape(build, input) if dim is None else shape(build, input)[dim]


def dim(build: Builder, input: Any) -> int:
    """The number of dimensions, the batch included."""
    return len(shape(build, input))


def attribute(build: Builder, input: Any, name: str) -> Any:
    """`x.shape` and `x.ndim`; any other attribute of a tensor is refused."""
    if name == "shape":
        return shape(build, input)
    if name == "ndim":
        return dim(build, input)
    raise Refused(f"the attribute `{name}` of a tensor cannot be captured")


MODULES: Modules = {}
FUNCTIONS: Functions = {getattr: attribute}
METHODS: Methods = {"size": size, "dim": dim, "ndimension": dim}
