"""SGD with momentum, dampening, Nesterov's momentum and weight decay: state m."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import (
    DAMPENING,
    MOMENTUM,
    add,
    decayed,
    decayed_back,
    number,
    rest,
)


@jit
def _buffer(d, m, row, FORM: tl.constexpr):
    if FORM.first:
        return d
    else:
        return number(row, MOMENTUM) * m + rest(row, DAMPENING) * d


@jit
def step(theta, g, alpha, m, b, c, row, FORM: tl.constexpr):
    """See `fastmeta.kernels.update_rules`."""
    d = decayed(theta, g, row, FORM)
    direction = d
    if FORM.momentum:
        m = _buffer(d, m, row, FORM)
        direction = d + number(row, MOMENTUM) * m if FORM.nesterov else m
    return theta - alpha * direction, m, b, c


@jit
def back(
    theta, g, alpha, m, b, c, lam, to_m, to_b, to_c, row, parts, mask, FORM: tl.constexpr
):  # fmt: skip
    """See `fastmeta.kernels.update_rules`."""
    d = decayed(theta, g, row, FORM)
    along = -alpha * lam
    to_d = along
    direction = d
    if FORM.momentum:
        mu = number(row, MOMENTUM)
        moved = _buffer(d, m, row, FORM)
        if FORM.nesterov:
            direction = d + mu * moved
            to_m += mu * along
            by_mu = along * moved
        else:
            direction = moved
            to_m += along
            to_d = tl.zeros_like(along)
            by_mu = to_d
        if FORM.first:
            to_d += to_m
            to_m = tl.zeros_like(along)
        else:
            to_d += rest(row, DAMPENING) * to_m
            by_mu += to_m * m
            add(parts, -(to_m * d), mask, DAMPENING, FORM)
            to_m = mu * to_m
        add(parts, by_mu, mask, MOMENTUM, FORM)
    by_rate = -lam * direction
    lam = decayed_back(theta, lam, to_d, row, parts, mask, FORM)
    return lam, to_d, by_rate, to_m, to_b, to_c
