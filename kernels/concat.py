"""concat: two values side by side, (a, b) along one dimension. Linear.

In memory, stretches of the one and of the other take turns: a is [rows, width of a], b [rows, width
of b], y [rows, both widths], where `rows` counts what lies before that dimension, of all tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks


class Columns(NamedTuple):
    """Columns of a matrix [rows, ld], from column `begin` on."""

    at: Buffer
    ld: int
    begin: int


@jit
@varies("size")
def _stretches(
    source: Columns,  # [rows, width]; source.at None: zeros
    out: Columns,  # likewise
    size,  # rows * width
    width,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out +] source, a program BLOCK elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = i // width
    col = i % width
    value = tl.zeros([BLOCK], out.at.dtype.element_ty)
    if source.at is not None:
        value = tl.load(source.at + row * source.ld + source.begin + col, mask=mask, other=0.0)
    to = out.at + row * out.ld + out.begin + col
    if ADD:
        value += tl.load(to, mask=mask, other=0.0)
    tl.store(to, value, mask=mask)


def _geometry(run: Pass, node: Node) -> tuple[int, list[int]]:
    """How many stretches of each there are, and how long they are."""
    outer = int(node.constants[0]) or run.values[node.output].rows
    return run.tasks * run.examples * outer, [run.values[value].size // outer for value in node.inputs]


def _join(run: Pass, node: Node, sources: list[Buffer], out: Buffer) -> None:
    rows, widths = _geometry(run, node)
    for source, width, at in zip(sources, widths, (0, widths[0]), strict=True):
        size = rows * width
        run.emit(
            _stretches,
            blocks(size, FLAT),
            source=Columns(source, width, 0),
            out=Columns(out, sum(widths), at),
            size=size,
            width=width,
            ADD=False,
            BLOCK=FLAT,
        )


def _split(run: Pass, node: Node, dy: Buffer, deltas: list[Buffer]) -> None:
    rows, widths = _geometry(run, node)
    for value, width, at, again in zip(node.inputs, widths, (0, widths[0]), node.adds, strict=True):
        if not run.wants_delta(value):
            continue
        size = rows * width
        run.emit(
            _stretches,
            blocks(size, FLAT),
            source=Columns(dy, sum(widths), at),
            out=Columns(deltas[value], width, 0),
            size=size,
            width=width,
            ADD=again,
            BLOCK=FLAT,
        )


def forward(run: Pass, node: Node) -> None:
    """y = (a, b)."""
    _join(run, node, [run.x[value] for value in node.inputs], run.x[node.output])


def tangent(run: Pass, node: Node) -> None:
    """ry = (ra, rb), zero where a value does not move."""
    _join(run, node, [run.rx[v] if run.has_tangent(v) else None for v in node.inputs], run.rx[node.output])


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """Each input's share of dy."""
    _split(run, node, run.d[node.output], run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _split(run, node, run.rd[node.output], run.rd)
