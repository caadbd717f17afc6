"""Clipping of one task's gradient: g1 = clamp(g, -value, value), g2 = factor g1 with factor =
min(1, norm / (|g1| + 1e-6)), |g1| over all adapted parameters."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.update_rules.numbers import CLIP_NORM, CLIP_VALUE, number


@jit
def clamped(g, row, FORM: tl.constexpr):
    """g1, of NaN NaN."""
    if FORM.clip_value:
        most = number(row, CLIP_VALUE)
        return tl.where(g > most, most, tl.where(g < -most, -most, g))
    else:
        return g


@jit
def total(parts, task, count, BLOCK: tl.constexpr):
    """The sum of a task's row of parts [T, count]."""
    sums = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        sums += tl.load(parts + task * count + i, mask=i < count, other=0.0)
    return tl.sum(sums, axis=0)


@jit
def factor(norm, row):
    """What g1 is multiplied by, of NaN NaN."""
    found = number(row, CLIP_NORM) / (norm + 1e-6)
    return tl.where(found > 1.0, 1.0, found)


@jit
def along(norm, dot, row):
    """dJ/dfactor dfactor/d|g1| / |g1|, of dot = <dJ/dg2, g1>: what dJ/dg1 has of g1."""
    most = number(row, CLIP_NORM)
    below = norm + 1e-6
    slope = -most / (below * below) * dot
    # at a norm of zero PyTorch's derivative is zero
    slope = tl.where(norm > 0.0, slope / tl.where(norm > 0.0, norm, 1.0), 0.0)
    return tl.where(most / below <= 1.0, slope, 0.0)
