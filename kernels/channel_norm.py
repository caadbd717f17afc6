"""What batch norm and group norm share: docs/norms.md as sums over rows and linear combinations of rows.

A block is what is normalised together along rows: of batch norm a task's whole batch, of group norm an example. A group
is so many of its channels; of batch norm, one. Sums go over chunks of rows that the shapes alone fix. A small kernel
turns them into coefficients, and one pass combines the rows. A max-pool over windows side by side is done on the way:
what is not pooled is never written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastmeta.kernels.elementwise import finish, forward_end, tangent_end
from fastmeta.kernels.launch import blocks, power
from fastmeta.kernels.linear import FULL
from fastmeta.kernels.passes import Node, Pass, Sinks, no_sink
from fastmeta.kernels.tile import deliver


@triton.jit
def _window_row(m, PH, PW, H, W, KH, KW, position):
    """The row of the input that lies at `position` of the window of pooled row m."""
    image = m // (PH * PW)
    ph = m // PW % PH
    pw = m % PW
    return (image * H + ph * KH + position // KW) * W + pw * KW + position % KW


@triton.jit(do_not_specialize=["R", "CHUNK", "chunks"])
def _statistics(x, parts, R, C, CHUNK, chunks, BR: tl.constexpr, BC: tl.constexpr):
    """Mean and centred squares of each channel of a chunk, by Welford's recurrence over tiles."""
    tiles = tl.cdiv(C, BC)
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)[None, :]
    chunk = tl.program_id(0) // tiles % chunks
    block = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, R)
    mean = tl.zeros([BR, BC], x.dtype.element_ty)
    squares = tl.zeros([BR, BC], x.dtype.element_ty)
    count = tl.zeros([BR, BC], x.dtype.element_ty)
    for m0 in range(begin, end, BR):
        m = m0 + tl.arange(0, BR)[:, None]
        mask = (m < end) & (c < C)
        v = tl.load(x + block * R * C + m * C + c, mask=mask, other=0.0)
        one = tl.where(mask, 1.0, 0.0).to(v.dtype)
        count += one
        d = (v - mean) * one
        mean += d / tl.maximum(count, 1.0)
        squares += d * (v - mean)
    n = tl.maximum(tl.sum(count, axis=0), 1.0)
    mu = tl.sum(count * mean, axis=0) / n
    off = mean - mu[None, :]
    total = tl.sum(squares + count * off * off, axis=0)
    at = (block * chunks + chunk) * 3 * C + tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    inside = tl.program_id(0) % tiles * BC + tl.arange(0, BC) < C
    tl.store(parts + at, mu, mask=inside)
    tl.store(parts + at + C, total, mask=inside)


@triton.jit(do_not_specialize=["R", "IN", "CHUNK", "chunks"])
def _sums(
    a,  # [blocks, R, C], summed as it is and times x - center
    x,
    center,  # [blocks, C]
    b,  # summed times rx
    rx,
    positions,  # of a max-pool: then a and b have one row a window
    parts,  # [blocks, chunks, 3, C]
    R,
    C,
    IN,  # rows of x
    PH,
    PW,
    H,
    W,
    CHUNK,
    chunks,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    tiles = tl.cdiv(C, BC)
    columns = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    c = columns[None, :]
    chunk = tl.program_id(0) // tiles % chunks
    block = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, R)
    mean = tl.load(center + block * C + columns, mask=columns < C, other=0.0)[None, :]
    sum_a = tl.zeros([BR, BC], a.dtype.element_ty)
    sum_x = tl.zeros([BR, BC], a.dtype.element_ty)
    sum_b = tl.zeros([BR, BC], a.dtype.element_ty)
    for m0 in range(begin, end, BR):
        m = m0 + tl.arange(0, BR)[:, None]
        mask = (m < end) & (c < C)
        at = block * R * C + m * C + c
        row = m
        if positions is not None:
            row = _window_row(m, PH, PW, H, W, KH, KW, tl.load(positions + at, mask=mask, other=0).to(tl.int32))
        at_x = block * IN * C + row * C + c
        v = tl.load(a + at, mask=mask, other=0.0)
        sum_a += v
        sum_x += v * tl.where(mask, tl.load(x + at_x, mask=mask, other=0.0) - mean, 0.0)
        if b is not None:
            sum_b += tl.load(b + at, mask=mask, other=0.0) * tl.load(rx + at_x, mask=mask, other=0.0)
    at = (block * chunks + chunk) * 3 * C + columns
    tl.store(parts + at, tl.sum(sum_a, axis=0), mask=columns < C)
    tl.store(parts + at + C, tl.sum(sum_x, axis=0), mask=columns < C)
    tl.store(parts + at + 2 * C, tl.sum(sum_b, axis=0), mask=columns < C)


@triton.jit
def _chunk_sum(parts, block, which: tl.constexpr, c, mask, chunks, C):
    total = tl.zeros_like(c).to(parts.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(parts + ((block * chunks + chunk) * 3 + which) * C + c, mask=mask, other=0.0)
    return total


@triton.jit
def _channels(groups, size, BG: tl.constexpr, BJ: tl.constexpr):
    """(channels [BG, BJ], a row for each group; which of them are there)."""
    g = tl.arange(0, BG)[:, None]
    j = tl.arange(0, BJ)[None, :]
    return g * size + j, (g < groups) & (j < size)


@triton.jit
def _of_group(values, mask):
    """The sum over a group, for each of its channels."""
    return tl.sum(tl.where(mask, values, 0.0), axis=1)[:, None]


@triton.jit
def _read(at, task, stride, c, mask, missing: tl.constexpr):
    """A parameter of the channels, or what stands for one that is absent."""
    if at is None:
        return tl.zeros_like(c) + missing
    return tl.load(at + task * stride + c, mask=mask, other=0.0)


@triton.jit
def _put(coefficients, block, which: tl.constexpr, C, c, mask, value):
    tl.store(coefficients + (block * 5 + which) * C + c, value, mask=mask)


@triton.jit(do_not_specialize=["per_task", "chunks", "R", "CHUNK"])
def _forward_coefficients(
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
    task = tl.program_id(0).to(tl.int64)
    c, mask = _channels(groups, size, BG, BJ)
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
                squares += tl.load(parts + at + C, mask=mask, other=0.0) + d * d * (rows * (1.0 - rows / seen))
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
def _backward_coefficients(
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
    task = tl.program_id(0).to(tl.int64)
    c, mask = _channels(groups, size, BG, BJ)
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
        deliver(db, c, mask, task, bias_to, bias_to_task, bias_base, bias_base_task, bias_rate, bias_rate_task)


@triton.jit(do_not_specialize=["per_task", "chunks", "R"])
def _tangent_coefficients(
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
    task = tl.program_id(0).to(tl.int64)
    c, mask = _channels(groups, size, BG, BJ)
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
def _tangent_backward_coefficients(
    parts,
    w,
    w_task,
    vw,
    vw_task,
    rstd,
    sum_dy,
    sum_dy_x,
    mean_rx,  # nothing where the input does not move
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
    task = tl.program_id(0).to(tl.int64)
    c, mask = _channels(groups, size, BG, BJ)
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
            t = tl.load(mean_rx + at, mask=mask, other=0.0)
            t_x = tl.load(mean_rx_x + at, mask=mask, other=0.0)
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
        deliver(db, c, mask, task, bias_to, bias_to_task, bias_base, bias_base_task, bias_rate, bias_rate_task)


@triton.jit
def _coefficient(coefficients, block, which: tl.constexpr, C, columns):
    return tl.load(coefficients + (block * 5 + which) * C + columns, mask=columns < C, other=0.0)[None, :]


@triton.jit(do_not_specialize=["R"])
def _combine(
    x,
    center,
    dy,
    rdy,
    rx,
    positions,  # of a max-pool: then dy and rdy come from the windows
    coefficients,
    out,
    pre,
    saved,
    curve,
    moved,
    R,
    C,
    PH,
    PW,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """out = finish(constant + the sum of coefficient times row)."""
    tiles_c = tl.cdiv(C, BC)
    tiles = tl.cdiv(R, BR) * tiles_c
    block = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    columns = tile % tiles_c * BC + tl.arange(0, BC)
    m = tile // tiles_c * BR + tl.arange(0, BR)[:, None]
    mask = (m < R) & (columns < C)[None, :]
    at = block * R * C + m * C + columns[None, :]
    mean = tl.load(center + block * C + columns, mask=columns < C, other=0.0)[None, :]
    v = _coefficient(coefficients, block, 4, C, columns)
    v = v + _coefficient(coefficients, block, 0, C, columns) * (tl.load(x + at, mask=mask, other=0.0) - mean)
    if rx is not None:
        v += _coefficient(coefficients, block, 3, C, columns) * tl.load(rx + at, mask=mask, other=0.0)
    here = mask
    source = at
    if positions is not None:
        image = m // (H * W)
        h = m // W % H
        w = m % W
        window = (image * PH + h // KH) * PW + w // KW
        source = block * (R // (H * W)) * (PH * PW) * C + window * C + columns[None, :]
        here = mask & (h // KH < PH) & (w // KW < PW)
        chosen = tl.load(positions + source, mask=here, other=-1).to(tl.int32)
        here = here & (chosen == h % KH * KW + w % KW)
    if dy is not None:
        v += _coefficient(coefficients, block, 1, C, columns) * tl.load(dy + source, mask=here, other=0.0)
    if rdy is not None:
        v += _coefficient(coefficients, block, 2, C, columns) * tl.load(rdy + source, mask=here, other=0.0)
    finish(v, at, mask, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


@triton.jit(do_not_specialize=["R", "IN"])
def _pooled(
    x,
    center,
    rx,
    positions,
    coefficients,
    out,
    pre,
    saved,
    curve,
    moved,
    R,  # rows of the output
    IN,
    C,
    PH,
    PW,
    H,
    W,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """forward: the largest of each window of the combination of x, and where it is; tangent: the combination there."""
    tiles_c = tl.cdiv(C, BC)
    tiles = tl.cdiv(R, BR) * tiles_c
    block = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    columns = tile % tiles_c * BC + tl.arange(0, BC)
    m = tile // tiles_c * BR + tl.arange(0, BR)[:, None]
    mask = (m < R) & (columns < C)[None, :]
    at = block * R * C + m * C + columns[None, :]
    mean = tl.load(center + block * C + columns, mask=columns < C, other=0.0)[None, :]
    from_x = _coefficient(coefficients, block, 0, C, columns)
    constant = _coefficient(coefficients, block, 4, C, columns)
    if MODE == "forward":
        best = tl.zeros([BR, BC], x.dtype.element_ty)
        chosen = tl.full([BR, BC], -1, tl.int32)
        for tap in range(KH * KW):
            row = _window_row(m, PH, PW, H, W, KH, KW, tap)
            v = tl.load(x + block * IN * C + row * C + columns[None, :], mask=mask, other=0.0)
            v = constant + from_x * (v - mean)
            take = (v > best) | (v != v) | (chosen < 0)
            best = tl.where(take, v, best)
            chosen = tl.where(take, tap, chosen)
        tl.store(positions + at, chosen.to(tl.int16), mask=mask)
    else:
        position = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
        row = _window_row(m, PH, PW, H, W, KH, KW, position)
        source = block * IN * C + row * C + columns[None, :]
        best = constant + from_x * (tl.load(x + source, mask=mask, other=0.0) - mean)
        if rx is not None:
            from_rx = _coefficient(coefficients, block, 3, C, columns)
            best += from_rx * tl.load(rx + source, mask=mask, other=0.0)
    finish(best, at, mask, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


#: Tiles of rows and channels.
_BR, _BC = 64, 32
#: Rows of a tile that is summed: more would not fit into registers with all the sums.
_BR_SUMS = 32
#: Rows of a chunk, at least.
_CHUNK = 256


@dataclass(slots=True)
class ChannelNorm:
    """One norm layer in one pass.

    Args:
        per_task: blocks of a task.
        rows: of a block, in the input.
        groups: of a block's channels.
        eps: beside the variance.
    """

    run: Pass
    node: Node
    per_task: int
    rows: int
    groups: int
    eps: float

    @property
    def fixed(self) -> bool:
        """Whether running statistics are what is normalised by."""
        return len(self.node.params) > 2 and self.node.params[2] is not None

    @property
    def cols(self) -> int:
        """Channels."""
        return self.run.values[self.node.inputs[0]].cols

    @property
    def blocks(self) -> int:
        """Of all tasks."""
        return self.run.tasks * self.per_task

    @property
    def out_rows(self) -> int:
        """Rows of a block in the output: windows, where there is a pool."""
        return self.run.rows(self.node.output) // self.per_task

    def forward(self) -> None:
        """y = w x^ + b, pooled."""
        chunk, chunks = self._chunks(self.rows)
        parts = self._parts(chunks)
        if not self.fixed:
            self._by_chunks(_statistics, chunk, chunks, x=self._x, parts=parts, R=self.rows, C=self.cols)
        mean, var = self.node.params[2:4] if self.fixed else (None, None)
        self.run.emit(
            _forward_coefficients,
            self.run.tasks,
            parts=None if self.fixed else parts,
            running_mean=None if mean is None else self.run.theta[mean].at,
            running_var=None if var is None else self.run.theta[var].at,
            chunks=chunks,
            CHUNK=chunk,
            EPS=self.eps,
            coefficients=self._coefficients(),
            **self._parameter("w", self.run.theta, 0),
            **self._parameter("b", self.run.theta, 1),
            **self._state("mean", "rstd"),
            **self._sizes(),
        )
        self._combine(forward_end(self.run, self.node), None, None, None)

    def backward(self, sinks: Sinks | None) -> None:
        """dx = r (g - <g> - x^ <g x^>), dw, db."""
        run, node = self.run, self.node
        if sinks is None and not run.wants_delta(node.inputs[0]):
            return
        dy = run.d[node.output]
        chunks, parts = self._products(dy, None)
        run.emit(
            _backward_coefficients,
            run.tasks,
            parts=parts,
            chunks=chunks,
            coefficients=self._coefficients(),
            FIXED=self.fixed,
            **self._parameter("w", run.theta, 0),
            **self._state("rstd", "sum_dy", "sum_dy_x"),
            **self._sinks(sinks),
            **self._sizes(),
        )
        if run.wants_delta(node.inputs[0]):
            self._combine(self._gradient_end(run.d), dy, None, None)

    def tangent(self) -> None:
        """ry = w rx^ + rw x^ + rb."""
        run, node = self.run, self.node
        rx = self._rx
        parts, chunks = None, 1
        if rx is not None and not self.fixed:
            chunk, chunks = self._chunks(self.rows)
            parts = self._parts(chunks)
            self._column_sums(chunk, chunks, rx, None, parts, self.rows, pooled=False)
        run.emit(
            _tangent_coefficients,
            run.tasks,
            parts=parts,
            chunks=chunks,
            coefficients=self._coefficients(),
            **self._parameter("w", run.theta, 0),
            **self._parameter("vw", run.v, 0),
            **self._parameter("vb", run.v, 1),
            **self._state("rstd", "mean_rx", "mean_rx_x"),
            **self._sizes(),
        )
        self._combine(tangent_end(run, node), None, None, rx)

    def tangent_backward(self, sinks: Sinks) -> None:
        """The tangents of dx, dw and db."""
        run, node = self.run, self.node
        dy, rdy = run.d[node.output], run.rd[node.output]
        moves = self._rx is not None
        chunks, parts = self._products(rdy, dy if moves else None)
        means = self._state("mean_rx", "mean_rx_x") if moves else {"mean_rx": None, "mean_rx_x": None}
        run.emit(
            _tangent_backward_coefficients,
            run.tasks,
            warps=8 if self.cols > 256 else 4,  # or its many sums would not fit into registers
            parts=parts,
            chunks=chunks,
            coefficients=self._coefficients(),
            FIXED=self.fixed,
            **self._parameter("w", run.theta, 0),
            **self._parameter("vw", run.v, 0),
            **means,
            **self._state("rstd", "sum_dy", "sum_dy_x"),
            **self._sinks(sinks),
            **self._sizes(),
        )
        if run.wants_delta(node.inputs[0]):
            self._combine(self._gradient_end(run.rd), dy, rdy, self._rx)

    # ---- launches ---------------------------------------------------------------------------------------------

    def _products(self, a: Any, b: Any) -> tuple[int, Any]:
        """(chunks, the sums over them) of a, a (x - mean) and b rx, all taken where the output is."""
        chunk, chunks = self._chunks(self.out_rows)
        parts = self._parts(chunks)
        self._column_sums(chunk, chunks, a, b, parts, self.out_rows, pooled=self.node.pool is not None)
        return chunks, parts

    def _column_sums(self, chunk: int, chunks: int, a: Any, b: Any, parts: Any, rows: int, pooled: bool) -> None:
        self._by_chunks(
            _sums,
            chunk,
            chunks,
            a=a,
            x=self._x,
            center=self._state("mean")["mean"],
            b=b,
            rx=self._rx if b is not None else None,
            positions=self._positions if pooled else None,
            parts=parts,
            R=rows,
            C=self.cols,
            IN=self.rows,
            **self._windows(),
        )

    def _by_chunks(self, kernel: Any, chunk: int, chunks: int, **arguments: Any) -> None:
        br, bc = self._tile()
        programs = self.blocks * chunks * blocks(self.cols, bc)
        self.run.emit(kernel, programs, CHUNK=chunk, chunks=chunks, BR=min(br, _BR_SUMS), BC=bc, **arguments)

    def _combine(self, end: dict[str, Any], dy: Any, rdy: Any, rx: Any) -> None:
        br, bc = self._tile()
        common = {
            "x": self._x,
            "center": self._state("mean")["mean"],
            "rx": rx,
            "positions": self._positions,
            "coefficients": self._coefficients(),
            "C": self.cols,
            "BR": br,
            "BC": bc,
            **self._windows(),
            **end,
        }
        if self.node.pool is not None and end["MODE"] in ("forward", "tangent"):
            programs = self.blocks * blocks(self.out_rows, br) * blocks(self.cols, bc)
            self.run.emit(_pooled, programs, R=self.out_rows, IN=self.rows, **common)
            return
        programs = self.blocks * blocks(self.rows, br) * blocks(self.cols, bc)
        self.run.emit(_combine, programs, R=self.rows, dy=dy, rdy=rdy, **common)

    # ---- arguments --------------------------------------------------------------------------------------------

    @property
    def _x(self) -> Any:
        return self.run.x[self.node.inputs[0]]

    @property
    def _rx(self) -> Any:
        in_ = self.node.inputs[0]
        return self.run.rx[in_] if self.run.has_tangent(in_) else None

    @property
    def _positions(self) -> Any:
        if self.node.pool is None:
            return None
        return self.run.keep(self.node, "positions", self.blocks, self.out_rows, self.cols, dtype=torch.int16)

    def _gradient_end(self, deltas: list[Any]) -> dict[str, Any]:
        nothing = {"pre": None, "saved": None, "curve": None, "moved": None}
        function = {"F": "", "C0": 0.0, "C1": 0.0, "SCALE": 1.0, "SHIFT": 0.0}
        in_ = self.node.inputs[0]
        return {"out": deltas[in_], "MODE": "backward", "ADD": self.node.adds[0]} | nothing | function

    def _state(self, *names: str) -> dict[str, Any]:
        return {name: self.run.keep(self.node, name, self.blocks, self.cols) for name in names}

    def _coefficients(self) -> Any:
        return self.run.scratch("coefficients", self.blocks * 5 * self.cols)

    def _parts(self, chunks: int) -> Any:
        return self.run.scratch("parts", self.blocks * chunks * 3 * self.cols)

    def _parameter(self, name: str, which: list[Any], at: int) -> dict[str, Any]:
        p = self.node.params[at]
        if p is None:
            return {name: None, f"{name}_task": 0}
        return {name: which[p].at, f"{name}_task": which[p].stride}

    def _sinks(self, sinks: Sinks | None) -> dict[str, Any]:
        weight, bias = (None if sinks is None or p is None else sinks[p] for p in self.node.params[:2])
        return (no_sink() if weight is None else weight.arguments()) | (
            no_sink("bias_") if bias is None else bias.arguments("bias_")
        )

    def _sizes(self) -> dict[str, Any]:
        size = self.cols // self.groups
        return {
            "per_task": self.per_task,
            "R": self.rows,
            "C": self.cols,
            "groups": self.groups,
            "size": size,
            "BG": power(self.groups, 1, 1 << 20),
            "BJ": power(size, 1, 1 << 20),
        }

    def _windows(self) -> dict[str, int]:
        x, y = self.run.values[self.node.inputs[0]], self.run.values[self.node.output]
        kh, kw = self.node.pool or (1, 1)
        return {"PH": y.height, "PW": y.width, "H": x.height, "W": x.width, "KH": kh, "KW": kw}

    def _tile(self) -> tuple[int, int]:
        return power(self.rows, 8, _BR), power(self.cols, 8, _BC)

    def _chunks(self, rows: int) -> tuple[int, int]:
        """(rows of a chunk, how many): enough programs for a large GPU, and chunks that are worth one."""
        programs = self.blocks * blocks(self.cols, _BC)
        count = max(1, min(blocks(2 * FULL, programs), rows // _CHUNK, 16))
        chunk = blocks(blocks(rows, count), _BR) * _BR
        return chunk, blocks(rows, chunk)
