"""conv2d: y = x * W + b for all tasks, an implicit matrix product on channels-last images; no
im2col buffer.

x is [T, N images of H x W, C], W of a task [O, KH, KW, C], b [O], y [T, N images of OH x OW, O].
The sums run over (tap, channel); where the channels fill whole steps, a step lies within one tap.
The weight's gradient: `conv2d_gradient`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.channel_sums import tile_sums
from fastmeta.kernels.conv2d_gradient import gradients
from fastmeta.kernels.elementwise import (
    End,
    Epilogue,
    backward_end,
    finish,
    forward_end,
    tangent_backward_end,
    tangent_end,
)
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.passes import Buffer, Factors, Node, Operand, Pass, Products, Sinks
from fastmeta.kernels.tile import dot
from fastmeta.kernels.tile_choice import choices, product_warps, sum_step, tile_shape
from fastmeta.kernels.windows import Images, image_sizes, window


class Sums(NamedTuple):
    """What the norm after a convolution needs of its output, as one argument of `product`: see
    `channel_sums.tile_sums`."""

    partials: Buffer  # [T, tiles, 3, N], written; None: nothing is
    primal: Buffer  # [T, M, N], of the tangent: the output itself
    center: Buffer  # [T, N], and its mean


_NO_SUMS = Sums(None, None, None)


@jit
@varies("M")
def product(
    x0,  # [T, rows of H x W, C]
    w0: Operand,  # of a task [taps, C, N]: element (tap, c, n) at tap * W_TAP + c * W_C + n * W_N
    x1,  # a second pair, of the same shapes; or None
    w1: Operand,
    bias: Operand,  # of a task [N]; or None
    end: End,  # each [T, M, N]: M rows of OH x OW
    sums: Sums,
    M,
    N,
    size: Images,
    W_TAP,
    W_C,
    W_N,
    C: tl.constexpr,  # channels that are summed over
    WINDOW: tl.constexpr,  # a `Window`
    BACKWARD: tl.constexpr,  # x is the output's gradient, what is made the input's
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """end = finish(x0 * w0 [+ x1 * w1] [+ bias]), the convolution or its transpose: a tile [BM, BN]
    a program, in steps of BK."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = tile // tiles_n * BM + tl.arange(0, BM)
    n = tile % tiles_n * BN + tl.arange(0, BN)
    in_m = m < M
    in_n = (n < N)[None, :]
    image = m // (size.OH * size.OW)
    oh = m // size.OW % size.OH
    ow = m % size.OW
    if BACKWARD:
        oh = oh + WINDOW.PH
        ow = ow + WINDOW.PW
    else:
        oh = oh * WINDOW.SH - WINDOW.PH
        ow = ow * WINDOW.SW - WINDOW.PW
    images = task * (M // (size.OH * size.OW)) * (size.H * size.W * C)
    acc = tl.zeros([BM, BN], dtype=x0.dtype.element_ty)
    for k0 in range(0, WINDOW.KH * WINDOW.KW * C, BK):
        k = k0 + tl.arange(0, BK)
        if C % BK == 0:
            tap = k0 // C
            c = k0 % C + tl.arange(0, BK)
            dh = tap // WINDOW.KW
            dw = tap % WINDOW.KW
            in_k = k >= 0
        else:
            tap = k // C
            c = k % C
            dh = (tap // WINDOW.KW)[None, :]
            dw = (tap % WINDOW.KW)[None, :]
            in_k = k < WINDOW.KH * WINDOW.KW * C
        if BACKWARD:
            h = oh[:, None] - dh
            w = ow[:, None] - dw
            here = in_m[:, None] & (h >= 0) & (w >= 0)
            if WINDOW.SH > 1:
                here = here & (h % WINDOW.SH == 0)
                h = h // WINDOW.SH
            if WINDOW.SW > 1:
                here = here & (w % WINDOW.SW == 0)
                w = w // WINDOW.SW
            here = here & (h < size.H) & (w < size.W)
        else:
            h = oh[:, None] + dh
            w = ow[:, None] + dw
            here = in_m[:, None] & (h >= 0) & (h < size.H) & (w >= 0) & (w < size.W)
        here = here & in_k[None, :]
        at_x = images + (((image[:, None] * size.H + h) * size.W + w) * C + c[None, :])
        at_w = (tap * W_TAP + c * W_C)[:, None] + n[None, :] * W_N
        here_w = in_k[:, None] & in_n
        a = tl.load(x0 + at_x, mask=here, other=0.0)
        b = tl.load(w0.at + task * w0.stride + at_w, mask=here_w, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if x1 is not None:
            a = tl.load(x1 + at_x, mask=here, other=0.0)
            b = tl.load(w1.at + task * w1.stride + at_w, mask=here_w, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias.at + task * bias.stride + n, mask=n < N, other=0.0)[None, :]
    at = task * M * N + m[:, None] * N + n[None, :]
    if sums.partials is not None:
        row = tile // tiles_n
        center = sums.center
        if sums.center is not None:
            center = sums.center + task * N
        to = sums.partials + (task * tl.cdiv(M, BM) + row) * 3 * N
        tile_sums(acc, at, tl.minimum(BM, M - row * BM), in_m, n, N, to, sums.primal, center, BM)
    finish(acc, at, in_m[:, None] & in_n, end, FINISH)


def _product(
    run: Pass,
    node: Node,
    pairs: Products,
    bias: Operand | None,
    epilogue: Epilogue,
    backward: bool,
    sums: Sums = _NO_SUMS,
) -> None:
    """The convolution with the weights of one pair or the sum of two, or its transpose."""
    x, y = run.values[node.inputs[0]], run.values[node.output]
    taps = window(node)
    count = taps.KH * taps.KW
    source, target = (y, x) if backward else (x, y)
    rows, tasks = run.examples * target.rows, run.tasks
    shared = len(pairs) == 1 and pairs[0][1].stride == 0 and (bias is None or bias.stride == 0)
    if shared and sums.partials is None:
        tasks, rows = 1, tasks * rows  # the same weights for all tasks: one large product
    wide = run.wide
    tile = tile_shape(rows, target.cols, tasks, wide)
    warps = product_warps(tile, len(pairs), epilogue.FINISH.function, wide)
    x1, w1 = pairs[1] if len(pairs) > 1 else (None, None)
    strides = (x.cols, count * x.cols, 1) if backward else (x.cols, 1, count * x.cols)

    def programs(bm: int, bn: int) -> int:
        return tasks * blocks(rows, bm) * blocks(target.cols, bn)

    summed = "" if sums.partials is None else "tile"
    run.emit(
        product,
        programs(*tile),
        warps=warps,
        stages=3,
        choices=choices(
            ("BM", "BN"), tile, warps, 3, programs, (rows, target.cols), run.precision, wide, summed
        ),
        work=len(pairs) * tasks * rows * target.cols * count * source.cols,
        x0=pairs[0][0],
        w0=pairs[0][1],
        x1=x1,
        w1=w1,
        bias=bias,
        sums=sums,
        M=rows,
        N=target.cols,
        size=image_sizes(source, target),
        W_TAP=strides[0],
        W_C=strides[1],
        W_N=strides[2],
        C=source.cols,
        WINDOW=taps,
        BACKWARD=backward,
        PRECISION=run.precision,
        BM=tile[0],
        BN=tile[1],
        BK=sum_step(wide),
        **epilogue._asdict(),
    )


def tile_partials(run: Pass, node: Node) -> tuple[Tensor, int]:
    """([T, tiles, 3, C] for the norm after this layer, rows of a tile); good until that norm has
    read it."""
    y, rows = run.values[node.output], run.rows(node.output)
    tile, _ = tile_shape(rows, y.cols, run.tasks, run.wide)
    return run.scratch(f"partials{node.index}", run.tasks * blocks(rows, tile) * 3 * y.cols), tile


def _sums(run: Pass, node: Node, tangent: bool) -> Sums:
    """What the norm after this layer needs."""
    if node.norm is None:
        return _NO_SUMS
    partials, _ = tile_partials(run, node)
    if not tangent:
        return Sums(partials, None, None)
    mean = run.keep(node.norm, "mean", run.tasks, run.values[node.output].cols)
    return Sums(partials, run.x[node.output], mean)


def forward(run: Pass, node: Node) -> None:
    """y = x * W + b."""
    weight, bias = run.weights(run.theta, node)
    pairs: Products = [(run.x[node.inputs[0]], weight)]
    _product(run, node, pairs, bias, forward_end(run, node), False, _sums(run, node, False))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx, the transposed convolution of dy; dW and db."""
    dy = run.d[node.output]
    if sinks is not None:
        gradients(run, node, [(dy, run.x[node.inputs[0]])], sinks)
    if run.wants_delta(node.inputs[0]):
        weight, _ = run.weights(run.theta, node)
        _product(run, node, [(dy, weight)], None, backward_end(run, node), True)


def tangent(run: Pass, node: Node) -> None:
    """ry = x * V + vb [+ rx * W]."""
    v, v_bias = run.weights(run.v, node)
    pairs: Products = [(run.x[node.inputs[0]], v)]
    if run.has_tangent(node.inputs[0]):
        pairs.append((run.rx[node.inputs[0]], run.weights(run.theta, node)[0]))
    _product(run, node, pairs, v_bias, tangent_end(run, node), False, _sums(run, node, True))


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """rdx = the transposed convolutions of rdy with W and of dy with V; R(dW), R(db)."""
    in_, out = node.inputs[0], node.output
    if run.wants_delta(in_):
        (weight, _), (v, _) = run.weights(run.theta, node), run.weights(run.v, node)
        pairs: Products = [(run.rd[out], weight), (run.d[out], v)]
        _product(run, node, pairs, None, tangent_backward_end(run, node), True)
    factors: Factors = [(run.rd[out], run.x[in_])]
    if run.has_tangent(in_):
        factors.append((run.d[out], run.rx[in_]))
    gradients(run, node, factors, sinks)
