"""Sums over the rows of each channel, chunk by chunk: of statistics and of what a norm's gradients
need.

A block [R, C] is what is normalised together. A chunk's results are [3, C]: mean and centred
squares, or three sums. What a convolution has summed for each of its tiles (`tile_sums`) has the
same form, and `merged` makes chunks of tiles. Chunks follow from shapes alone.
"""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.windows import Images


@jit
def window_row(m, size: Images, POOL: tl.constexpr, position):
    """The row of the input that lies at `position` of the window of pooled row m.

    Args:
        m: a block of any shape, as `position`: rows of OH x OW windows.
        size: of the images.
        POOL: a `Pool`.
        position: from 0 to height * width of a window.
    """
    image = m // (size.OH * size.OW)
    oh = m // size.OW % size.OH
    ow = m % size.OW
    h = oh * POOL.height + position // POOL.width
    return (image * size.H + h) * size.W + ow * POOL.width + position % POOL.width


@jit
def _joined(count, mean, squares):
    """Mean and centred squares [BC] of what the rows [BR, BC] have seen."""
    n = tl.maximum(tl.sum(count, axis=0), 1.0)
    mu = tl.sum(count * mean, axis=0) / n
    off = mean - mu[None, :]
    return mu, tl.sum(squares + count * off * off, axis=0)


@jit
@varies("R", "CHUNK", "chunks")
def statistics(
    x,  # [blocks, R, C]
    parts,  # [blocks, chunks, 3, C], of which two are written
    R,
    C,
    CHUNK,  # rows of a chunk
    chunks,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
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
    mu, total = _joined(count, mean, squares)
    at = (block * chunks + chunk) * 3 * C + tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    inside = tl.program_id(0) % tiles * BC + tl.arange(0, BC) < C
    tl.store(parts + at, mu, mask=inside)
    tl.store(parts + at + C, total, mask=inside)


@jit
@varies("R", "IN", "CHUNK", "chunks")
def sums(
    a,  # [blocks, R, C], summed as it is and times x - center
    x,  # [blocks, IN, C]
    center,  # [blocks, C]
    b,  # [blocks, R, C], summed times rx; or None
    rx,  # [blocks, IN, C]; or None
    positions,  # [blocks, R, C] of a max-pool: then a and b have one row a window; or None
    parts,  # [blocks, chunks, 3, C]
    R,
    C,
    IN,
    size: Images,
    CHUNK,  # rows of a chunk
    chunks,
    POOL: tl.constexpr,  # a `Pool`
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The sums of a, a (x - center) and b rx over the rows of each chunk."""
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
            position = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
            row = window_row(m, size, POOL, position)
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


@jit
def tile_sums(acc, at, rows, in_m, n, N, partials, primal, center, BM: tl.constexpr):
    """What a norm needs of one tile of its input: mean and centred squares; or, with `center`, of
    its tangent: the sum and that of products with primal - center.

    Args:
        acc: [BM, BN], the tile.
        at: [BM, BN], where it is.
        rows: of the tile that are there, `in_m` of [BM].
        n: [BN], its channels.
        partials: [3, N], of this tile.
        primal: as `acc` is written.
        center: [N], of this task.
    """
    inside = n < N
    acc = tl.where(in_m[:, None], acc, 0.0)
    one = tl.sum(acc, axis=0)
    if center is None:
        one = one / rows.to(acc.dtype)
        d = tl.where(in_m[:, None], acc - one[None, :], 0.0)
        two = tl.sum(d * d, axis=0)
    else:
        x = tl.load(primal + at, mask=in_m[:, None] & inside[None, :], other=0.0)
        x = x - tl.load(center + n, mask=inside, other=0.0)[None, :]
        two = tl.sum(acc * x, axis=0)
    tl.store(partials + n, one, mask=inside)
    tl.store(partials + N + n, two, mask=inside)


@jit
@varies("R", "PER", "tiles", "chunks")
def merged(
    partials,  # [blocks, tiles, 3, C]
    parts,  # [blocks, chunks, 3, C]
    R,
    C,
    TILE,  # rows of a tile
    PER,  # tiles of a chunk
    tiles,
    chunks,
    MOMENTS: tl.constexpr,  # means and centred squares; else sums
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Tiles to chunks: every row of [BR, BC] takes one tile in BR, then the rows are joined."""
    columns = tl.cdiv(C, BC)
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)
    chunk = tl.program_id(0) // columns % chunks
    block = (tl.program_id(0) // (columns * chunks)).to(tl.int64)
    end = tl.minimum((chunk + 1) * PER, tiles)
    dtype = partials.dtype.element_ty
    count = tl.zeros([BR, BC], dtype)
    one = tl.zeros([BR, BC], dtype)
    two = tl.zeros([BR, BC], dtype)
    for t0 in range(chunk * PER, end, BR):
        t = t0 + tl.arange(0, BR)[:, None]
        mask = (t < end) & (c < C)[None, :]
        at = (block * tiles + t) * 3 * C + c[None, :]
        first = tl.load(partials + at, mask=mask, other=0.0)
        second = tl.load(partials + at + C, mask=mask, other=0.0)
        if MOMENTS:
            rows = tl.where(mask, tl.minimum(TILE, R - t * TILE), 0).to(dtype)
            share = rows / tl.maximum(count + rows, 1.0)
            d = first - one
            two += second + d * d * count * share
            one += d * share
            count += rows
        else:
            one += first
            two += second
    if MOMENTS:
        first, second = _joined(count, one, two)
    else:
        first = tl.sum(one, axis=0)
        second = tl.sum(two, axis=0)
    to = parts + (block * chunks + chunk) * 3 * C + c
    tl.store(to, first, mask=c < C)
    tl.store(to + C, second, mask=c < C)
