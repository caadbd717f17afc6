"""Lion, the sign of a running mean: state m."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import BETA1, BETA2, WEIGHT_DECAY, add, number, rest


@jit
def _direction(theta, g, m, row, FORM: tl.constexpr):
    c = number(row, BETA1) * m + rest(row, BETA1) * g
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c)).to(theta.dtype)  # of NaN NaN
    if FORM.weight_decay:
        return sign + number(row, WEIGHT_DECAY) * theta
    else:
        return sign


@jit
def step(theta, g, alpha, m, b, c, row, FORM: tl.constexpr):
    """See `fastmeta.kernels.update_rules`."""
    after = theta - alpha * _direction(theta, g, m, row, FORM)
    return after, number(row, BETA2) * m + rest(row, BETA2) * g, b, c


@jit
def back(
    theta, g, alpha, m, b, c, lam, to_m, to_b, to_c, row, parts, mask, FORM: tl.constexpr
):  # fmt: skip
    """See `fastmeta.kernels.update_rules`."""
    by_rate = -lam * _direction(theta, g, m, row, FORM)
    add(parts, to_m * (m - g), mask, BETA2, FORM)
    v = rest(row, BETA2) * to_m
    to_m = number(row, BETA2) * to_m
    if FORM.weight_decay:
        add(parts, -(alpha * lam * theta), mask, WEIGHT_DECAY, FORM)
        lam -= lam * (alpha * number(row, WEIGHT_DECAY))
    return lam, v, by_rate, to_m, to_b, to_c
