"""add: y = a + b, two values of one shape, [size] over all tasks; and the copies that other files
need."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, Recorder, blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks, there


@jit
@varies("size")
def _sum(
    a,  # [size]
    b,
    out,
    size,
    BLOCK: tl.constexpr,
):
    """out = a + b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(
        out + at, tl.load(a + at, mask=mask, other=0.0) + tl.load(b + at, mask=mask, other=0.0), mask=mask
    )


@jit
@varies("size")
def _copy(
    source,  # [size]
    out,
    size,
    BLOCK: tl.constexpr,
):
    """out = source."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(out + at, tl.load(source + at, mask=mask, other=0.0), mask=mask)


def total(emit: Recorder, a: Buffer, b: Buffer, out: Buffer) -> None:
    """out = a + b, of one size."""
    size = there(out).numel()
    emit(_sum, blocks(size, FLAT), a=a, b=b, out=out, size=size, BLOCK=FLAT)


def copy(emit: Recorder, source: Buffer, out: Buffer) -> None:
    """out = source."""
    size = there(out).numel()
    emit(_copy, blocks(size, FLAT), source=source, out=out, size=size, BLOCK=FLAT)


def accumulate(emit: Recorder, source: Buffer, out: Buffer) -> None:
    """out += source."""
    total(emit, out, source, out)


def forward(run: Pass, node: Node) -> None:
    """y = a + b."""
    a, b = node.inputs
    total(run.emit, run.x[a], run.x[b], run.x[node.output])


def tangent(run: Pass, node: Node) -> None:
    """ry = ra + rb, of those that move."""
    first, *second = (run.rx[value] for value in node.inputs if run.has_tangent(value))
    if second:
        total(run.emit, first, second[0], run.rx[node.output])
    else:
        copy(run.emit, first, run.rx[node.output])


def _hand_on(run: Pass, node: Node, dy: Buffer, deltas: list[Buffer]) -> None:
    for value, again in zip(node.inputs, node.adds, strict=True):
        if run.wants_delta(value):
            (accumulate if again else copy)(run.emit, dy, deltas[value])


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """da = db = dy."""
    _hand_on(run, node, run.d[node.output], run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _hand_on(run, node, run.rd[node.output], run.rd)
