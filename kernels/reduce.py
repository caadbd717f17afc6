"""Sums over tasks, [T, P] to [P], in an order that T alone fixes: min(T, 16) contiguous ranges,
each from its first task on, then the ranges in their order. No atomics.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import Recorder, blocks

RANGES = 16
_BLOCK = 512


@jit
@varies("count")
def _sum_rows(
    rows,  # [count, P]
    out,  # [RANGES, P]
    count,
    P,
    RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sums over each of RANGES contiguous ranges of rows; a program makes BLOCK columns
    of one."""
    tiles = tl.cdiv(P, BLOCK)
    r = tl.program_id(0) // tiles
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    begin = r.to(tl.int64) * count // RANGES
    end = (r + 1).to(tl.int64) * count // RANGES
    total = tl.load(rows + begin * P + e, mask=e < P, other=0.0)
    for t in range(begin + 1, end):
        total += tl.load(rows + t * P + e, mask=e < P, other=0.0)
    tl.store(out + r.to(tl.int64) * P + e, total, mask=e < P)


@jit
@varies("T")
def _weighted(
    losses,  # [T]
    weights,  # [T]; or None
    out,  # []
    T,
    BLOCK: tl.constexpr,
):
    """out = the mean of losses times weights, in one program."""
    total = tl.zeros([BLOCK], dtype=losses.dtype.element_ty)
    for t0 in range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        value = tl.load(losses + t, mask=t < T, other=0.0)
        if weights is not None:
            value *= tl.load(weights + t, mask=t < T, other=0.0)
        total += value
    tl.store(out, tl.sum(total, axis=0) / T)


def over_tasks(emit: Recorder, rows: Tensor, ranges: Tensor, out: Tensor) -> None:
    """out [P] = the sum of rows [T, P]; `ranges` [16, P] is scratch memory, not read where T <=
    16."""
    tasks, size = rows.shape
    tiles = blocks(size, _BLOCK)
    if tasks > RANGES:
        emit(
            _sum_rows, RANGES * tiles, rows=rows, out=ranges, count=tasks, P=size, RANGES=RANGES, BLOCK=_BLOCK
        )
        rows, tasks = ranges, RANGES
    emit(_sum_rows, tiles, rows=rows, out=out, count=tasks, P=size, RANGES=1, BLOCK=_BLOCK)


def mean_loss(emit: Recorder, losses: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """out [] = the mean over tasks of losses [T], times weights [T]."""
    emit(_weighted, 1, losses=losses, weights=weights, out=out, T=losses.numel(), BLOCK=128)
