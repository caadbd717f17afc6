"""Rows combined with the coefficients of their channels, and a max-pool on the way."""

from __future__ import annotations

import triton
import triton.language as tl
from fastmeta.kernels.channel_sums import window_row
from fastmeta.kernels.elementwise import finish


@triton.jit
def _coefficient(coefficients, block, which: tl.constexpr, C, columns):
    return tl.load(coefficients + (block * 5 + which) * C + columns, mask=columns < C, other=0.0)[None, :]


@triton.jit(do_not_specialize=["R"])
def combine(
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
def pooled(
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
    if MODE == "forward":
        best = tl.zeros([BR, BC], x.dtype.element_ty)
        chosen = tl.full([BR, BC], -1, tl.int32)
        for tap in range(KH * KW):
            row = window_row(m, PH, PW, H, W, KH, KW, tap)
            v = tl.load(x + block * IN * C + row * C + columns[None, :], mask=mask, other=0.0)
            v = constant + from_x * (v - mean)
            take = (v > best) | (v != v) | (chosen < 0)
            best = tl.where(take, v, best)
            chosen = tl.where(take, tap, chosen)
        tl.store(positions + at, chosen.to(tl.int16), mask=mask)
    else:
        position = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
        row = window_row(m, PH, PW, H, W, KH, KW, position)
        source = block * IN * C + row * C + columns[None, :]
        best = constant + from_x * (tl.load(x + source, mask=mask, other=0.0) - mean)
        if rx is not None:
            from_rx = _coefficient(coefficients, block, 3, C, columns)
            best += from_rx * tl.load(rx + source, mask=mask, other=0.0)
    finish(best, at, mask, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)
