"""Rows combined with the coefficients of their channels, and a max-pool on the way.

A block [R, C] is what is normalised together; its coefficients are [5, C]: of x - center, dy, rdy
and rx, and the constant (`channel_coefficients`).
"""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.channel_sums import window_row
from fastmeta.kernels.elementwise import End, finish
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.windows import Images


@jit
def _coefficient(coefficients, block, which: tl.constexpr, C, columns):
    return tl.load(coefficients + (block * 5 + which) * C + columns, mask=columns < C, other=0.0)[None, :]


@jit
@varies("R")
def combine(
    x,  # [blocks, R, C]
    center,  # [blocks, C]
    dy,  # [blocks, R, C], or a row a window; or None
    rdy,  # likewise
    rx,  # [blocks, R, C]; or None
    positions,  # [blocks, windows, C] of a max-pool: then dy and rdy come from the windows; or None
    coefficients,  # [blocks, 5, C]
    end: End,  # each [blocks, R, C]
    R,
    C,
    size: Images,
    POOL: tl.constexpr,  # a `Pool`
    FINISH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """end = finish(constant + the sum of coefficient times row): a tile [BR, BC] a program."""
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
        image = m // (size.H * size.W)
        h = m // size.W % size.H
        w = m % size.W
        oh = h // POOL.height
        ow = w // POOL.width
        window = (image * size.OH + oh) * size.OW + ow
        windows = R // (size.H * size.W) * (size.OH * size.OW)
        source = block * windows * C + window * C + columns[None, :]
        here = mask & (oh < size.OH) & (ow < size.OW)
        chosen = tl.load(positions + source, mask=here, other=-1).to(tl.int32)
        here = here & (chosen == h % POOL.height * POOL.width + w % POOL.width)
    if dy is not None:
        v += _coefficient(coefficients, block, 1, C, columns) * tl.load(dy + source, mask=here, other=0.0)
    if rdy is not None:
        v += _coefficient(coefficients, block, 2, C, columns) * tl.load(rdy + source, mask=here, other=0.0)
    finish(v, at, mask, end, FINISH)


@jit
@varies("R", "IN")
def pooled(
    x,  # [blocks, IN, C]
    center,  # [blocks, C]
    rx,  # [blocks, IN, C]; or None
    positions,  # [blocks, R, C]: written by forward, read by tangent
    coefficients,  # [blocks, 5, C]
    end: End,  # each [blocks, R, C]
    R,  # windows
    IN,
    C,
    size: Images,
    POOL: tl.constexpr,  # a `Pool`
    FINISH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """forward: the largest of each window of the combination of x, and where it is; tangent: the
    combination there."""
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
    if FINISH.mode == "forward":
        best = tl.zeros([BR, BC], x.dtype.element_ty)
        chosen = tl.full([BR, BC], -1, tl.int32)
        for tap in range(POOL.height * POOL.width):
            row = window_row(m, size, POOL, tap)
            v = tl.load(x + block * IN * C + row * C + columns[None, :], mask=mask, other=0.0)
            v = constant + from_x * (v - mean)
            take = (v > best) | (v != v) | (chosen < 0)
            best = tl.where(take, v, best)
            chosen = tl.where(take, tap, chosen)
        tl.store(positions + at, chosen.to(tl.int16), mask=mask)
    else:
        tl.static_assert(FINISH.mode == "tangent", "pooled: no such mode")
        position = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
        row = window_row(m, size, POOL, position)
        source = block * IN * C + row * C + columns[None, :]
        best = constant + from_x * (tl.load(x + source, mask=mask, other=0.0) - mean)
        if rx is not None:
            from_rx = _coefficient(coefficients, block, 3, C, columns)
            best += from_rx * tl.load(rx + source, mask=mask, other=0.0)
    finish(best, at, mask, end, FINISH)
