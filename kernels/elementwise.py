"""elementwise: y = f(scale x + shift) and its first two derivatives.

    forward           y   = f(x)
    backward          dx  = dy f'(x),                 curve = dy f''(x)
    tangent           ry  = rx f'(x)
    tangent_backward  rdx = rdy f'(x) + curve rx

Conventions at kinks are PyTorch's: relu'(0) = 0. The derivatives read `saved`, which is y where
`from_output` says so and x elsewhere, so that an epilogue that applies a function of the first sort
need not write x down.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Node, Pass, Sinks

from fastmeta.layers.functions import FUNCTIONS

#: Functions whose second derivative is zero.
PIECEWISE_LINEAR = frozenset(name for name, row in FUNCTIONS.items() if row.piecewise_linear)


def from_output(node: Node) -> bool:
    """Whether the derivatives of an element-wise layer follow from its value."""
    return FUNCTIONS[node.function].told_by_output(node.constants)


@triton.jit
def _expm1(x):
    # exp(x) - 1 for x <= 0; where that would cancel, the series, exact to float64's last digits
    # below 1/2
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(14):
        series = 1.0 + x * series * (1.0 / (15 - i))
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _tanh(x):
    m = _expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, m, -m) / (2.0 + m)


@triton.jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1 as 2 artanh(s), s <= 1/3
    s = x / (2.0 + x)
    q = s * s
    series = tl.zeros_like(x) + 1.0 / 35
    for i in tl.static_range(17):
        series = 1.0 / (33 - 2 * i) + q * series
    return 2.0 * s * series


@triton.jit
def sine(x, COSINE: tl.constexpr):
    """sin(x), or cos(x); of float32 numbers by a reduction in float64 and polynomials (Cephes' sinf
    and cosf).

    libm's reduction of large arguments keeps a table in local memory; this one needs none and is as
    exact.
    """
    if x.dtype == tl.float64:
        if COSINE:
            return tl.cos(x)
        else:
            return tl.sin(x)
    else:
        wide = x.to(tl.float64)
        turns = tl.floor(wide * 0.63661977236758134308 + 0.5)
        r = (wide - turns * 1.57079632679489661923).to(tl.float32)
        if COSINE:
            turns = turns + 1.0
        quadrant = turns - 4.0 * tl.floor(turns * 0.25)  # 0, 1, 2 or 3
        q = r * r
        s = r + r * q * (-1.6666654611e-1 + q * (8.3321608736e-3 - q * 1.9515295891e-4))
        c = (
            1.0
            - 0.5 * q
            + q * q * (4.166664568298827e-2 + q * (-1.388731625493765e-3 + q * 2.443315711809948e-5))
        )
        odd = (quadrant == 1.0) | (quadrant == 3.0)
        found = tl.where(odd, c, s)
        return tl.where(quadrant >= 2.0, -found, found)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow, exact far into the tail."""
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))


@triton.jit
def value(x, F: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """f(scale x + shift)."""
    u = x
    if SCALE != 1.0:
        u = SCALE * u
    if SHIFT != 0.0:
        u = u + SHIFT
    if F == "relu":
        return tl.where(u < 0, 0.0, u)  # NaN stays
    elif F == "leaky_relu" or F == "leaky_relu_of_x":
        return tl.where(u > 0, u, C0 * u)
    elif F == "elu" or F == "elu_of_x":
        return tl.where(u > 0, u, C0 * _expm1(tl.minimum(u, 0.0)))
    elif F == "gelu":
        return u * _cdf(u)
    elif F == "gelu_tanh":
        return 0.5 * u * (1.0 + _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u)))
    elif F == "silu":
        return u * sigmoid(u)
    elif F == "tanh":
        return _tanh(u)
    elif F == "sigmoid":
        return sigmoid(u)
    elif F == "softplus":
        return tl.where(u * C0 > C1, u, softplus(u * C0) / C0)
    elif F == "sin":
        return sine(u, False)
    else:
        tl.static_assert(F == "affine")
        return C0 * u + C1


@triton.jit
def first(s, F: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """df/dx from what is saved."""
    if F == "relu":
        d = tl.where(s > 0, tl.zeros_like(s) + 1.0, 0.0)
    elif F == "leaky_relu":
        d = tl.where(s > 0, 1.0, tl.zeros_like(s) + C0)
    elif F == "elu":
        d = tl.where(s > 0, 1.0, s + C0)
    elif F == "tanh":
        d = 1.0 - s * s
    elif F == "sigmoid":
        d = s * (1.0 - s)
    elif F == "affine":
        d = tl.zeros_like(s) + C0
    else:
        u = s * SCALE + SHIFT
        if F == "leaky_relu_of_x":
            d = tl.where(u > 0, 1.0, tl.zeros_like(u) + C0)
        elif F == "elu_of_x":
            d = tl.where(u > 0, 1.0, C0 * tl.exp(tl.minimum(u, 0.0)))
        elif F == "gelu":
            d = _cdf(u) + u * (0.39894228040143267794 * tl.exp(-0.5 * u * u))
        elif F == "gelu_tanh":
            t = _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u))
            du = 0.79788456080286535588 * (1.0 + 3 * 0.044715 * u * u)
            d = 0.5 * (1.0 + t + u * (1.0 - t * t) * du)
        elif F == "silu":
            p = sigmoid(u)
            d = p * (1.0 + u * (1.0 - p))
        elif F == "softplus":
            d = tl.where(u * C0 > C1, 1.0, sigmoid(u * C0))
        else:
            tl.static_assert(F == "sin")
            d = sine(u, True)
    if SCALE != 1.0:
        d = d * SCALE
    return d


@triton.jit
def second(s, F: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """d2f/dx2 from what is saved; of functions that are not piecewise linear."""
    if F == "elu":
        d = tl.where(s > 0, 0.0, s + C0)
    elif F == "tanh":
        d = -2.0 * s * (1.0 - s * s)
    elif F == "sigmoid":
        d = s * (1.0 - s) * (1.0 - 2.0 * s)
    else:
        u = s * SCALE + SHIFT
        if F == "elu_of_x":
            d = tl.where(u > 0, 0.0, C0 * tl.exp(tl.minimum(u, 0.0)))
        elif F == "gelu":
            d = 0.39894228040143267794 * tl.exp(-0.5 * u * u) * (2.0 - u * u)
        elif F == "gelu_tanh":
            t = _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u))
            du = 0.79788456080286535588 * (1.0 + 3 * 0.044715 * u * u)
            ddu = 0.79788456080286535588 * 6 * 0.044715 * u
            d = (1.0 - t * t) * (du + 0.5 * u * (ddu - 2.0 * t * du * du))
        elif F == "silu":
            p = sigmoid(u)
            d = p * (1.0 - p) * (2.0 + u * (1.0 - 2.0 * p))
        elif F == "softplus":
            p = sigmoid(u * C0)
            d = tl.where(u * C0 > C1, 0.0, C0 * p * (1.0 - p))
        else:
            tl.static_assert(F == "sin")
            d = -sine(u, False)
    if SCALE != 1.0:
        d = d * (SCALE * SCALE)
    return d


@triton.jit
def finish(
    acc,
    at,
    mask,
    out,
    pre,
    saved,
    curve,
    moved,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The end of a kernel that made `acc`: an element-wise layer of it, or nothing (F is ""),
    stored or added to `out`.

    `pre` takes acc itself (of forward: x, of tangent: rx); `moved` is rx in tangent_backward.
    """
    if pre is not None:
        tl.store(pre + at, acc, mask=mask)
    if F != "":
        if MODE == "forward":
            acc = value(acc, F, C0, C1, SCALE, SHIFT)
        else:
            s = tl.load(saved + at, mask=mask, other=0.0)
            if MODE == "backward":
                if curve is not None:
                    tl.store(curve + at, acc * second(s, F, C0, C1, SCALE, SHIFT), mask=mask)
            acc = acc * first(s, F, C0, C1, SCALE, SHIFT)
            if MODE == "tangent_backward":
                if moved is not None:
                    acc += tl.load(curve + at, mask=mask, other=0.0) * tl.load(
                        moved + at, mask=mask, other=0.0
                    )
    if ADD:
        acc += tl.load(out + at, mask=mask, other=0.0)
    tl.store(out + at, acc, mask=mask)


@triton.jit(do_not_specialize=["size"])
def apply(
    source,
    out,
    saved,
    curve,
    moved,
    size,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One element-wise layer as a kernel of its own, over [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    acc = tl.load(source + at, mask=mask, other=0.0)
    finish(acc, at, mask, out, None, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


@triton.jit(do_not_specialize=["size"])
def fill(out, size, BLOCK: tl.constexpr):
    """Zeros."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < size)


def _constants(node: Node | None) -> dict[str, Any]:
    if node is None:
        return {"F": "", "C0": 0.0, "C1": 0.0, "SCALE": 1.0, "SHIFT": 0.0}
    c0, c1 = (*node.constants, 0.0, 0.0)[:2]
    # functions that read their value for some constants have a second form for the others
    sometimes = callable(FUNCTIONS[node.function].from_output)
    function = f"{node.function}_of_x" if sometimes and not from_output(node) else node.function
    return {"F": function, "C0": c0, "C1": c1, "SCALE": node.scale, "SHIFT": node.shift}


def _saved(run: Pass, node: Node) -> Any:
    return run.x[node.output if from_output(node) else node.inputs[0]]


def _smooth(node: Node) -> bool:
    return node.function not in PIECEWISE_LINEAR


def forward_end(run: Pass, node: Node) -> dict[str, Any]:
    """Arguments of `finish` for the layer that makes a value: its own output, or that of the
    function on it."""
    f = node.epilogue
    out = run.x[node.output if f is None else f.output]
    pre = None if f is None else run.x[node.output]
    return {
        "out": out,
        "pre": pre,
        "saved": None,
        "curve": None,
        "moved": None,
        "MODE": "forward",
        "ADD": False,
    } | (_constants(f))


def tangent_end(run: Pass, node: Node) -> dict[str, Any]:
    """The same for the tangent of what a layer makes."""
    f = node.epilogue
    out = run.rx[node.output if f is None else f.output]
    pre = None if f is None else run.rx[node.output]
    saved = None if f is None else _saved(run, f)
    return {
        "out": out,
        "pre": pre,
        "saved": saved,
        "curve": None,
        "moved": None,
        "MODE": "tangent",
        "ADD": False,
    } | (_constants(f))


def backward_end(run: Pass, node: Node, which: int = 0) -> dict[str, Any]:
    """Arguments of `finish` for the layer that makes the gradient of its input: that of the
    function before it, if it goes on to the gradient of that function's argument."""
    f = node.prologues[which]
    common = {"pre": None, "moved": None, "MODE": "backward"}
    if f is None:
        return (
            common
            | {
                "out": run.d[node.inputs[which]],
                "saved": None,
                "curve": None,
                "ADD": node.adds[which],
            }
            | _constants(None)
        )
    curve = run.curve[f.output] if run.second and _smooth(f) else None
    return (
        common
        | {
            "out": run.d[f.inputs[0]],
            "saved": _saved(run, f),
            "curve": curve,
            "ADD": f.adds[0],
        }
        | _constants(f)
    )


def tangent_backward_end(run: Pass, node: Node, which: int = 0) -> dict[str, Any]:
    """The same for the tangent of the gradient."""
    f = node.prologues[which]
    common = {"pre": None, "MODE": "tangent_backward"}
    if f is None:
        return (
            common
            | {
                "out": run.rd[node.inputs[which]],
                "saved": None,
                "curve": None,
                "moved": None,
                "ADD": node.adds[which],
            }
            | _constants(None)
        )
    moved = run.rx[f.inputs[0]] if _smooth(f) and run.has_tangent(f.inputs[0]) else None
    return (
        common
        | {
            "out": run.rd[f.inputs[0]],
            "saved": _saved(run, f),
            "curve": None if moved is None else run.curve[f.output],
            "moved": moved,
            "ADD": f.adds[0],
        }
        | _constants(f)
    )


def _alone(run: Pass, node: Node, source: Any, end: dict[str, Any]) -> None:
    size = run.tasks * run.elements(node.output)
    end = {name: value for name, value in end.items() if name != "pre"}
    run.emit(apply, blocks(size, FLAT), source=source, size=size, BLOCK=FLAT, **end)


def forward(run: Pass, node: Node) -> None:
    """y = f(x), unless the layer before has done it."""
    if node.in_forward:
        return
    end = {
        "out": run.x[node.output],
        "saved": None,
        "curve": None,
        "moved": None,
        "MODE": "forward",
        "ADD": False,
    }
    _alone(run, node, run.x[node.inputs[0]], end | _constants(node))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy f'(x), unless the layer behind has done it."""
    if node.in_backward or not run.wants_delta(node.inputs[0]):
        return
    curve = run.curve[node.output] if run.second and _smooth(node) else None
    end = {"out": run.d[node.inputs[0]], "saved": _saved(run, node), "curve": curve, "moved": None}
    _alone(run, node, run.d[node.output], end | {"MODE": "backward", "ADD": node.adds[0]} | _constants(node))


def tangent(run: Pass, node: Node) -> None:
    """ry = rx f'(x)."""
    if node.in_forward:
        return
    end = {"out": run.rx[node.output], "saved": _saved(run, node), "curve": None, "moved": None}
    _alone(run, node, run.rx[node.inputs[0]], end | {"MODE": "tangent", "ADD": False} | _constants(node))


def tangent_backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """rdx = rdy f'(x) + dy f''(x) rx."""
    if node.in_backward or not run.wants_delta(node.inputs[0]):
        return
    moves = _smooth(node) and run.has_tangent(node.inputs[0])
    end = {
        "out": run.rd[node.inputs[0]],
        "saved": _saved(run, node),
        "curve": run.curve[node.output] if moves else None,
        "moved": run.rx[node.inputs[0]] if moves else None,
    }
    _alone(
        run,
        node,
        run.rd[node.output],
        end | {"MODE": "tangent_backward", "ADD": node.adds[0]} | _constants(node),
    )
