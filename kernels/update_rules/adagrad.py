"""Adagrad: state s, the sum of squares."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import (
    EPS,
    EPS_ROOT,
    LR_DECAY,
    STEP,
    add,
    decayed,
    decayed_back,
    number,
    root,
)


@jit
def _parts(theta, g, s, row, FORM: tl.constexpr):
    """d, s', the root, what d is divided by, and what the rate is multiplied by."""
    d = decayed(theta, g, row, FORM)
    s = s + d * d
    r = root(s + number(row, EPS_ROOT)) if FORM.eps_root else root(s)
    slower = 1.0 / (1.0 + number(row, STEP) * number(row, LR_DECAY))
    return d, s, r, r + number(row, EPS), slower


@jit
def step(theta, g, alpha, s, b, c, row, FORM: tl.constexpr):
    """See `fastmeta.kernels.update_rules`."""
    d, s, _, below, slower = _parts(theta, g, s, row, FORM)
    return theta - alpha * slower * (d / below), s, b, c


@jit
def back(
    theta, g, alpha, s, b, c, lam, to_s, to_b, to_c, row, parts, mask, FORM: tl.constexpr
):  # fmt: skip
    """See `fastmeta.kernels.update_rules`."""
    d, _, r, below, slower = _parts(theta, g, s, row, FORM)
    u = d / below
    to_u = -alpha * slower * lam
    to_below = -to_u * u / below
    to_square = to_below / (2.0 * r)
    to_s += to_square
    add(parts, lam * u * alpha * (number(row, STEP) * slower * slower), mask, LR_DECAY, FORM)
    add(parts, to_below, mask, EPS, FORM)
    add(parts, to_square, mask, EPS_ROOT, FORM)
    v = to_u / below + 2.0 * d * to_s
    by_rate = -lam * u * slower
    lam = decayed_back(theta, lam, v, row, parts, mask, FORM)
    return lam, v, by_rate, to_s, to_b, to_c
