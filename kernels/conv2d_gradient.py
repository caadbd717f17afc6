"""The gradient of conv2d's weight and bias: summed over chunks of rows that the shapes alone fix,
then over chunks."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Node, Pass, Sinks, no_sink
from fastmeta.kernels.tile import deliver, dot
from fastmeta.kernels.tile_choice import FULL, choices, gradient_tile, gradient_warps, sum_step


@triton.jit(do_not_specialize=["M", "CHUNK", "chunks"])
def weight_gradient(
    dy0,  # [T, M, O]
    x0,  # [T, images of H x W, C]
    dy1,
    x1,
    M,
    O,
    H,
    W,
    OH,
    OW,
    CHUNK,
    chunks,
    parts,  # [T, chunks, O * taps * C + O], or None: there is one chunk
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
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """The gradients of a task's weight [O, taps * C] and bias, of one chunk of rows."""
    I: tl.constexpr = KH * KW * C
    tiles_i = tl.cdiv(I, BI)
    tiles = tl.cdiv(O, BO) * tiles_i
    chunk = tl.program_id(0) // tiles % chunks
    task = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BO + tl.arange(0, BO)
    i = tile % tiles_i * BI + tl.arange(0, BI)
    c = i % C
    dh = i // C // KW - PH
    dw = i // C % KW - PW
    images = task * (M // (OH * OW)) * (H * W * C)
    acc = tl.zeros([BO, BI], dtype=dy0.dtype.element_ty)
    sums = tl.zeros([BO], dtype=dy0.dtype.element_ty)
    for m0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M), BM):
        m = m0 + tl.arange(0, BM)
        h = (m // OW % OH * SH)[:, None] + dh[None, :]
        w = (m % OW * SW)[:, None] + dw[None, :]
        here_x = (m < M)[:, None] & (i < I)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at_x = images + ((((m // (OH * OW))[:, None] * H + h) * W + w) * C + c[None, :])
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
        if to is not None:
            deliver(acc, at, inside, task, to, to_task, base, base_task, rate, rate_task)
        if bias_to is not None:
            deliver(
                sums,
                o,
                first,
                task,
                bias_to,
                bias_to_task,
                bias_base,
                bias_base_task,
                bias_rate,
                bias_rate_task,
            )


@triton.jit(do_not_specialize=["begin", "size", "chunks"])
def sum_chunks(
    parts,  # [T, chunks, stride]
    stride,
    begin,
    size,
    chunks,
    to,
    to_task,
    base,
    base_task,
    rate,
    rate_task,
    BLOCK: tl.constexpr,
):
    """One part of the chunks' results, summed in their order, to its sink."""
    tiles = tl.cdiv(size, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=parts.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(parts + (task * chunks + chunk) * stride + begin + e, mask=e < size, other=0.0)
    deliver(total, e, e < size, task, to, to_task, base, base_task, rate, rate_task)


#: Rows of a chunk of the weight's gradient, at least.
CHUNK = 512


def sizes_of(node: Node) -> dict[str, int]:
    """Taps, strides and padding as the kernels take them."""
    kh, kw, sh, sw, ph, pw = map(int, node.constants[:6])
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def gradients(run: Pass, node: Node, pairs: list[tuple[Any, Any]], sinks: Sinks) -> None:
    """The sum of dy^T x over pairs (dy, x) to the weight's sink, the column sums of the first dy to
    the bias's."""
    weight, bias = (None if p is None else sinks[p] for p in node.params)
    if weight is None and bias is None:
        return
    x, y = run.values[node.inputs[0]], run.values[node.output]
    sizes = sizes_of(node)
    rows, o, i = run.rows(node.output), y.cols, sizes["KH"] * sizes["KW"] * x.cols
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
    second = pairs[1] if len(pairs) > 1 else (None, None)
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
        dy1=second[0],
        x1=second[1],
        M=rows,
        O=o,
        H=x.height,
        W=x.width,
        OH=y.height,
        OW=y.width,
        CHUNK=chunk,
        chunks=chunks,
        parts=parts,
        C=x.cols,
        BIAS=bias is not None,
        PRECISION=run.precision,
        BO=tile[0],
        BI=tile[1],
        BM=step,
        **sizes,
        **(weight.arguments() if weight is not None and direct else no_sink()),
        **(bias.arguments("bias_") if bias is not None and direct else no_sink("bias_")),
    )
    for sink, begin, size in ((weight, 0, o * i), (bias, o * i, o)):
        if sink is not None and not direct:
            run.emit(
                sum_chunks,
                run.tasks * blocks(size, FLAT),
                parts=parts,
                stride=o * i + o,
                begin=begin,
                size=size,
                chunks=chunks,
                BLOCK=FLAT,
                **sink.arguments(),
            )
