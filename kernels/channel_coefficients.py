"""From the sums of chunks to what each channel's rows are multiplied by, one program for some
groups of a task.

A block [R, C] is what is normalised together: a task's whole batch (batch norm) or an example
(group norm), `per_task` of them a task. Its C channels are G groups of J. The sums of its chunks
are [chunks, 3, C] (`channel_sums`), what is made of them [5, C]: the coefficients of x - mean, dy,
rdy and rx, and the constant. Formulas: docs/norms.md.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.passes import Operand, Target
from fastmeta.kernels.tile import deliver


class Groups(NamedTuple):
    """The channels of a block: C, which are G groups of J."""

    C: int
    G: int
    J: int


@jit
def _chunk_sum(parts, block, which: tl.constexpr, c, mask, chunks, C):
    """The sum over a block's chunks of one of their three sums, for channels c."""
    total = tl.zeros_like(c).to(parts.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(parts + ((block * chunks + chunk) * 3 + which) * C + c, mask=mask, other=0.0)
    return total


@jit
def _channels(groups: Groups, BG: tl.constexpr, BJ: tl.constexpr):
    """(task, channels [BG, BJ], a row for each group; which of them are there)."""
    tiles = tl.cdiv(groups.G, BG)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    g = tl.program_id(0) % tiles * BG + tl.arange(0, BG)[:, None]
    j = tl.arange(0, BJ)[None, :]
    return task, g * groups.J + j, (g < groups.G) & (j < groups.J)


@jit
def _of_group(values, mask):
    """The sum over a group, for each of its channels."""
    return tl.sum(tl.where(mask, values, 0.0), axis=1)[:, None]


@jit
def _read(parameter: Operand, task, c, mask, missing: tl.constexpr):
    """A parameter of the channels, or what stands for one that is absent."""
    if parameter is None:
        return tl.zeros_like(c) + missing
    else:  # said, since Triton compiles what stands after a return as well
        return tl.load(parameter.at + task * parameter.stride + c, mask=mask, other=0.0)


@jit
def _put(coefficients, block, which: tl.constexpr, C, c, mask, value):
    """Write one of a block's five coefficients of channels c."""
    tl.store(coefficients + (block * 5 + which) * C + c, value, mask=mask)


@jit
@varies("per_task", "chunks", "CHUNK", "R")
def forward_coefficients(
    parts,  # [blocks, chunks, 3, C]: means and centred squares; or None
    w: Operand,  # [C]; or None
    b: Operand,  # likewise
    running_mean,  # [C], what is normalised by; or None
    running_var,
    mean,  # [blocks, C], written
    rstd,
    coefficients,  # [blocks, 5, C], written
    per_task,
    chunks,
    CHUNK,  # rows of a chunk
    R,
    groups: Groups,
    EPS: tl.constexpr,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    """Mean, 1 / standard deviation, and the coefficients of y."""
    task, c, mask = _channels(groups, BG, BJ)
    dtype = mean.dtype.element_ty
    weight = tl.cast(_read(w, task, c, mask, 1.0), dtype)
    bias = tl.cast(_read(b, task, c, mask, 0.0), dtype)
    for i in range(per_task):
        block = task * per_task + i
        if running_mean is not None:
            mu = tl.load(running_mean + c, mask=mask, other=0.0)
            var = tl.load(running_var + c, mask=mask, other=1.0)
        else:
            mu = tl.zeros([BG, BJ], dtype)
            squares = tl.zeros([BG, BJ], dtype)
            seen = tl.sum(tl.zeros([BG], dtype), axis=0)
            for chunk in range(chunks):
                at = (block * chunks + chunk) * 3 * groups.C + c
                rows = tl.cast(tl.minimum(CHUNK, R - chunk * CHUNK), dtype)
                d = tl.load(parts + at, mask=mask, other=0.0) - mu
                seen += rows
                mu += d * (rows / seen)
                squares += tl.load(parts + at + groups.C, mask=mask, other=0.0) + d * d * (
                    rows * (1.0 - rows / seen)
                )
            whole = _of_group(mu, mask) / groups.J
            off = mu - whole
            var = _of_group(squares + off * off * R, mask) / (tl.cast(R, dtype) * groups.J)
            mu = whole + mu * 0.0
            var = var + mu * 0.0
        r = 1.0 / tl.sqrt(var + EPS)
        tl.store(mean + block * groups.C + c, mu, mask=mask)
        tl.store(rstd + block * groups.C + c, r, mask=mask)
        _put(coefficients, block, 0, groups.C, c, mask, weight * r)
        _put(coefficients, block, 4, groups.C, c, mask, bias)


@jit
@varies("per_task", "chunks", "R")
def backward_coefficients(
    parts,  # [blocks, chunks, 3, C]: sums of dy and dy (x - mean)
    w: Operand,  # [C]; or None
    rstd,  # [blocks, C]
    sum_dy,  # [blocks, C], written for the tangent
    sum_dy_x,
    coefficients,  # [blocks, 5, C], written
    weight_target: Target,  # [C]
    bias_target: Target,
    per_task,
    chunks,
    R,
    groups: Groups,
    FIXED: tl.constexpr,  # running statistics are what is normalised by
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    """dw, db, and the coefficients of dx."""
    task, c, mask = _channels(groups, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, c, mask, 1.0), dtype)
    dw = tl.zeros([BG, BJ], dtype)
    db = tl.zeros([BG, BJ], dtype)
    for i in range(per_task):
        block = task * per_task + i
        r = tl.load(rstd + block * groups.C + c, mask=mask, other=0.0)
        s = _chunk_sum(parts, block, 0, c, mask, chunks, groups.C)
        s_x = _chunk_sum(parts, block, 1, c, mask, chunks, groups.C)
        tl.store(sum_dy + block * groups.C + c, s, mask=mask)
        tl.store(sum_dy_x + block * groups.C + c, s_x, mask=mask)
        dw += s_x * r
        db += s
        g = tl.zeros([BG, 1], dtype)
        g_x = tl.zeros([BG, 1], dtype)
        if not FIXED:
            values = tl.cast(R, dtype) * groups.J
            g = _of_group(weight * s, mask) / values
            g_x = _of_group(weight * s_x * r, mask) / values
        _put(coefficients, block, 0, groups.C, c, mask, -r * r * g_x)
        _put(coefficients, block, 1, groups.C, c, mask, weight * r)
        _put(coefficients, block, 4, groups.C, c, mask, -r * g)
    if weight_target.to is not None:
        deliver(dw, c, mask, task, weight_target)
    if bias_target.to is not None:
        deliver(db, c, mask, task, bias_target)


@jit
@varies("per_task", "chunks", "R")
def tangent_coefficients(
    parts,  # [blocks, chunks, 3, C]: sums of rx and rx (x - mean); or None: there are none to make
    w: Operand,  # [C]; or None
    vw: Operand,  # likewise, of the tangent
    vb: Operand,
    rstd,  # [blocks, C]
    mean_rx,  # [blocks, C], written
    mean_rx_x,
    coefficients,  # [blocks, 5, C], written
    per_task,
    chunks,
    R,
    groups: Groups,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    """The coefficients of ry."""
    task, c, mask = _channels(groups, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, c, mask, 1.0), dtype)
    v = tl.cast(_read(vw, task, c, mask, 0.0), dtype)
    bias = tl.cast(_read(vb, task, c, mask, 0.0), dtype)
    for i in range(per_task):
        block = task * per_task + i
        r = tl.load(rstd + block * groups.C + c, mask=mask, other=0.0)
        t = tl.zeros([BG, BJ], dtype)
        t_x = tl.zeros([BG, BJ], dtype)
        if parts is not None:
            values = tl.cast(R, dtype) * groups.J
            t += _of_group(_chunk_sum(parts, block, 0, c, mask, chunks, groups.C), mask) / values
            t_x += _of_group(_chunk_sum(parts, block, 1, c, mask, chunks, groups.C) * r, mask) / values
        tl.store(mean_rx + block * groups.C + c, t, mask=mask)
        tl.store(mean_rx_x + block * groups.C + c, t_x, mask=mask)
        _put(coefficients, block, 0, groups.C, c, mask, v * r - weight * r * r * t_x)
        _put(coefficients, block, 3, groups.C, c, mask, weight * r)
        _put(coefficients, block, 4, groups.C, c, mask, bias - weight * r * t)


@jit
@varies("per_task", "chunks", "R")
def tangent_backward_coefficients(
    parts,  # [blocks, chunks, 3, C]: sums of rdy, rdy (x - mean) and dy rx
    w: Operand,  # [C]; or None
    vw: Operand,  # likewise, of the tangent
    rstd,  # [blocks, C]
    sum_dy,
    sum_dy_x,
    mean_rx,  # [blocks, C]; or None: the input does not move
    mean_rx_x,
    coefficients,  # [blocks, 5, C], written
    weight_target: Target,  # [C]
    bias_target: Target,
    per_task,
    chunks,
    R,
    groups: Groups,
    FIXED: tl.constexpr,  # running statistics are what is normalised by
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    """The tangents of dw and db, and the coefficients of that of dx."""
    task, c, mask = _channels(groups, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, c, mask, 1.0), dtype)
    v = tl.cast(_read(vw, task, c, mask, 0.0), dtype)
    dw = tl.zeros([BG, BJ], dtype)
    db = tl.zeros([BG, BJ], dtype)
    for i in range(per_task):
        block = task * per_task + i
        at = block * groups.C + c
        r = tl.load(rstd + at, mask=mask, other=0.0)
        s = tl.load(sum_dy + at, mask=mask, other=0.0)
        s_x = tl.load(sum_dy_x + at, mask=mask, other=0.0)
        t = tl.zeros([BG, BJ], dtype)
        t_x = tl.zeros([BG, BJ], dtype)
        if mean_rx is not None:
            t += tl.load(mean_rx + at, mask=mask, other=0.0)
            t_x += tl.load(mean_rx_x + at, mask=mask, other=0.0)
        rs = _chunk_sum(parts, block, 0, c, mask, chunks, groups.C)
        rs_x = _chunk_sum(parts, block, 1, c, mask, chunks, groups.C)
        dy_rx = r * (_chunk_sum(parts, block, 2, c, mask, chunks, groups.C) - t * s - r * t_x * s_x)
        dw += rs_x * r + dy_rx
        db += rs
        g = tl.zeros([BG, 1], dtype)
        g_x = tl.zeros([BG, 1], dtype)
        u = tl.zeros([BG, 1], dtype)
        u_x = tl.zeros([BG, 1], dtype)
        if not FIXED:
            values = tl.cast(R, dtype) * groups.J
            g = _of_group(weight * s, mask) / values
            g_x = _of_group(weight * s_x * r, mask) / values
            u = _of_group(weight * rs + v * s, mask) / values
            u_x = _of_group(weight * rs_x * r + v * s_x * r + weight * dy_rx, mask) / values
        _put(coefficients, block, 0, groups.C, c, mask, 2.0 * r * r * r * t_x * g_x - r * r * u_x)
        _put(coefficients, block, 1, groups.C, c, mask, r * v - r * r * t_x * weight)
        _put(coefficients, block, 2, groups.C, c, mask, r * weight)
        _put(coefficients, block, 3, groups.C, c, mask, -r * r * g_x)
        _put(coefficients, block, 4, groups.C, c, mask, r * r * (t_x * g + t * g_x) - r * u)
    if weight_target.to is not None:
        deliver(dw, c, mask, task, weight_target)
    if bias_target.to is not None:
        deliver(db, c, mask, task, bias_target)
