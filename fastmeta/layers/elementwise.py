"""The layer kind `elementwise`: one function of every element, and scale * x + shift ("affine").

Constants, in order: leaky_relu (slope), elu (alpha), softplus (beta, threshold), affine (scale,
shift).
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value, number


def _function(
    build: Builder, input: Any, function: str, constants: tuple[float, ...] = (), inplace: bool = False
) -> Value:
    shape = input.shape if isinstance(input, Value) else ()
    return build.layer(
        "elementwise", (input,), shape, function=function, constants=constants, inplace=inplace
    )


def plain(build: Builder, input: Any, inplace: bool = False, *, function: str) -> Value:
    """A function without constants."""
    return _function(build, input, function, inplace=inplace)


def leaky_relu(build: Builder, input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Value:
    """x where x > 0, else negative_slope * x."""
    return _function(build, input, "leaky_relu", (number(negative_slope),), inplace)


def elu(build: Builder, input: Any, alpha: Any = 1.0, inplace: bool = False) -> Value:
    """x where x > 0, else alpha * (exp(x) - 1)."""
    return _function(build, input, "elu", (number(alpha),), inplace)


def gelu(build: Builder, input: Any, *, approximate: str = "none") -> Value:
    """x * Phi(x), or its approximation by tanh."""
    if approximate not in ("none", "tanh"):
        raise Refused(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _function(build, input, "gelu" if approximate == "none" else "gelu_tanh")


def softplus(build: Builder, input: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Value:
    """log(1 + exp(beta * x)) / beta, and x where beta * x > threshold."""
    return _function(build, input, "softplus", (number(beta), number(threshold)))


def affine(build: Builder, input: Any, scale: float, shift: float, inplace: bool = False) -> Value:
    """scale * x + shift."""
    return _function(build, input, "affine", (number(scale), number(shift)), inplace)


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


relu, silu, tanh, sigmoid, sin = (
    partial(plain, function=f) for f in ("relu", "silu", "tanh", "sigmoid", "sin")
)

MODULES: Modules = {
    nn.ReLU: (relu, ("inplace",)),
    nn.LeakyReLU: (leaky_relu, ("negative_slope", "inplace")),
    nn.ELU: (elu, ("alpha", "inplace")),
    nn.GELU: (gelu, ("approximate",)),
    nn.SiLU: (silu, ("inplace",)),
    nn.Tanh: (tanh, ()),
    nn.Sigmoid: (sigmoid, ()),
    nn.Softplus: (softplus, ("beta", "threshold")),
}
FUNCTIONS: Functions = {
    F.relu: relu,
    F.leaky_relu: leaky_relu,
    F.leaky_relu_: _inplace(leaky_relu),
    F.elu: elu,
    F.elu_: _inplace(elu),
    F.gelu: gelu,
    F.silu: silu,
    F.softplus: softplus,
    torch.relu: relu,
    torch.relu_: _inplace(relu),
    torch.tanh: tanh,
    torch.tanh_: _inplace(tanh),
    torch.sigmoid: sigmoid,
    torch.sigmoid_: _inplace(sigmoid),
    torch.sin: sin,
    torch.sin_: _inplace(sin),
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
_METHODS: Methods = {"relu": relu, "tanh": tanh, "sigmoid": sigmoid, "sin": sin}
_METHODS |= {"mul": mul, "div": div, "add": add, "sub": sub, "neg": neg}
METHODS: Methods = _METHODS | {f"{name}_": _inplace(rule) for name, rule in _METHODS.items()}
