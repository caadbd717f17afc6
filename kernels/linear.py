"""linear: y = x W^T + b on the last dimension, W [O, I], for all tasks in one launch.

One kernel makes both products with W, and their tangents: two pairs of operands in one accumulator,
an element-wise layer in the epilogue. The other makes the gradients of W and b and applies the
inner step to them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.elementwise import (
    backward_end,
    finish,
    forward_end,
    tangent_backward_end,
    tangent_end,
)
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.passes import Node, Operand, Pass, Sinks, no_sink
from fastmeta.kernels.tile import deliver, dot
from fastmeta.kernels.tile_choice import choices, gradient_warps, product_warps, sum_step, tile_shape


@triton.jit(do_not_specialize=["M"])
def product(
    x0,  # [T, M, K]
    w0,  # [T, ...], element (k, n) at k * W_K + n * W_N
    w0_task,
    x1,
    w1,
    w1_task,
    bias,  # [T, N]
    bias_task,
    out,  # [T, M, N], as everything that `finish` takes
    pre,
    saved,
    curve,
    moved,
    M,
    N,
    K,
    W_K,
    W_N,
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
    """out = finish(x0 w0 [+ x1 w1] [+ bias])."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = tile // tiles_n * BM + tl.arange(0, BM)
    n = tile % tiles_n * BN + tl.arange(0, BN)
    in_m = (m < M)[:, None]
    in_n = (n < N)[None, :]
    acc = tl.zeros([BM, BN], dtype=x0.dtype.element_ty)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        in_k = k < K
        at_x = task * M * K + m[:, None] * K + k[None, :]
        at_w = k[:, None] * W_K + n[None, :] * W_N
        here_x = in_m & in_k[None, :]
        here_w = in_k[:, None] & in_n
        a = tl.load(x0 + at_x, mask=here_x, other=0.0)
        b = tl.load(w0 + task * w0_task + at_w, mask=here_w, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if x1 is not None:
            a = tl.load(x1 + at_x, mask=here_x, other=0.0)
            b = tl.load(w1 + task * w1_task + at_w, mask=here_w, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + task * bias_task + n, mask=n < N, other=0.0)[None, :]
    at = task * M * N + m[:, None] * N + n[None, :]
    finish(acc, at, in_m & in_n, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


@triton.jit(do_not_specialize=["M"])
def weight_gradient(
    dy0,  # [T, M, O]
    x0,  # [T, M, I]
    dy1,
    x1,
    M,
    O,
    I,
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
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """dy0^T x0 [+ dy1^T x1] to one sink, the column sums of dy0 to another; see `tile.deliver`."""
    tiles_i = tl.cdiv(I, BI)
    tiles = tl.cdiv(O, BO) * tiles_i
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile // tiles_i * BO + tl.arange(0, BO)
    i = tile % tiles_i * BI + tl.arange(0, BI)
    acc = tl.zeros([BO, BI], dtype=dy0.dtype.element_ty)
    sums = tl.zeros([BO], dtype=dy0.dtype.element_ty)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        at_y = task * M * O + m[None, :] * O + o[:, None]
        at_x = task * M * I + m[:, None] * I + i[None, :]
        here_y = (m < M)[None, :] & (o < O)[:, None]
        here_x = (m < M)[:, None] & (i < I)[None, :]
        a = tl.load(dy0 + at_y, mask=here_y, other=0.0)
        if bias_to is not None:
            sums += tl.sum(a, axis=1)
        if to is not None:
            b = tl.load(x0 + at_x, mask=here_x, other=0.0)
            acc = dot(a, b, acc, PRECISION)
            if dy1 is not None:
                a = tl.load(dy1 + at_y, mask=here_y, other=0.0)
                b = tl.load(x1 + at_x, mask=here_x, other=0.0)
                acc = dot(a, b, acc, PRECISION)
    if to is not None:
        inside = (o < O)[:, None] & (i < I)[None, :]
        deliver(acc, o[:, None] * I + i[None, :], inside, task, to, to_task, base, base_task, rate, rate_task)
    if bias_to is not None:
        deliver(
            sums,
            o,
            o < tl.where(tile % tiles_i == 0, O, 0),
            task,
            bias_to,
            bias_to_task,
            bias_base,
            bias_base_task,
            bias_rate,
            bias_rate_task,
        )


def _product(
    run: Pass,
    rows: int,
    n: int,
    k: int,
    pairs: list[tuple[Any, Operand]],
    strides: tuple[int, int],
    bias: Operand | None,
    end: dict[str, Any],
) -> None:
    tasks = run.tasks
    if len(pairs) == 1 and pairs[0][1].stride == 0 and (bias is None or bias.stride == 0):
        tasks, rows = 1, tasks * rows  # the same weights for all tasks: one large product
    wide = run.wide
    tile = tile_shape(rows, n, tasks, wide)
    warps = product_warps(tile, len(pairs), end["F"], wide)
    second = pairs[1] if len(pairs) > 1 else (None, None)

    def programs(bm: int, bn: int) -> int:
        return tasks * blocks(rows, bm) * blocks(n, bn)

    run.emit(
        product,
        programs(*tile),
        warps=warps,
        stages=3,
        choices=choices(("BM", "BN"), tile, warps, 3, programs, (rows, n), run.precision, wide),
        work=len(pairs) * tasks * rows * n * k,
        x0=pairs[0][0],
        w0=pairs[0][1].at,
        w0_task=pairs[0][1].stride,
        x1=second[0],
        w1=None if second[1] is None else second[1].at,
        w1_task=0 if second[1] is None else second[1].stride,
        bias=None if bias is None else bias.at,
        bias_task=0 if bias is None else bias.stride,
        M=rows,
        N=n,
        K=k,
        W_K=strides[0],
        W_N=strides[1],
        PRECISION=run.precision,
        BM=tile[0],
        BN=tile[1],
        BK=sum_step(wide),
        **end,
    )


def _gradients(run: Pass, node: Node, pairs: list[tuple[Any, Any]], sinks: Sinks) -> None:
    weight, bias = (None if p is None else sinks[p] for p in node.params)
    if weight is None and bias is None:
        return
    rows, o, i = run.rows(node.output), run.values[node.output].cols, run.values[node.inputs[0]].cols
    wide = run.wide
    tile = tile_shape(o, i, run.tasks, wide)
    warps = gradient_warps(tile, run.precision)
    second = pairs[1] if len(pairs) > 1 else (None, None)

    def programs(bo: int, bi: int) -> int:
        return run.tasks * blocks(o, bo) * blocks(i, bi)

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
        I=i,
        PRECISION=run.precision,
        BO=tile[0],
        BI=tile[1],
        BM=sum_step(wide),
        **(no_sink() if weight is None else weight.arguments()),
        **(no_sink("bias_") if bias is None else bias.arguments("bias_")),
    )


def _parameters(run: Pass, node: Node, which: list[Operand]) -> tuple[Operand, Operand | None]:
    weight, bias = node.params
    return which[weight], None if bias is None else which[bias]  # type: ignore[index]


def forward(run: Pass, node: Node) -> None:
    """y = x W^T + b."""
    weight, bias = _parameters(run, node, run.theta)
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    pairs = [(run.x[node.inputs[0]], weight)]
    _product(run, run.rows(node.output), outputs, inputs, pairs, (1, inputs), bias, forward_end(run, node))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy W; dW = dy^T x, db = the column sums of dy."""
    dy = run.d[node.output]
    if sinks is not None:
        _gradients(run, node, [(dy, run.x[node.inputs[0]])], sinks)
    if run.wants_delta(node.inputs[0]):
        _input_gradient(run, node, [(dy, run.theta[node.params[0]])], backward_end(run, node))  # type: ignore[index]


def _input_gradient(run: Pass, node: Node, pairs: list[tuple[Any, Operand]], end: dict[str, Any]) -> None:
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    _product(run, run.rows(node.output), inputs, outputs, pairs, (inputs, 1), None, end)


def tangent(run: Pass, node: Node) -> None:
    """ry = x V^T + vb [+ rx W^T]."""
    v, v_bias = _parameters(run, node, run.v)
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    pairs = [(run.x[node.inputs[0]], v)]
    if run.has_tangent(node.inputs[0]):
        pairs.append((run.rx[node.inputs[0]], _parameters(run, node, run.theta)[0]))
    _product(run, run.rows(node.output), outputs, inputs, pairs, (1, inputs), v_bias, tangent_end(run, node))


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """rdx = rdy W + dy V; R(dW) = rdy^T x [+ dy^T rx], R(db) = the column sums of rdy."""
    in_, out, weight = node.inputs[0], node.output, node.params[0]
    if run.wants_delta(in_):  # first: the weight's gradient may go to where v is read from
        pairs = [(run.rd[out], run.theta[weight]), (run.d[out], run.v[weight])]  # type: ignore[index]
        _input_gradient(run, node, pairs, tangent_backward_end(run, node))
    factors = [(run.rd[out], run.x[in_])]
    if run.has_tangent(in_):
        factors.append((run.d[out], run.rx[in_]))
    _gradients(run, node, factors, sinks)
