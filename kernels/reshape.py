"""reshape: the same numbers in PyTorch's order, between an image (channels-last here), rows and
other images."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Node, Pass, Sinks, Value


@triton.jit(do_not_specialize=["size"])
def _reorder(source, out, size, E, S_COLS, S_ROWS, O_COLS, O_ROWS, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    example = i // E
    j = (i % E).to(tl.int32)
    order = j % O_COLS * O_ROWS + j // O_COLS  # the place in PyTorch's order
    at = order % S_ROWS * S_COLS + order // S_ROWS
    value = tl.load(source + example * E + at, mask=mask, other=0.0)
    if ADD:
        value += tl.load(out + i, mask=mask, other=0.0)
    tl.store(out + i, value, mask=mask)


def _matrix(value: Value) -> tuple[int, int]:
    """(columns, rows) of an image; a value that is in PyTorch's order anyway is one column."""
    return (value.cols, value.rows) if value.channels else (1, value.size)


def _copy(run: Pass, source: Any, a: Value, out: Any, b: Value, again: bool) -> None:
    size = run.tasks * run.examples * a.size
    s_cols, s_rows = _matrix(a)
    o_cols, o_rows = _matrix(b)
    run.emit(
        _reorder,
        blocks(size, FLAT),
        source=source,
        out=out,
        size=size,
        E=a.size,
        S_COLS=s_cols,
        S_ROWS=s_rows,
        O_COLS=o_cols,
        O_ROWS=o_rows,
        ADD=again,
        BLOCK=FLAT,
    )


def _there(run: Pass, node: Node, blocks_: list[Any]) -> None:
    a, b = node.inputs[0], node.output
    _copy(run, blocks_[a], run.values[a], blocks_[b], run.values[b], False)


def _back(run: Pass, node: Node, deltas: list[Any]) -> None:
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
