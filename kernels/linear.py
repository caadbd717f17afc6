"""linear: y = x W^T + b on the last dimension, for all tasks in one launch.

x is [T, M, I], W of a task [O, I], b [O], y [T, M, O]; M counts the rows of all examples of a task.
One kernel makes both products with W, and their tangents: two pairs of operands in one accumulator,
an element-wise layer in the epilogue. The other makes the gradients of W and b and applies the
inner step to them.
"""

from __future__ import annotations

import triton.language as tl

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
from fastmeta.kernels.passes import Factors, Node, Operand, Pass, Products, Sinks, Target, target
from fastmeta.kernels.tile import deliver, dot
from fastmeta.kernels.tile_choice import choices, gradient_warps, product_warps, sum_step, tile_shape


@jit
@varies("M")
def product(
    x0,  # [T, M, K]
    w0: Operand,  # of a task [K, N]: element (k, n) at k * W_K + n * W_N
    x1,  # a second pair, of the same shapes; or None
    w1: Operand,
    bias: Operand,  # of a task [N]; or None
    end: End,  # each [T, M, N]
    M,
    N,
    K,
    W_K,
    W_N,
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """end = finish(x0 w0 [+ x1 w1] [+ bias]): a tile [BM, BN] a program, in steps of BK."""
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
        b = tl.load(w0.at + task * w0.stride + at_w, mask=here_w, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if x1 is not None:
            a = tl.load(x1 + at_x, mask=here_x, other=0.0)
            b = tl.load(w1.at + task * w1.stride + at_w, mask=here_w, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias.at + task * bias.stride + n, mask=n < N, other=0.0)[None, :]
    at = task * M * N + m[:, None] * N + n[None, :]
    finish(acc, at, in_m & in_n, end, FINISH)


@jit
@varies("M")
def weight_gradient(
    dy0,  # [T, M, O]
    x0,  # [T, M, I]
    dy1,  # a second pair, of the same shapes; or None
    x1,
    M,
    O,
    I,
    weight: Target,  # [O, I]
    bias: Target,  # [O]
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """weight = dy0^T x0 [+ dy1^T x1], bias = the column sums of dy0: a tile [BO, BI] of a task a
    program, in steps of BM rows."""
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
        if bias.to is not None:
            sums += tl.sum(a, axis=1)
        if weight.to is not None:
            b = tl.load(x0 + at_x, mask=here_x, other=0.0)
            acc = dot(a, b, acc, PRECISION)
            if dy1 is not None:
                a = tl.load(dy1 + at_y, mask=here_y, other=0.0)
                b = tl.load(x1 + at_x, mask=here_x, other=0.0)
                acc = dot(a, b, acc, PRECISION)
    if weight.to is not None:
        inside = (o < O)[:, None] & (i < I)[None, :]
        deliver(acc, o[:, None] * I + i[None, :], inside, task, weight)
    if bias.to is not None:
        deliver(sums, o, o < tl.where(tile % tiles_i == 0, O, 0), task, bias)


def _product(
    run: Pass,
    rows: int,
    n: int,
    k: int,
    pairs: Products,
    strides: tuple[int, int],
    bias: Operand | None,
    epilogue: Epilogue,
) -> None:
    """The product of `rows` rows of k numbers a task with weights that have `strides` along k and
    n, for one pair or the sum of two."""
    tasks = run.tasks
    if len(pairs) == 1 and pairs[0][1].stride == 0 and (bias is None or bias.stride == 0):
        tasks, rows = 1, tasks * rows  # the same weights for all tasks: one large product
    wide = run.wide
    tile = tile_shape(rows, n, tasks, wide)
    warps = product_warps(tile, len(pairs), epilogue.FINISH.function, wide)
    x1, w1 = pairs[1] if len(pairs) > 1 else (None, None)

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
        w0=pairs[0][1],
        x1=x1,
        w1=w1,
        bias=bias,
        M=rows,
        N=n,
        K=k,
        W_K=strides[0],
        W_N=strides[1],
        PRECISION=run.precision,
        BM=tile[0],
        BN=tile[1],
        BK=sum_step(wide),
        **epilogue._asdict(),
    )


def _gradients(run: Pass, node: Node, pairs: Factors, sinks: Sinks) -> None:
    """The sum of dy^T x over pairs (dy, x) to the weight's sink, the column sums of the first dy to
    the bias's."""
    weight, bias = (None if p is None else sinks[p] for p in node.params)
    if weight is None and bias is None:
        return
    rows, o, i = run.rows(node.output), run.values[node.output].cols, run.values[node.inputs[0]].cols
    wide = run.wide
    tile = tile_shape(o, i, run.tasks, wide)
    warps = gradient_warps(tile, run.precision)
    dy1, x1 = pairs[1] if len(pairs) > 1 else (None, None)

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
        dy1=dy1,
        x1=x1,
        weight=target(weight),
        bias=target(bias),
        M=rows,
        O=o,
        I=i,
        PRECISION=run.precision,
        BO=tile[0],
        BI=tile[1],
        BM=sum_step(wide),
    )


def forward(run: Pass, node: Node) -> None:
    """y = x W^T + b."""
    weight, bias = run.weights(run.theta, node)
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    pairs: Products = [(run.x[node.inputs[0]], weight)]
    _product(run, run.rows(node.output), outputs, inputs, pairs, (1, inputs), bias, forward_end(run, node))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy W; dW = dy^T x, db = the column sums of dy."""
    dy = run.d[node.output]
    if sinks is not None:
        _gradients(run, node, [(dy, run.x[node.inputs[0]])], sinks)
    if run.wants_delta(node.inputs[0]):
        weight, _ = run.weights(run.theta, node)
        _input_gradient(run, node, [(dy, weight)], backward_end(run, node))


def _input_gradient(run: Pass, node: Node, pairs: Products, epilogue: Epilogue) -> None:
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    _product(run, run.rows(node.output), inputs, outputs, pairs, (inputs, 1), None, epilogue)


def tangent(run: Pass, node: Node) -> None:
    """ry = x V^T + vb [+ rx W^T]."""
    v, v_bias = run.weights(run.v, node)
    inputs, outputs = run.values[node.inputs[0]].cols, run.values[node.output].cols
    pairs: Products = [(run.x[node.inputs[0]], v)]
    if run.has_tangent(node.inputs[0]):
        pairs.append((run.rx[node.inputs[0]], run.weights(run.theta, node)[0]))
    _product(run, run.rows(node.output), outputs, inputs, pairs, (1, inputs), v_bias, tangent_end(run, node))


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """rdx = rdy W + dy V; R(dW) = rdy^T x [+ dy^T rx], R(db) = the column sums of rdy."""
    in_, out = node.inputs[0], node.output
    if run.wants_delta(in_):  # first: the weight's gradient may go to where v is read from
        (weight, _), (v, _) = run.weights(run.theta, node), run.weights(run.v, node)
        pairs: Products = [(run.rd[out], weight), (run.d[out], v)]
        _input_gradient(run, node, pairs, tangent_backward_end(run, node))
    factors: Factors = [(run.rd[out], run.x[in_])]
    if run.has_tangent(in_):
        factors.append((run.d[out], run.rx[in_]))
    _gradients(run, node, factors, sinks)
