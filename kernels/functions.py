"""The pointwise functions f: their value and first two derivatives, of a block of any shape.

    value   f(scale x + shift)
    first   its first derivative by x (`chained`: something times it)
    second  its second derivative by x, of functions that are not piecewise linear

A new function is a line in each of the three; the rest of what is said of it in Python is its row
in fastmeta/layers/functions.py. F, an `elementwise.Finish`, names the function (`function`) and
holds its constants (`c0`, `c1`, `scale`, `shift`): all known when a kernel is compiled.

The derivatives read s, what was saved: y = f(...) where `elementwise.from_output` says so, x
elsewhere. Where f has a kink they are PyTorch's: relu'(0) = 0.
"""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit


@jit
def _expm1(x):
    # exp(x) - 1 for x <= 0; where that would cancel, the series, exact to float64's last digits
    # below 1/2
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(14):
        series = 1.0 + x * series * (1.0 / (15 - i))
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@jit
def _tanh(x):
    m = _expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, m, -m) / (2.0 + m)


@jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1 as 2 artanh(s), s <= 1/3
    s = x / (2.0 + x)
    q = s * s
    series = tl.zeros_like(x) + 1.0 / 35
    for i in tl.static_range(17):
        series = 1.0 / (33 - 2 * i) + q * series
    return 2.0 * s * series


@jit
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


@jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@jit
def softplus(x):
    """log(1 + exp(x)) without overflow, exact far into the tail."""
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@jit
def _tanh_softplus(x):
    # t = tanh(softplus(x)), and 1 - t t, which does not cancel
    q = tl.exp(-tl.abs(x))
    m = tl.where(x < 0, q * (q + 2.0), 1.0 + 2.0 * q)
    n = m + 2.0 * tl.where(x < 0, 1.0, q * q)
    h = 2.0 * tl.where(x < 0, 1.0, q) * (1.0 + q) / n
    return m / n, h * h


@jit
def _cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))


@jit
def value(x, F: tl.constexpr):
    """f(scale x + shift)."""
    u = x
    if F.scale != 1.0:
        u = F.scale * u
    if F.shift != 0.0:
        u = u + F.shift
    if F.function == "relu":
        y = tl.where(u < 0, 0.0, u)  # NaN stays
    elif F.function == "leaky_relu" or F.function == "leaky_relu_of_x":
        y = tl.where(u > 0, u, F.c0 * u)
    elif F.function == "elu" or F.function == "elu_of_x":
        y = tl.where(u > 0, u, F.c0 * _expm1(tl.minimum(u, 0.0)))
    elif F.function == "gelu":
        y = u * _cdf(u)
    elif F.function == "gelu_tanh":
        y = 0.5 * u * (1.0 + _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u)))
    elif F.function == "silu":
        y = u * sigmoid(u)
    elif F.function == "mish":
        y = u * _tanh_softplus(u)[0]
    elif F.function == "tanh":
        y = _tanh(u)
    elif F.function == "sigmoid":
        y = sigmoid(u)
    elif F.function == "softplus":
        y = tl.where(u * F.c0 > F.c1, u, softplus(u * F.c0) / F.c0)
    elif F.function == "sin":
        y = sine(u, False)
    elif F.function == "affine":
        y = F.c0 * u + F.c1
    else:
        tl.static_assert(False, "value: no such function")
    return y


@jit
def chained(g, s, F: tl.constexpr):
    """g df/dx from what is saved. Where relu is off that is zero, of an infinite or NaN g too, as
    in PyTorch."""
    if F.function == "relu":
        g = tl.where(s <= 0, 0.0, g)
        return g * F.scale if F.scale != 1.0 else g
    else:
        return g * first(s, F)


@jit
def first(s, F: tl.constexpr):
    """df/dx from what is saved, but for relu."""
    if F.function == "leaky_relu":
        d = tl.where(s > 0, 1.0, tl.zeros_like(s) + F.c0)
    elif F.function == "elu":
        d = tl.where(s > 0, 1.0, s + F.c0)
    elif F.function == "tanh":
        d = 1.0 - s * s
    elif F.function == "sigmoid":
        d = s * (1.0 - s)
    elif F.function == "affine":
        d = tl.zeros_like(s) + F.c0
    else:
        u = s * F.scale + F.shift
        if F.function == "leaky_relu_of_x":
            d = tl.where(u > 0, 1.0, tl.zeros_like(u) + F.c0)
        elif F.function == "elu_of_x":
            d = tl.where(u > 0, 1.0, F.c0 * tl.exp(tl.minimum(u, 0.0)))
        elif F.function == "gelu":
            d = _cdf(u) + u * (0.39894228040143267794 * tl.exp(-0.5 * u * u))
        elif F.function == "gelu_tanh":
            t = _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u))
            du = 0.79788456080286535588 * (1.0 + 3 * 0.044715 * u * u)
            d = 0.5 * (1.0 + t + u * (1.0 - t * t) * du)
        elif F.function == "silu":
            p = sigmoid(u)
            d = p * (1.0 + u * (1.0 - p))
        elif F.function == "mish":
            t, r = _tanh_softplus(u)
            d = t + u * r * sigmoid(u)
        elif F.function == "softplus":
            d = tl.where(u * F.c0 > F.c1, 1.0, sigmoid(u * F.c0))
        elif F.function == "sin":
            d = sine(u, True)
        else:
            tl.static_assert(False, "first: no such function")
    if F.scale != 1.0:
        d = d * F.scale
    return d


@jit
def second(s, F: tl.constexpr):
    """d2f/dx2 from what is saved; of functions that are not piecewise linear."""
    if F.function == "elu":
        d = tl.where(s > 0, 0.0, s + F.c0)
    elif F.function == "tanh":
        d = -2.0 * s * (1.0 - s * s)
    elif F.function == "sigmoid":
        d = s * (1.0 - s) * (1.0 - 2.0 * s)
    else:
        u = s * F.scale + F.shift
        if F.function == "elu_of_x":
            d = tl.where(u > 0, 0.0, F.c0 * tl.exp(tl.minimum(u, 0.0)))
        elif F.function == "gelu":
            d = 0.39894228040143267794 * tl.exp(-0.5 * u * u) * (2.0 - u * u)
        elif F.function == "gelu_tanh":
            t = _tanh(0.79788456080286535588 * (u + 0.044715 * u * u * u))
            du = 0.79788456080286535588 * (1.0 + 3 * 0.044715 * u * u)
            ddu = 0.79788456080286535588 * 6 * 0.044715 * u
            d = (1.0 - t * t) * (du + 0.5 * u * (ddu - 2.0 * t * du * du))
        elif F.function == "silu":
            p = sigmoid(u)
            d = p * (1.0 - p) * (2.0 + u * (1.0 - 2.0 * p))
        elif F.function == "mish":
            p = sigmoid(u)
            t, r = _tanh_softplus(u)
            d = 2.0 * r * p + u * r * p * (1.0 - p - 2.0 * t * p)
        elif F.function == "softplus":
            p = sigmoid(u * F.c0)
            d = tl.where(u * F.c0 > F.c1, 0.0, F.c0 * p * (1.0 - p))
        elif F.function == "sin":
            d = -sine(u, False)
        else:
            tl.static_assert(False, "second: no such function")
    if F.scale != 1.0:
        d = d * (F.scale * F.scale)
    return d
