"""The gradients of conv2d's weight and bias: dW [O, KH, KW, C] and db [O] of a task from dy
[T, M, O] and x [T, N images of H x W, C].

They are summed over chunks of rows that the shapes alone fix, then over chunks.
"""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Factors, Node, Pass, Sinks, Target, target
from fastmeta.kernels.tile import deliver, dot
from fastmeta.kernels.tile_choice import FULL, choices, gradient_tile, gradient_warps, sum_step
from fastmeta.kernels.windows import Images, image_sizes, window


@jit
@varies("M", "CHUNK", "chunks")
def weight_gradient(
    dy0,  # [T, M, O]
    x0,  # [T, images of H x W, C]
    dy1,  # a second pair, of the same shapes; or None
    x1,
    M,
    O,
    size: Images,
    CHUNK,  # rows
    chunks,
    parts,  # [T, chunks, O * I + O]; or None: there is one chunk
    weight: Target,  # [O, I], if there is one chunk
    bias: Target,  # [O], likewise
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # a `Window`
    BIAS: tl.constexpr,  # whether its gradient is wanted
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """weight = dy0^T x0 [+ dy1^T x1] over I = taps * C, bias = the column sums of dy0, of one chunk
    of rows: a tile [BO, BI] a program, in steps of BM rows."""
    I: tl.constexpr = WINDOW.KH * WINDOW.KW * C
    tiles_i = tl.cdiv(I, BI)
    tiles = tl.cdiv(O, BO) * tiles_i
    chunk = tl.program_id(0) // tiles % chunks
    task = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BO + tl.arange(0, BO)
    i = tile % tiles_i * BI + tl.arange(0, BI)
    c = i % C
    dh = i // C // WINDOW.KW - WINDOW.PH
    dw = i // C % WINDOW.KW - WINDOW.PW
    images = task * (M // (size.OH * size.OW)) * (size.H * size.W * C)
    acc = tl.zeros([BO, BI], dtype=dy0.dtype.element_ty)
    sums = tl.zeros([BO], dtype=dy0.dtype.element_ty)
    for m0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M), BM):
        m = m0 + tl.arange(0, BM)
        h = (m // size.OW % size.OH * WINDOW.SH)[:, None] + dh[None, :]
        w = (m % size.OW * WINDOW.SW)[:, None] + dw[None, :]
        here_x = (m < M)[:, None] & (i < I)[None, :] & (h >= 0) & (h < size.H) & (w >= 0) & (w < size.W)
        at_x = images + ((((m // (size.OH * size.OW))[:, None] * size.H + h) * size.W + w) * C + c[None, :])
        at_y = task * M * O + m[None, :] * O + o[:, None]
        here_y = (m < M)[None, :] & (o < O)[:, None]
        a = tl.load(dy0 + at_y, mask=here_y, other=0.0)
        b = tl.load(x0 + at_x, mask=here_x, other=0.0)
        if BIAS:
            sums += tl.sum(a, axis=1)
        acc = dot(a, b, acc, PRECISION)
        if dy1 is not None:
            a = tl.load(dy1 + at_y, mask=here_y, other=0.0)
            b = tl.load(x1 + at_x, mask=here_x, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = o[:, None] * I + i[None, :]
    first = o < tl.where(tile % tiles_i == 0, O, 0)
    if parts is not None:
        part = parts + (task * chunks + chunk) * (O * I + O)
        tl.store(part + at, acc, mask=inside)
        if BIAS:
            tl.store(part + O * I + o, sums, mask=first)
    else:
        if weight.to is not None:
            deliver(acc, at, inside, task, weight)
        if bias.to is not None:
            deliver(sums, o, first, task, bias)


@jit
@varies("begin", "size", "chunks")
def sum_chunks(
    parts,  # [T, chunks, stride]
    stride,
    begin,
    size,
    chunks,
    target: Target,  # [size]
    BLOCK: tl.constexpr,
):
    """target = the sum over chunks, in their order, of the numbers `begin` to `begin + size`."""
    tiles = tl.cdiv(size, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(parts + (task * chunks + chunk) * stride + begin + e, mask=e < size, other=0.0)
    deliver(total, e, e < size, task, target)


#: Rows of a chunk of the weight's gradient, at least.
CHUNK = 512


def gradients(run: Pass, node: Node, pairs: Factors, sinks: Sinks) -> None:
    """The sum of dy^T x over pairs (dy, x) to the weight's sink, the column sums of the first dy to
    the bias's."""
    weight, bias = (None if p is None else sinks[p] for p in node.params)
    if weight is None and bias is None:
        return
    x, y = run.values[node.inputs[0]], run.values[node.output]
    taps = window(node)
    rows, o, i = run.rows(node.output), y.cols, taps.KH * taps.KW * x.cols
    wide = run.wide
    step = sum_step(wide)
    tile = gradient_tile(o, i, wide)
    tiles = blocks(o, tile[0]) * blocks(i, tile[1])
    wanted = max(1, min(blocks(4 * FULL, run.tasks * tiles), rows // CHUNK))
    chunk = blocks(blocks(rows, wanted), step) * step
    chunks = blocks(rows, chunk)
    warps = gradient_warps(tile, run.precision)
    parts = None
    if chunks > 1:
        parts = run.scratch("parts", run.tasks * chunks * (o * i + o))
    dy1, x1 = pairs[1] if len(pairs) > 1 else (None, None)
    direct = chunks == 1

    def programs(bo: int, bi: int) -> int:
        return run.tasks * chunks * blocks(o, bo) * blocks(i, bi)

    summed = "" if bias is None else "rows"
    run.emit(
        weight_gradient,
        programs(*tile),
        warps=warps,
        stages=2,
        choices=choices(("BO", "BI"), tile, warps, 2, programs, (o, i), run.precision, wide, summed),
        work=len(pairs) * run.tasks * rows * o * i,
        dy0=pairs[0][0],
        x0=pairs[0][1],
        dy1=dy1,
        x1=x1,
        parts=parts,
        weight=target(weight if direct else None),
        bias=target(bias if direct else None),
        M=rows,
        CHUNK=chunk,
        chunks=chunks,
        O=o,
        size=image_sizes(x, y),
        C=x.cols,
        WINDOW=taps,
        BIAS=bias is not None,
        PRECISION=run.precision,
        BO=tile[0],
        BI=tile[1],
        BM=step,
    )
    for sink, begin, size in ((weight, 0, o * i), (bias, o * i, o)):
        if sink is not None and not direct:
            run.emit(
                sum_chunks,
                run.tasks * blocks(size, FLAT),
                parts=parts,
                target=sink.target(),
                begin=begin,
                size=size,
                chunks=chunks,
                stride=o * i + o,
                BLOCK=FLAT,
            )
