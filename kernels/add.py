"""add: the sum of two values of one shape; and the copies that other files need."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, Recorder, blocks
from fastmeta.kernels.passes import Node, Pass, Sinks


@triton.jit(do_not_specialize=["size"])
def _sum(a, b, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(
        out + at, tl.load(a + at, mask=mask, other=0.0) + tl.load(b + at, mask=mask, other=0.0), mask=mask
    )


@triton.jit(do_not_specialize=["size"])
def _copy(source, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(out + at, tl.load(source + at, mask=mask, other=0.0), mask=mask)


def total(emit: Recorder, a: Any, b: Any, out: Any) -> None:
    """out = a + b, of one size."""
    emit(_sum, blocks(out.numel(), FLAT), a=a, b=b, out=out, size=out.numel(), BLOCK=FLAT)


def copy(emit: Recorder, source: Any, out: Any) -> None:
    """out = source."""
    emit(_copy, blocks(out.numel(), FLAT), source=source, out=out, size=out.numel(), BLOCK=FLAT)


def accumulate(emit: Recorder, source: Any, out: Any) -> None:
    """out += source."""
    total(emit, out, source, out)


def forward(run: Pass, node: Node) -> None:
    """y = a + b."""
    a, b = node.inputs
    total(run.emit, run.x[a], run.x[b], run.x[node.output])


def tangent(run: Pass, node: Node) -> None:
    """ry = ra + rb, of those that move."""
    moving = [run.rx[value] for value in node.inputs if run.has_tangent(value)]
    if len(moving) == 2:
        total(run.emit, *moving, run.rx[node.output])
    else:
        copy(run.emit, moving[0], run.rx[node.output])


def _hand_on(run: Pass, node: Node, dy: Any, deltas: list[Any]) -> None:
    for value, again in zip(node.inputs, node.adds, strict=True):
        if run.wants_delta(value):
            (accumulate if again else copy)(run.emit, dy, deltas[value])


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """da = db = dy."""
    _hand_on(run, node, run.d[node.output], run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _hand_on(run, node, run.rd[node.output], run.rd)
