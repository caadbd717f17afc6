"""Element-wise operators."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastmeta.trace.builder import Sparse
from fastmeta.trace.ir import Operand, View
from fastmeta.trace.lower import Lowering, lowers, raw
from fastmeta.trace.record import Ref, UntraceableError

#: Operators that are one function of the machine.
_UNARY = {
    "neg": "neg",
    "abs": "abs",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "log1p": "log1p",
    "sqrt": "sqrt",
    "sin": "sin",
    "cos": "cos",
    "erf": "erf",
    "sgn": "sign",
    "sign": "sign",
    "floor": "floor",
    "ceil": "ceil",
    "round": "round",
    "trunc": "trunc",
    "clone": "copy",
    "detach": "copy",
}
_BINARY = {
    "mul": "mul",
    "div": "div",
    "maximum": "max",
    "minimum": "min",
    "atan2": "atan2",
}
_COMPARE = {"lt": "lt", "le": "le", "eq": "eq", "ne": "ne", "gt": "gt", "ge": "ge"}


def _enter_unary(name: str, function: str) -> None:
    @lowers(name)
    def unary(low: Lowering, x: Operand, **_: Any) -> Operand:
        return low.map(function, x)


def _enter_binary(name: str, function: str) -> None:
    @lowers(f"{name}.Tensor", f"{name}.Scalar", name)
    def binary(low: Lowering, a: Operand, b: Operand) -> Operand:
        return low.map(function, a, b)


def _enter_comparison(name: str, function: str) -> None:
    @lowers(f"{name}.Tensor", f"{name}.Scalar")
    def compare(low: Lowering, a: Operand, b: Operand) -> Operand:
        if function == "gt":
            return low.map("lt", b, a)
        if function == "ge":
            return low.map("le", b, a)
        return low.map(function, a, b)


for _name, _function in _UNARY.items():
    _enter_unary(_name, _function)
for _name, _function in _BINARY.items():
    _enter_binary(_name, _function)
for _name, _function in _COMPARE.items():
    _enter_comparison(_name, _function)


@lowers("pow.Tensor_Scalar")
def power(low: Lowering, x: Operand, exponent: float) -> Operand:
    if exponent == 0:
        return low.map("copy", 1.0)
    if exponent == 1:
        return x
    if exponent == 2:
        return low.map("mul", x, x)
    if exponent == 3:
        return low.map("mul", low.map("mul", x, x), x)
    if exponent == 0.5:
        return low.map("sqrt", x)
    if exponent == -1:
        return low.map("div", 1.0, x)
    if exponent == -0.5:
        return low.map("div", 1.0, low.map("sqrt", x))
    return low.map("pow", x, float(exponent))


@lowers("pow.Tensor_Tensor")
def power_of(low: Lowering, x: Operand, exponent: Operand) -> Operand:
    return low.map("pow", x, exponent)


@lowers("pow.Scalar")
def power_of_number(low: Lowering, x: float, exponent: Operand) -> Operand:
    return low.map("pow", float(x), exponent)


#: Integers that wrap around soon.
_NARROW = frozenset({torch.int8, torch.uint8, torch.int16})


@lowers("_to_copy", "copy")
def converted(low: Lowering, x: Operand, *others: Operand, **_: Any) -> Operand:
    """Numbers of every sort are floating-point ones here; those to integers are cut off.

    Raises:
        UntraceableError: to integers that may wrap around.
    """
    source = others[0] if others else x
    out = low.call.outs[0] if low.call is not None else None
    given = next(low.call.refs(), None) if low.call is not None else None
    if out is not None and given is not None and out.dtype != given.dtype:
        if out.dtype == torch.bool:
            return low.map("ne", source, 0.0)
        if out.dtype in _NARROW and given.dtype != torch.bool:
            raise UntraceableError(f"a conversion to {out.dtype} has no lowering")
        if not out.dtype.is_floating_point and given.dtype.is_floating_point:
            return low.map("trunc", source)
    return low.map("copy", source)


@raw
@lowers("add.Tensor", "add.Scalar", "add")
def add(low: Lowering, a: Ref | float, b: Ref | float, alpha: float = 1) -> Operand | Sparse:
    """A sum; pieces that are zero elsewhere are put together when somebody reads them. The sum of
    truth values is whether one is true."""
    if isinstance(a, Ref) and isinstance(b, Ref) and alpha == 1 and a.shape == b.shape:
        first, second = low.sparse(a), low.sparse(b)
        if first and second and not (first.base and second.base):
            return Sparse(first.size, first.pieces + second.pieces, first.base or second.base)
        for sparse, other in ((first, b), (second, a)):
            if sparse is not None and sparse.base is None and low.sparse(other) is None:
                dense = low.operand(other)
                if isinstance(dense, View) and dense.dense:
                    flat = low.build.reshape(dense, (sparse.size,))
                    return Sparse(sparse.size, sparse.pieces, flat)
    left = low.operand(a) if isinstance(a, Ref) else float(a)
    right = low.operand(b) if isinstance(b, Ref) else float(b)
    if low.call is not None and (out := low.call.outs[0]) is not None and out.dtype == torch.bool:
        return low.map("max", left, right)
    if alpha != 1:
        right = right * alpha if isinstance(right, float) else low.build.map("mul", right, float(alpha))
    return low.map("add", left, right)


@lowers("sub.Tensor", "sub.Scalar", "sub")
def subtract(low: Lowering, a: Operand, b: Operand, alpha: float = 1) -> Operand:
    if alpha != 1:
        b = b * alpha if isinstance(b, (int, float)) else low.build.map("mul", b, float(alpha))
    return low.map("sub", a, b)


@lowers("rsub.Scalar", "rsub.Tensor")
def subtract_from(low: Lowering, a: Operand, b: Operand, alpha: float = 1) -> Operand:
    if alpha != 1:
        a = a * alpha if isinstance(a, (int, float)) else low.build.map("mul", a, float(alpha))
    return low.map("sub", b, a)


@lowers("div.Tensor_mode", "div.Scalar_mode", "floor_divide")
def divide(low: Lowering, a: Operand, b: Operand, rounding_mode: str | None = "floor") -> Operand:
    quotient = low.map("div", a, b)
    return quotient if rounding_mode is None else low.map(rounding_mode, quotient)


@lowers("remainder.Tensor", "remainder.Scalar", "fmod.Scalar", "fmod.Tensor")
def remainder(low: Lowering, a: Operand, b: Operand) -> Operand:
    cut = "trunc" if low.call is not None and "fmod" in str(low.call.function) else "floor"
    whole = low.map(cut, low.map("div", a, b))
    return low.map("sub", a, low.map("mul", whole, b))


@lowers("reciprocal")
def reciprocal(low: Lowering, x: Operand) -> Operand:
    return low.map("div", 1.0, x)


@lowers("rsqrt")
def rsqrt(low: Lowering, x: Operand) -> Operand:
    return low.map("div", 1.0, low.map("sqrt", x))


@lowers("exp2")
def exp2(low: Lowering, x: Operand) -> Operand:
    return low.map("exp", low.map("mul", x, math.log(2)))


@lowers("logical_not", "bitwise_not")
def not_(low: Lowering, x: Operand) -> Operand:
    _boolean(low)
    return low.map("eq", x, 0.0)


@lowers("logical_and", "bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor")
def and_(low: Lowering, a: Operand, b: Operand) -> Operand:
    _boolean(low)
    return low.map("mul", a, b)


@lowers("logical_or", "bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor")
def or_(low: Lowering, a: Operand, b: Operand) -> Operand:
    _boolean(low)
    return low.map("max", a, b)


@lowers("logical_xor", "bitwise_xor.Tensor")
def xor(low: Lowering, a: Operand, b: Operand) -> Operand:
    _boolean(low)
    return low.map("ne", a, b)


def _boolean(low: Lowering) -> None:
    if low.call is not None and any(ref.dtype != torch.bool for ref in low.call.refs()):
        raise UntraceableError(f"{low.call.function} of integers has no lowering")


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(low: Lowering, condition: Operand, a: Operand, b: Operand) -> Operand:
    if not isinstance(condition, View):
        return low.map("copy", a if condition else b)
    return low.map("where", condition, a, b)


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(low: Lowering, x: Operand, mask: Operand, number: Operand) -> Operand:
    return where(low, mask, number, x)


@lowers("clamp", "clamp.Tensor", "hardtanh", "clip")
def clamp(low: Lowering, x: Operand, min: Any = None, max: Any = None) -> Operand:
    """NaN stays NaN."""
    if low.call is not None and "hardtanh" in str(low.call.function):
        min, max = (-1.0 if min is None else min), (1.0 if max is None else max)
    if min is not None:
        x = low.map("max", x, min)
    return x if max is None else low.map("min", x, max)


@lowers("clamp_min", "clamp_min.Tensor")
def clamp_min(low: Lowering, x: Operand, min: Operand) -> Operand:
    return low.map("max", x, min)


@lowers("clamp_max", "clamp_max.Tensor")
def clamp_max(low: Lowering, x: Operand, max: Operand) -> Operand:
    return low.map("min", x, max)


@lowers("isnan")
def isnan(low: Lowering, x: Operand) -> Operand:
    return low.map("ne", x, x)


@lowers(
    "full_like",
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "empty_strided",
)
def filled(low: Lowering, x: Operand, *args: Any, **_: Any) -> Operand:
    name = "" if low.call is None else str(low.call.function)
    number = 1.0 if "ones" in name else 0.0
    if "full" in name:
        number = float(args[-1])
    return number


# Derivatives that PyTorch has operators for


@lowers("sigmoid_backward")
def sigmoid_backward(low: Lowering, g: Operand, y: Operand) -> Operand:
    return low.map("mul", g, low.map("mul", y, low.map("sub", 1.0, y)))


@lowers("tanh_backward")
def tanh_backward(low: Lowering, g: Operand, y: Operand) -> Operand:
    return low.map("mul", g, low.map("sub", 1.0, low.map("mul", y, y)))


@lowers("threshold_backward")
def threshold_backward(low: Lowering, g: Operand, x: Operand, threshold: float) -> Operand:
    if threshold == 0:
        return low.map("gate", x, g)
    return low.map("where", low.map("le", x, float(threshold)), 0.0, g)


@lowers("leaky_relu")
def leaky_relu(low: Lowering, x: Operand, slope: float = 0.01) -> Operand:
    return low.map("where", low.map("lt", 0.0, x), x, low.map("mul", x, float(slope)))


@lowers("leaky_relu_backward")
def leaky_relu_backward(low: Lowering, g: Operand, x: Operand, slope: float, _: bool) -> Operand:
    return low.map("where", low.map("lt", 0.0, x), g, low.map("mul", g, float(slope)))


@lowers("silu")
def silu(low: Lowering, x: Operand) -> Operand:
    return low.map("mul", x, low.map("sigmoid", x))


@lowers("silu_backward")
def silu_backward(low: Lowering, g: Operand, x: Operand) -> Operand:
    s = low.map("sigmoid", x)
    inner = low.map("add", 1.0, low.map("mul", x, low.map("sub", 1.0, s)))
    return low.map("mul", g, low.map("mul", s, inner))


@lowers("gelu")
def gelu(low: Lowering, x: Operand, approximate: str = "none") -> Operand:
    if approximate == "tanh":
        return low.map(
            "mul", low.map("mul", 0.5, x), low.map("add", 1.0, low.map("tanh", _tanh_part(low, x)))
        )
    return low.map("mul", x, _normal(low, x))


def _tanh_part(low: Lowering, x: Operand) -> Operand:
    cubic = low.map("mul", low.map("mul", low.map("mul", x, x), x), 0.044715)
    return low.map("mul", math.sqrt(2 / math.pi), low.map("add", x, cubic))


def _normal(low: Lowering, x: Operand) -> Operand:
    return low.map("mul", 0.5, low.map("add", 1.0, low.map("erf", low.map("mul", x, math.sqrt(0.5)))))


@lowers("gelu_backward")
def gelu_backward(low: Lowering, g: Operand, x: Operand, approximate: str = "none") -> Operand:
    if approximate == "tanh":
        t = low.map("tanh", _tanh_part(low, x))
        slope = low.map("add", 1.0, low.map("mul", 3 * 0.044715, low.map("mul", x, x)))
        rise = low.map("mul", math.sqrt(2 / math.pi), slope)
        s = low.map("sub", 1.0, low.map("mul", t, t))
        inner = low.map("mul", low.map("mul", 0.5, x), low.map("mul", s, rise))
        return low.map("mul", g, low.map("add", low.map("mul", 0.5, low.map("add", 1.0, t)), inner))
    density = low.map(
        "mul", 1 / math.sqrt(2 * math.pi), low.map("exp", low.map("mul", -0.5, low.map("mul", x, x)))
    )
    return low.map("mul", g, low.map("add", _normal(low, x), low.map("mul", x, density)))


@lowers("elu")
def elu(low: Lowering, x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Operand:
    below = low.map("mul", float(alpha * scale), low.map("expm1", low.map("mul", x, float(input_scale))))
    return low.map("where", low.map("lt", 0.0, x), low.map("mul", x, float(scale)), below)


@lowers("elu_backward")
def elu_backward(
    low: Lowering, g: Operand, alpha: float, scale: float, input_scale: float, result: bool, x: Operand
) -> Operand:
    if result:
        below = low.map("mul", float(input_scale), low.map("add", x, float(alpha * scale)))
    else:
        rise = low.map("exp", low.map("mul", x, float(input_scale)))
        below = low.map("mul", float(alpha * scale * input_scale), rise)
    slope = low.map("where", low.map("lt", 0.0, x), float(scale), below)
    return low.map("mul", g, slope)


@lowers("softplus")
def softplus(low: Lowering, x: Operand, beta: float = 1, threshold: float = 20) -> Operand:
    scaled = low.map("mul", x, float(beta))
    soft = low.map("div", low.map("log1p", low.map("exp", scaled)), float(beta))
    return low.map("where", low.map("lt", float(threshold), scaled), x, soft)


@lowers("softplus_backward")
def softplus_backward(low: Lowering, g: Operand, x: Operand, beta: float, threshold: float) -> Operand:
    scaled = low.map("mul", x, float(beta))
    soft = low.map("mul", g, low.map("sigmoid", scaled))
    return low.map("where", low.map("lt", float(threshold), scaled), g, soft)
