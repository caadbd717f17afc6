"""The layer kind `elementwise`: one function of every element, and scale * x + shift ("affine").

The functions are the rows of fastmeta/layers/functions.py; here is what is captured by a rule of
its own: gelu, whose `approximate` says which function it is, and arithmetic with numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value, number
from fastmeta.cases.case import Case
from fastmeta.cases.networks import ACTIVATIONS, mlp_case
from fastmeta.graph.program import Layer
from fastmeta.layers.functions import FUNCTIONS, added, function_of, tables
from fastmeta.layers.kind import Apply, Example, LayerKind


def gelu(build: Builder, input: Any, *, approximate: str = "none") -> Value:
    """x * Phi(x), or its approximation by tanh."""
    if approximate not in ("none", "tanh"):
        raise Refused(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return added(build, "gelu" if approximate == "none" else "gelu_tanh", input, (), False)


def affine(build: Builder, input: Any, scale: float, shift: float, inplace: bool = False) -> Value:
    """scale * x + shift."""
    return added(build, "affine", input, (scale, shift), inplace)


def mul(build: Builder, input: Any, other: Any, *, inplace: bool = False) -> Any:
    """A value times a number, in either order."""
    if isinstance(other, Value) and not inplace:
        input, other = other, input
    if not isinstance(input, Value) or isinstance(other, Value):
        return NotImplemented
    return affine(build, input, number(other), 0.0, inplace)


def div(build: Builder, input: Any, other: Any, *, rounding_mode: None = None, inplace: bool = False) -> Any:
    """A value divided by a number."""
    if not isinstance(input, Value) or isinstance(other, Value):
        return NotImplemented
    if rounding_mode is not None or number(other) == 0:
        raise Refused(f"it divides by {other} with rounding_mode={rounding_mode}")
    return affine(build, input, 1.0 / number(other), 0.0, inplace)


def add(build: Builder, input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Any:
    """A value plus a number, in either order."""
    if isinstance(other, Value) and not inplace:
        input, other = other, input
    if not isinstance(input, Value) or isinstance(other, Value):
        return NotImplemented
    if alpha != 1:
        raise Refused(f"alpha must be 1, got {alpha!r}")
    return affine(build, input, 1.0, number(other), inplace)


def sub(build: Builder, input: Any, other: Any, *, alpha: Any = 1, inplace: bool = False) -> Any:
    """A value minus a number, or a number minus a value."""
    if isinstance(input, Value) == isinstance(other, Value):
        return NotImplemented
    if alpha != 1:
        raise Refused(f"alpha must be 1, got {alpha!r}")
    if isinstance(input, Value):
        return affine(build, input, 1.0, -number(other), inplace)
    return affine(build, other, -1.0, number(input), inplace)


def rsub(build: Builder, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """other - input."""
    return sub(build, other, input, alpha=alpha)


def neg(build: Builder, input: Any, *, inplace: bool = False) -> Value:
    """-x."""
    return affine(build, input, -1.0, 0.0, inplace)


def _inplace(rule: Any) -> Any:
    return partial(rule, inplace=True)


_MODULES: Modules = {nn.GELU: (gelu, ("approximate",))}
_FUNCTIONS: Functions = {
    F.gelu: gelu,
    torch.mul: mul,
    torch.div: div,
    torch.add: add,
    torch.sub: sub,
    torch.rsub: rsub,
    torch.neg: neg,
    torch.neg_: _inplace(neg),
    operator.mul: mul,
    operator.imul: _inplace(mul),
    operator.truediv: div,
    operator.itruediv: _inplace(div),
    operator.add: add,
    operator.iadd: _inplace(add),
    operator.sub: sub,
    operator.isub: _inplace(sub),
    operator.neg: neg,
}
_METHODS: Methods = {"mul": mul, "div": div, "add": add, "sub": sub, "neg": neg}
_METHODS |= {f"{name}_": _inplace(own) for name, own in _METHODS.items()}
for _row in FUNCTIONS.values():
    _modules, _functions, _methods = tables(_row)
    _MODULES |= _modules
    _FUNCTIONS |= _functions
    _METHODS |= _methods


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ...] -> [N, ...]."""
    return function_of(layer).forward(x, *layer.constants)


def kinks(layer: Layer, x: Tensor) -> Tensor:
    """The distance of the nearest element from a kink."""
    found = [(x - kink).abs().min() for kink in function_of(layer).kinks if x.numel()]
    return torch.stack(found).min() if found else x.new_tensor(float("inf"))


def cases() -> Iterator[Case]:
    """Every function between linear layers, and one at the end."""
    for name in ACTIVATIONS:
        yield mlp_case((3, 13, 7, 2), name)
    yield Case("sigmoid_head", lambda: nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()), (3,))


class AfterSum(nn.Module):
    """A function of a sum, in whose kernel it cannot be: a layer of its own."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, ...] and [N, ...] -> [N, ...]."""
        return self.function(a + b)


def _examples() -> Iterator[Example]:
    """Every function with all of its tested constants: after a linear layer, whose kernel may apply
    it; alone; and between two linear layers."""
    for row in FUNCTIONS.values():
        for constants in row.tested:
            label = f"{row.name}{list(constants) if constants else ''}"
            make = partial(Apply, row.forward, *constants)
            yield Example(label, make, ((3, 5),), extra=True)
            more = row.name not in ("relu", "tanh", "gelu")
            yield Example(f"{label} alone", partial(_after_sum, make), ((13,), (13,)), extra=more)
            yield Example(f"{label} between", partial(_before_linear, make), ((7,),))


def _after_sum(make: Callable[[], nn.Module]) -> nn.Module:
    return AfterSum(make())


def _before_linear(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), nn.Linear(7, 4))


KIND = LayerKind(
    name="elementwise",
    family="pointwise",
    forward=forward,
    constants=(0, 2),
    modules=_MODULES,
    functions=_FUNCTIONS,
    methods=_METHODS,
    kinks=kinks,
    examples=tuple(_examples()),
    cases=cases,
)
