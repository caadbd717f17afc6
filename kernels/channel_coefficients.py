"""From the sums of chunks to what each channel's rows are multiplied by: docs/norms.md, one program
for some groups of a task.

[blocks, 5, C]: the coefficients of x - mean, dy, rdy and rx, and the constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastmeta.kernels.tile import deliver


@triton.jit
def _chunk_sum(parts, block, which: tl.constexpr, c, mask, chunks, C):
    total = tl.zeros_like(c).to(parts.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(parts + ((block * chunks + chunk) * 3 + which) * C + c, mask=mask, other=0.0)
    return total


@triton.jit
def _channels(groups, size, BG: tl.constexpr, BJ: tl.constexpr):
    """(task, channels [BG, BJ], a row for each group; which of them are there)."""
    tiles = tl.cdiv(groups, BG)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    g = tl.program_id(0) % tiles * BG + tl.arange(0, BG)[:, None]
    j = tl.arange(0, BJ)[None, :]
    return task, g * size + j, (g < groups) & (j < size)


@triton.jit
def _of_group(values, mask):
    """The sum over a group, for each of its channels."""
    return tl.sum(tl.where(mask, values, 0.0), axis=1)[:, None]


@triton.jit
def _read(at, task, stride, c, mask, missing: tl.constexpr):
    """A parameter of the channels, or what stands for one that is absent."""
    if at is None:
        return tl.zeros_like(c) + missing
    else:  # said, since Triton compiles what stands behind a return as well
        return tl.load(at + task * stride + c, mask=mask, other=0.0)


@triton.jit
def _put(coefficients, block, which: tl.constexpr, C, c, mask, value):
    tl.store(coefficients + (block * 5 + which) * C + c, value, mask=mask)


@triton.jit(do_not_specialize=["per_task", "chunks", "R", "CHUNK"])
def forward_coefficients(
    parts,
    w,
    w_task,
    b,
    b_task,
    running_mean,
    running_var,
    mean,
    rstd,
    coefficients,  # [blocks, 5, C]: of x - mean, dy, rdy, rx, and the constant
    per_task,  # blocks of a task
    chunks,
    CHUNK,
    R,
    C,
    groups,
    size,
    EPS: tl.constexpr,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    task, c, mask = _channels(groups, size, BG, BJ)
    dtype = mean.dtype.element_ty
    weight = tl.cast(_read(w, task, w_task, c, mask, 1.0), dtype)
    bias = tl.cast(_read(b, task, b_task, c, mask, 0.0), dtype)
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
                at = (block * chunks + chunk) * 3 * C + c
                rows = tl.cast(tl.minimum(CHUNK, R - chunk * CHUNK), dtype)
                d = tl.load(parts + at, mask=mask, other=0.0) - mu
                seen += rows
                mu += d * (rows / seen)
                squares += tl.load(parts + at + C, mask=mask, other=0.0) + d * d * (
                    rows * (1.0 - rows / seen)
                )
            whole = _of_group(mu, mask) / size
            off = mu - whole
            var = _of_group(squares + off * off * R, mask) / (tl.cast(R, dtype) * size)
            mu = whole + mu * 0.0
            var = var + mu * 0.0
        r = 1.0 / tl.sqrt(var + EPS)
        tl.store(mean + block * C + c, mu, mask=mask)
        tl.store(rstd + block * C + c, r, mask=mask)
        _put(coefficients, block, 0, C, c, mask, weight * r)
        _put(coefficients, block, 4, C, c, mask, bias)


@triton.jit(do_not_specialize=["per_task", "chunks", "R"])
def backward_coefficients(
    parts,
    w,
    w_task,
    rstd,
    sum_dy,  # [blocks, C], kept for the tangent
    sum_dy_x,
    coefficients,
    to,
    to_task,
    base,
    base_task,
    rate,
    rate_task,
    bias_to,
    bias_to_task,
    bias_base,
    bias_base_task,
    bias_rate,
    bias_rate_task,
    per_task,
    chunks,
    R,
    C,
    groups,
    size,
    FIXED: tl.constexpr,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    task, c, mask = _channels(groups, size, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, w_task, c, mask, 1.0), dtype)
    dw = tl.zeros([BG, BJ], dtype)
    db = tl.zeros([BG, BJ], dtype)
    for i in range(per_task):
        block = task * per_task + i
        r = tl.load(rstd + block * C + c, mask=mask, other=0.0)
        s = _chunk_sum(parts, block, 0, c, mask, chunks, C)
        s_x = _chunk_sum(parts, block, 1, c, mask, chunks, C)
        tl.store(sum_dy + block * C + c, s, mask=mask)
        tl.store(sum_dy_x + block * C + c, s_x, mask=mask)
        dw += s_x * r
        db += s
        g = tl.zeros([BG, 1], dtype)
        g_x = tl.zeros([BG, 1], dtype)
        if not FIXED:
            values = tl.cast(R, dtype) * size
            g = _of_group(weight * s, mask) / values
            g_x = _of_group(weight * s_x * r, mask) / values
        _put(coefficients, block, 0, C, c, mask, -r * r * g_x)
        _put(coefficients, block, 1, C, c, mask, weight * r)
        _put(coefficients, block, 4, C, c, mask, -r * g)
    if to is not None:
        deliver(dw, c, mask, task, to, to_task, base, base_task, rate, rate_task)
    if bias_to is not None:
        deliver(
            db, c, mask, task, bias_to, bias_to_task, bias_base, bias_base_task, bias_rate, bias_rate_task
        )


@triton.jit(do_not_specialize=["per_task", "chunks", "R"])
def tangent_coefficients(
    parts,  # None: the input does not move, or the statistics are fixed
    w,
    w_task,
    vw,
    vw_task,
    vb,
    vb_task,
    rstd,
    mean_rx,  # [blocks, C], kept
    mean_rx_x,
    coefficients,
    per_task,
    chunks,
    R,
    C,
    groups,
    size,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    task, c, mask = _channels(groups, size, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, w_task, c, mask, 1.0), dtype)
    v = tl.cast(_read(vw, task, vw_task, c, mask, 0.0), dtype)
    bias = tl.cast(_read(vb, task, vb_task, c, mask, 0.0), dtype)
    for i in range(per_task):
        block = task * per_task + i
        r = tl.load(rstd + block * C + c, mask=mask, other=0.0)
        t = tl.zeros([BG, BJ], dtype)
        t_x = tl.zeros([BG, BJ], dtype)
        if parts is not None:
            values = tl.cast(R, dtype) * size
            t += _of_group(_chunk_sum(parts, block, 0, c, mask, chunks, C), mask) / values
            t_x += _of_group(_chunk_sum(parts, block, 1, c, mask, chunks, C) * r, mask) / values
        tl.store(mean_rx + block * C + c, t, mask=mask)
        tl.store(mean_rx_x + block * C + c, t_x, mask=mask)
        _put(coefficients, block, 0, C, c, mask, v * r - weight * r * r * t_x)
        _put(coefficients, block, 3, C, c, mask, weight * r)
        _put(coefficients, block, 4, C, c, mask, bias - weight * r * t)


@triton.jit(do_not_specialize=["per_task", "chunks", "R"])
def tangent_backward_coefficients(
    parts,
    w,
    w_task,
    vw,
    vw_task,
    rstd,
    sum_dy,
    sum_dy_x,
    mean_rx,  # None: the input does not move
    mean_rx_x,
    coefficients,
    to,
    to_task,
    base,
    base_task,
    rate,
    rate_task,
    bias_to,
    bias_to_task,
    bias_base,
    bias_base_task,
    bias_rate,
    bias_rate_task,
    per_task,
    chunks,
    R,
    C,
    groups,
    size,
    FIXED: tl.constexpr,
    BG: tl.constexpr,
    BJ: tl.constexpr,
):
    task, c, mask = _channels(groups, size, BG, BJ)
    dtype = rstd.dtype.element_ty
    weight = tl.cast(_read(w, task, w_task, c, mask, 1.0), dtype)
    v = tl.cast(_read(vw, task, vw_task, c, mask, 0.0), dtype)
    dw = tl.zeros([BG, BJ], dtype)
    db = tl.zeros([BG, BJ], dtype)
    for i in range(per_task):
        block = task * per_task + i
        at = block * C + c
        r = tl.load(rstd + at, mask=mask, other=0.0)
        s = tl.load(sum_dy + at, mask=mask, other=0.0)
        s_x = tl.load(sum_dy_x + at, mask=mask, other=0.0)
        t = tl.zeros([BG, BJ], dtype)
        t_x = tl.zeros([BG, BJ], dtype)
        if mean_rx is not None:
            t += tl.load(mean_rx + at, mask=mask, other=0.0)
            t_x += tl.load(mean_rx_x + at, mask=mask, other=0.0)
        rs = _chunk_sum(parts, block, 0, c, mask, chunks, C)
        rs_x = _chunk_sum(parts, block, 1, c, mask, chunks, C)
        dy_rx = r * (_chunk_sum(parts, block, 2, c, mask, chunks, C) - t * s - r * t_x * s_x)
        dw += rs_x * r + dy_rx
        db += rs
        g = tl.zeros([BG, 1], dtype)
        g_x = tl.zeros([BG, 1], dtype)
        u = tl.zeros([BG, 1], dtype)
        u_x = tl.zeros([BG, 1], dtype)
        if not FIXED:
            values = tl.cast(R, dtype) * size
            g = _of_group(weight * s, mask) / values
            g_x = _of_group(weight * s_x * r, mask) / values
            u = _of_group(weight * rs + v * s, mask) / values
            u_x = _of_group(weight * rs_x * r + v * s_x * r + weight * dy_rx, mask) / values
        _put(coefficients, block, 0, C, c, mask, 2.0 * r * r * r * t_x * g_x - r * r * u_x)
        _put(coefficients, block, 1, C, c, mask, r * v - r * r * t_x * weight)
        _put(coefficients, block, 2, C, c, mask, r * weight)
        _put(coefficients, block, 3, C, c, mask, -r * r * g_x)
        _put(coefficients, block, 4, C, c, mask, r * r * (t_x * g + t * g_x) - r * u)
    if to is not None:
        deliver(dw, c, mask, task, to, to_task, base, base_task, rate, rate_task)
    if bias_to is not None:
        deliver(
            db, c, mask, task, bias_to, bias_to_task, bias_base, bias_base_task, bias_rate, bias_rate_task
        )
