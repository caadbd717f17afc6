"""RMSProp, also centered, with momentum: state s, the mean square; c, the mean, where it is
centered; b, the buffer of momentum, behind them."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import (
    ALPHA,
    EPS,
    EPS_ROOT,
    MOMENTUM,
    add,
    decayed,
    decayed_back,
    number,
    rest,
    root,
)


@jit
def _parts(theta, g, s, c, row, FORM: tl.constexpr):
    """d, s', c', the root, and what d is divided by."""
    d = decayed(theta, g, row, FORM)
    s = number(row, ALPHA) * s + rest(row, ALPHA) * d * d
    square = s
    if FORM.centered:
        c = number(row, ALPHA) * c + rest(row, ALPHA) * d
        square = s - c * c
    r = root(square + number(row, EPS_ROOT)) if FORM.eps_root else root(square)
    return d, s, c, r, r + number(row, EPS)


@jit
def step(theta, g, alpha, s, second, third, row, FORM: tl.constexpr):
    """See `fastmeta.kernels.update_rules`."""
    d, s, mean, _, below = _parts(theta, g, s, second, row, FORM)
    b = d / below
    if FORM.momentum:
        b += number(row, MOMENTUM) * (third if FORM.centered else second)
    theta -= alpha * b
    if FORM.centered:
        return theta, s, mean, b
    else:
        return theta, s, b, third


@jit
def back(
    theta, g, alpha, s, second, third, lam, to_s, to_second, to_third, row, parts, mask, FORM: tl.constexpr
):  # fmt: skip
    """See `fastmeta.kernels.update_rules`."""
    d, _, mean, r, below = _parts(theta, g, s, second, row, FORM)
    u = d / below
    b = u
    to_u = -alpha * lam
    if FORM.momentum:
        mu = number(row, MOMENTUM)
        old = third if FORM.centered else second
        b += mu * old
        to_u += to_third if FORM.centered else to_second
        add(parts, to_u * old, mask, MOMENTUM, FORM)
        if FORM.centered:
            to_third = mu * to_u
        else:
            to_second = mu * to_u
    by_rate = -lam * b
    to_below = -to_u * u / below
    to_square = to_below / (2.0 * r)
    to_s += to_square
    v = to_u / below + 2.0 * rest(row, ALPHA) * d * to_s
    by_alpha = to_s * (s - d * d)
    if FORM.centered:
        to_mean = to_second - 2.0 * mean * to_square
        v += rest(row, ALPHA) * to_mean
        by_alpha += to_mean * (second - d)
        to_second = number(row, ALPHA) * to_mean
    add(parts, to_below, mask, EPS, FORM)
    add(parts, to_square, mask, EPS_ROOT, FORM)
    add(parts, by_alpha, mask, ALPHA, FORM)
    to_s = number(row, ALPHA) * to_s
    lam = decayed_back(theta, lam, v, row, parts, mask, FORM)
    return lam, v, by_rate, to_s, to_second, to_third
