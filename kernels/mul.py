"""mul: y = a * b, element by element.

a and y are [T, examples * rows, columns]; b has all of these rows or one an example, and all
columns or one: it stands for several elements of a.

    backward           da  = dy b,           db  = the sum of dy a over what b stands for
    tangent            ry  = ra b + a rb
    tangent_backward   rda = rdy b + dy rb,  rdb = the sum of rdy a + dy ra
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks, there


class Shape(NamedTuple):
    """One example of the output, and what b has of it."""

    rows: int
    cols: int
    all_rows: bool
    all_cols: bool


@jit
def _place(i, shape: tl.constexpr):
    """Where the element of b is that element i of the output is made of."""
    row = i // shape.cols
    if not shape.all_rows:
        row = row // shape.rows
    if shape.all_cols:
        return row * shape.cols + i % shape.cols
    else:
        return row


@jit
@varies("size")
def _product(
    first,  # [size], as out
    factor,  # b, or its tangent
    also,  # a second product to add; None: there is none
    also_factor,
    out,
    size,
    SHAPE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out +] first * factor [+ also * also_factor]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    place = _place(i, SHAPE)
    y = tl.load(first + i, mask=mask, other=0.0) * tl.load(factor + place, mask=mask, other=0.0)
    if also is not None:
        y += tl.load(also + i, mask=mask, other=0.0) * tl.load(also_factor + place, mask=mask, other=0.0)
    if ADD:
        y += tl.load(out + i, mask=mask, other=0.0)
    tl.store(out + i, y, mask=mask)


@jit
@varies("size")
def _summed_product(
    first,  # as the output
    second,
    also,  # a second product to add; None: there is none
    also_second,
    out,  # [size], as b
    size,
    SHAPE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out +] the sums of first * second [+ also * also_second] over what b stands for."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = i
    column = i * 0
    tall = 1
    wide = SHAPE.cols
    if SHAPE.all_cols:
        row = i // SHAPE.cols
        column = i % SHAPE.cols
        wide = 1
    if not SHAPE.all_rows:
        row = row * SHAPE.rows
        tall = SHAPE.rows
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    for r in range(tall):
        for c in range(wide):
            at = (row + r) * SHAPE.cols + column + c
            total += tl.load(first + at, mask=mask, other=0.0) * tl.load(second + at, mask=mask, other=0.0)
            if also is not None:
                more = tl.load(also + at, mask=mask, other=0.0)
                total += more * tl.load(also_second + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(out + i, mask=mask, other=0.0)
    tl.store(out + i, total, mask=mask)


def _shape(run: Pass, node: Node) -> Shape:
    y, b = run.values[node.output], run.values[node.inputs[1]]
    return Shape(y.rows, y.cols, b.rows == y.rows, b.cols == y.cols)


def _write(
    run: Pass, node: Node, to: int, pairs: list[tuple[Buffer, Buffer]], out: Buffer, again: bool = False
) -> None:
    """Value `to` at `out` = [out +] the sum of products; the second of each pair is as b for the
    output and for a, as a for b."""
    shape = _shape(run, node)
    size = there(out).numel()
    (first, second), (also, also_second) = (*pairs, (None, None))[:2]
    common: dict[str, Any] = {"out": out, "size": size, "SHAPE": shape, "ADD": again, "BLOCK": FLAT}
    if to == 1 and not (shape.all_rows and shape.all_cols):
        run.emit(
            _summed_product,
            blocks(size, FLAT),
            first=first,
            second=second,
            also=also,
            also_second=also_second,
            **common,
        )
        return
    run.emit(
        _product, blocks(size, FLAT), first=first, factor=second, also=also, also_factor=also_second, **common
    )


def forward(run: Pass, node: Node) -> None:
    """y = a b."""
    a, b = node.inputs
    _write(run, node, 0, [(run.x[a], run.x[b])], run.x[node.output])


def tangent(run: Pass, node: Node) -> None:
    """ry = ra b + a rb, of those that move."""
    a, b = node.inputs
    pairs = [(run.rx[a], run.x[b])] if run.has_tangent(a) else []
    pairs += [(run.x[a], run.rx[b])] if run.has_tangent(b) else []
    _write(run, node, 0, pairs, run.rx[node.output])


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """da = dy b, db = the sum of dy a."""
    for j, value in enumerate(node.inputs):
        if run.wants_delta(value):
            other = run.x[node.inputs[1 - j]]
            _write(run, node, j, [(run.d[node.output], other)], run.d[value], node.adds[j])


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """rda = rdy b + dy rb, rdb = the sum of rdy a + dy ra."""
    for j, value in enumerate(node.inputs):
        other = node.inputs[1 - j]
        if not run.wants_delta(value):
            continue
        pairs = [(run.rd[node.output], run.x[other])]
        pairs += [(run.d[node.output], run.rx[other])] if run.has_tangent(other) else []
        _write(run, node, j, pairs, run.rd[value], node.adds[j])
