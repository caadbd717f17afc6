"""conv2d: an implicit matrix product for each task on channels-last images; no im2col buffer.

The weight of a task is [O, kh, kw, C]. The sums run over (tap, channel); where the channels fill
whole steps, a step lies within one tap. The weight's gradient: `conv2d_gradient`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.channel_sums import tile_sums
from fastmeta.kernels.conv2d_gradient import gradients, sizes_of
from fastmeta.kernels.elementwise import (
    backward_end,
    finish,
    forward_end,
    tangent_backward_end,
    tangent_end,
)
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.passes import Node, Operand, Pass, Sinks
from fastmeta.kernels.tile import dot
from fastmeta.kernels.tile_choice import choices, product_warps, sum_step, tile_shape


@triton.jit(do_not_specialize=["M"])
def product(
    x0,  # [T, M pixels of H x W, C]
    w0,
    w0_task,
    x1,
    w1,
    w1_task,
    bias,
    bias_task,
    out,  # [T, M' pixels of OH x OW, N], as everything that `finish` takes
    pre,
    saved,
    curve,
    moved,
    partials,  # [T, tiles, 3, N], for a norm behind: see `channel_sums.tile_sums`; or None
    primal,
    center,  # [T, N]
    M,  # rows of the output
    N,
    H,
    W,
    OH,
    OW,
    W_TAP,  # of the weight: element (tap, c, n) at tap * W_TAP + c * W_C + n * W_N
    W_C,
    W_N,
    C: tl.constexpr,  # channels that are summed over
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BACKWARD: tl.constexpr,  # x is the output's gradient, out the input's
    PRECISION: tl.constexpr,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = finish(x0 * w0 [+ x1 * w1] [+ bias]): the convolution, or its transpose."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = tile // tiles_n * BM + tl.arange(0, BM)
    n = tile % tiles_n * BN + tl.arange(0, BN)
    in_m = m < M
    in_n = (n < N)[None, :]
    image = m // (OH * OW)
    oh = m // OW % OH
    ow = m % OW
    if BACKWARD:
        oh = oh + PH
        ow = ow + PW
    else:
        oh = oh * SH - PH
        ow = ow * SW - PW
    images = task * (M // (OH * OW)) * (H * W * C)
    acc = tl.zeros([BM, BN], dtype=x0.dtype.element_ty)
    for k0 in range(0, KH * KW * C, BK):
        k = k0 + tl.arange(0, BK)
        if C % BK == 0:
            tap = k0 // C
            c = k0 % C + tl.arange(0, BK)
            dh = tap // KW
            dw = tap % KW
            in_k = k >= 0
        else:
            tap = k // C
            c = k % C
            dh = (tap // KW)[None, :]
            dw = (tap % KW)[None, :]
            in_k = k < KH * KW * C
        if BACKWARD:
            h = oh[:, None] - dh
            w = ow[:, None] - dw
            here = in_m[:, None] & (h >= 0) & (w >= 0)
            if SH > 1:
                here = here & (h % SH == 0)
                h = h // SH
            if SW > 1:
                here = here & (w % SW == 0)
                w = w // SW
            here = here & (h < H) & (w < W)
        else:
            h = oh[:, None] + dh
            w = ow[:, None] + dw
            here = in_m[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        here = here & in_k[None, :]
        at_x = images + (((image[:, None] * H + h) * W + w) * C + c[None, :])
        at_w = (tap * W_TAP + c * W_C)[:, None] + n[None, :] * W_N
        here_w = in_k[:, None] & in_n
        a = tl.load(x0 + at_x, mask=here, other=0.0)
        b = tl.load(w0 + task * w0_task + at_w, mask=here_w, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if x1 is not None:
            a = tl.load(x1 + at_x, mask=here, other=0.0)
            b = tl.load(w1 + task * w1_task + at_w, mask=here_w, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + task * bias_task + n, mask=n < N, other=0.0)[None, :]
    at = task * M * N + m[:, None] * N + n[None, :]
    if partials is not None:
        row = tile // tiles_n
        middle = center
        if center is not None:
            middle = center + task * N
        to = partials + (task * tl.cdiv(M, BM) + row) * 3 * N
        tile_sums(acc, at, tl.minimum(BM, M - row * BM), in_m, n, N, to, primal, middle, BM)
    finish(acc, at, in_m[:, None] & in_n, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


def _product(
    run: Pass,
    node: Node,
    pairs: list[tuple[Any, Operand]],
    bias: Operand | None,
    end: dict[str, Any],
    backward: bool,
    sums: dict[str, Any] | None = None,
) -> None:
    x, y = run.values[node.inputs[0]], run.values[node.output]
    sizes = sizes_of(node)
    taps = sizes["KH"] * sizes["KW"]
    source, target = (y, x) if backward else (x, y)
    rows, tasks = run.examples * target.rows, run.tasks
    shared = len(pairs) == 1 and pairs[0][1].stride == 0 and (bias is None or bias.stride == 0)
    if shared and sums is None:
        tasks, rows = 1, tasks * rows  # the same weights for all tasks: one large product
    wide = run.wide
    tile = tile_shape(rows, target.cols, tasks, wide)
    warps = product_warps(tile, len(pairs), end["F"], wide)
    second = pairs[1] if len(pairs) > 1 else (None, None)
    strides = (x.cols, taps * x.cols, 1) if backward else (x.cols, 1, taps * x.cols)

    def programs(bm: int, bn: int) -> int:
        return tasks * blocks(rows, bm) * blocks(target.cols, bn)

    summed = "" if sums is None else "tile"
    run.emit(
        product,
        programs(*tile),
        warps=warps,
        stages=3,
        choices=choices(
            ("BM", "BN"), tile, warps, 3, programs, (rows, target.cols), run.precision, wide, summed
        ),
        work=len(pairs) * tasks * rows * target.cols * taps * source.cols,
        x0=pairs[0][0],
        w0=pairs[0][1].at,
        w0_task=pairs[0][1].stride,
        x1=second[0],
        w1=None if second[1] is None else second[1].at,
        w1_task=0 if second[1] is None else second[1].stride,
        bias=None if bias is None else bias.at,
        bias_task=0 if bias is None else bias.stride,
        M=rows,
        N=target.cols,
        H=source.height,
        W=source.width,
        OH=target.height,
        OW=target.width,
        W_TAP=strides[0],
        W_C=strides[1],
        W_N=strides[2],
        C=source.cols,
        BACKWARD=backward,
        PRECISION=run.precision,
        BM=tile[0],
        BN=tile[1],
        BK=sum_step(wide),
        **sizes,
        **end,
        **(sums or {"partials": None, "primal": None, "center": None}),
    )


def tile_partials(run: Pass, node: Node) -> tuple[Any, int]:
    """([T, tiles, 3, C] for the norm behind, rows of a tile); good until that norm has read it."""
    y, rows = run.values[node.output], run.rows(node.output)
    tile, _ = tile_shape(rows, y.cols, run.tasks, run.wide)
    return run.scratch(f"partials{node.index}", run.tasks * blocks(rows, tile) * 3 * y.cols), tile


def _sums(run: Pass, node: Node, tangent: bool) -> dict[str, Any] | None:
    """Arguments of `product` for what the norm behind needs."""
    if node.norm is None:
        return None
    partials, _ = tile_partials(run, node)
    if not tangent:
        return {"partials": partials, "primal": None, "center": None}
    mean = run.keep(node.norm, "mean", run.tasks, run.values[node.output].cols)
    return {"partials": partials, "primal": run.x[node.output], "center": mean}


def forward(run: Pass, node: Node) -> None:
    """y = x * W + b."""
    weight, bias = node.params
    pairs = [(run.x[node.inputs[0]], run.theta[weight])]  # type: ignore[index]
    bias_at = None if bias is None else run.theta[bias]
    _product(run, node, pairs, bias_at, forward_end(run, node), False, _sums(run, node, False))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx, the transposed convolution of dy; dW and db."""
    dy = run.d[node.output]
    if sinks is not None:
        gradients(run, node, [(dy, run.x[node.inputs[0]])], sinks)
    if run.wants_delta(node.inputs[0]):
        _product(run, node, [(dy, run.theta[node.params[0]])], None, backward_end(run, node), True)  # type: ignore[index]


def tangent(run: Pass, node: Node) -> None:
    """ry = x * V + vb [+ rx * W]."""
    weight, bias = node.params
    pairs = [(run.x[node.inputs[0]], run.v[weight])]  # type: ignore[index]
    if run.has_tangent(node.inputs[0]):
        pairs.append((run.rx[node.inputs[0]], run.theta[weight]))  # type: ignore[index]
    bias_at = None if bias is None else run.v[bias]
    _product(run, node, pairs, bias_at, tangent_end(run, node), False, _sums(run, node, True))


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """rdx = the transposed convolutions of rdy with W and of dy with V; R(dW), R(db)."""
    in_, out, weight = node.inputs[0], node.output, node.params[0]
    if run.wants_delta(in_):
        pairs = [(run.rd[out], run.theta[weight]), (run.d[out], run.v[weight])]  # type: ignore[index]
        _product(run, node, pairs, None, tangent_backward_end(run, node), True)
    factors = [(run.rd[out], run.x[in_])]
    if run.has_tangent(in_):
        factors.append((run.d[out], run.rx[in_]))
    gradients(run, node, factors, sinks)
