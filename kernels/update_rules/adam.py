"""Adam, and AdamW, whose weight decay is apart from the gradient: state m, and s, the mean
square."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import (
    BETA1,
    BETA2,
    BY_BETA1,
    BY_BETA2,
    C1,
    C2,
    EPS,
    EPS_ROOT,
    WEIGHT_DECAY,
    add,
    decayed,
    decayed_back,
    number,
    rest,
    root,
)


@jit
def _parts(theta, g, m, s, row, FORM: tl.constexpr):
    """d, m', s', the root, and what m' is divided by."""
    d = g if FORM.kind == "adamw" else decayed(theta, g, row, FORM)
    m = number(row, BETA1) * m + rest(row, BETA1) * d
    s = number(row, BETA2) * s + rest(row, BETA2) * d * d
    square = s / number(row, C2)
    r = root(square + number(row, EPS_ROOT)) if FORM.eps_root else root(square)
    return d, m, s, r, r + number(row, EPS)


@jit
def step(theta, g, alpha, m, s, c, row, FORM: tl.constexpr):
    """See `fastmeta.kernels.update_rules`."""
    _, m, s, _, below = _parts(theta, g, m, s, row, FORM)
    after = theta
    if FORM.kind == "adamw" and FORM.weight_decay:
        after = theta - theta * (alpha * number(row, WEIGHT_DECAY))
    return after - alpha * (1.0 / number(row, C1)) * (m / below), m, s, c


@jit
def back(
    theta, g, alpha, m, s, c, lam, to_m, to_s, to_c, row, parts, mask, FORM: tl.constexpr
):  # fmt: skip
    """See `fastmeta.kernels.update_rules`."""
    d, moved, square, r, below = _parts(theta, g, m, s, row, FORM)
    c1 = number(row, C1)
    c2 = number(row, C2)
    q = moved / below
    to_q = -alpha * (1.0 / c1) * lam
    to_m += to_q / below
    to_below = -to_q * q / below
    to_square = to_below / (2.0 * r)  # of s' / c2
    to_s += to_square * (1.0 / c2)
    v = rest(row, BETA1) * to_m + 2.0 * rest(row, BETA2) * d * to_s
    by_rate = -lam * q * (1.0 / c1)
    by_c1 = alpha * q * lam * (1.0 / (c1 * c1))
    by_c2 = -to_square * square * (1.0 / (c2 * c2))
    add(parts, to_m * (m - d) + by_c1 * number(row, BY_BETA1), mask, BETA1, FORM)
    add(parts, to_s * (s - d * d) + by_c2 * number(row, BY_BETA2), mask, BETA2, FORM)
    add(parts, to_below, mask, EPS, FORM)
    add(parts, to_square, mask, EPS_ROOT, FORM)
    to_m = number(row, BETA1) * to_m
    to_s = number(row, BETA2) * to_s
    if FORM.kind == "adamw":
        if FORM.weight_decay:
            omega = number(row, WEIGHT_DECAY)
            by_rate -= omega * theta * lam
            add(parts, -(alpha * theta * lam), mask, WEIGHT_DECAY, FORM)
            lam -= lam * (alpha * omega)
    else:
        lam = decayed_back(theta, lam, v, row, parts, mask, FORM)
    return lam, v, by_rate, to_m, to_s, to_c
