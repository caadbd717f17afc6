"""concat: two values one behind the other: stretches of the one and of the other take turns.
Linear."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Node, Pass, Sinks


@triton.jit(do_not_specialize=["size"])
def _stretches(
    source, out, size, width, source_ld, source_at, out_ld, out_at, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = i // width
    col = i % width
    value = tl.zeros([BLOCK], out.dtype.element_ty)
    if source is not None:
        value = tl.load(source + row * source_ld + source_at + col, mask=mask, other=0.0)
    to = out + row * out_ld + out_at + col
    if ADD:
        value += tl.load(to, mask=mask, other=0.0)
    tl.store(to, value, mask=mask)


def _geometry(run: Pass, node: Node) -> tuple[int, list[int]]:
    """How many stretches of each there are, and how long they are."""
    outer = int(node.constants[0]) or run.values[node.output].rows
    return run.tasks * run.examples * outer, [run.values[value].size // outer for value in node.inputs]


def _join(run: Pass, node: Node, sources: list[Any], out: Any) -> None:
    rows, widths = _geometry(run, node)
    for source, width, at in zip(sources, widths, (0, widths[0]), strict=True):
        size = rows * width
        run.emit(
            _stretches,
            blocks(size, FLAT),
            source=source,
            out=out,
            size=size,
            width=width,
            source_ld=width,
            source_at=0,
            out_ld=sum(widths),
            out_at=at,
            ADD=False,
            BLOCK=FLAT,
        )


def _split(run: Pass, node: Node, dy: Any, deltas: list[Any]) -> None:
    rows, widths = _geometry(run, node)
    for value, width, at, again in zip(node.inputs, widths, (0, widths[0]), node.adds, strict=True):
        if not run.wants_delta(value):
            continue
        size = rows * width
        run.emit(
            _stretches,
            blocks(size, FLAT),
            source=dy,
            out=deltas[value],
            size=size,
            width=width,
            source_ld=sum(widths),
            source_at=at,
            out_ld=width,
            out_at=0,
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
