"""reshape: the same numbers in PyTorch's order, between an image (channels-last here), rows and
other images.

x and y are [T * N examples, E elements]; an example is a matrix [rows, columns] that PyTorch reads
column by column: the rows of an image are its pixels, its columns the channels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks, Value


class Matrix(NamedTuple):
    """Sizes of an example; of a value that is in PyTorch's order anyway, one column."""

    cols: int
    rows: int


@jit
@varies("size")
def _reorder(
    source,  # [examples, E]
    out,  # likewise
    size,  # examples * E
    E,
    source_size: Matrix,
    out_size: Matrix,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out +] source in another order, a program BLOCK elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    example = i // E
    j = (i % E).to(tl.int32)
    order = j % out_size.cols * out_size.rows + j // out_size.cols  # the place in PyTorch's order
    at = order % source_size.rows * source_size.cols + order // source_size.rows
    value = tl.load(source + example * E + at, mask=mask, other=0.0)
    if ADD:
        value += tl.load(out + i, mask=mask, other=0.0)
    tl.store(out + i, value, mask=mask)


def _matrix(value: Value) -> Matrix:
    return Matrix(value.cols, value.rows) if value.channels else Matrix(1, value.size)


def _copy(run: Pass, source: Buffer, a: Value, out: Buffer, b: Value, again: bool) -> None:
    size = run.tasks * run.examples * a.size
    run.emit(
        _reorder,
        blocks(size, FLAT),
        source=source,
        out=out,
        size=size,
        E=a.size,
        source_size=_matrix(a),
        out_size=_matrix(b),
        ADD=again,
        BLOCK=FLAT,
    )


def _there(run: Pass, node: Node, buffers: list[Buffer]) -> None:
    a, b = node.inputs[0], node.output
    _copy(run, buffers[a], run.values[a], buffers[b], run.values[b], False)


def _back(run: Pass, node: Node, deltas: list[Buffer]) -> None:
    a, b = node.inputs[0], node.output
    if run.wants_delta(a):
        _copy(run, deltas[b], run.values[b], deltas[a], run.values[a], node.adds[0])


def forward(run: Pass, node: Node) -> None:
    """y = x in another order."""
    _there(run, node, run.x)


def tangent(run: Pass, node: Node) -> None:
    """The same of tangents."""
    _there(run, node, run.rx)


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy in the order of x."""
    _back(run, node, run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _back(run, node, run.rd)
