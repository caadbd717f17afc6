"""A sign error in one function of one layer kind of the Triton kernels, for `mutate.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton.language as tl

from fastmeta.backends.triton import step
from fastmeta.graph.nodes import Node
from fastmeta.kernels.jit import jit
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Buffer, Pass

_TANGENTS = {"tangent": "rx", "tangent_backward": "rd"}


@jit
def _negate(x, size, BLOCK: tl.constexpr):
    """x = -x, for [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, -tl.load(x + at, mask=at < size, other=0.0), mask=at < size)


@contextmanager
def flipped(kind: str, function: str) -> Iterator[None]:
    """`function` of `kind` has the wrong sign."""
    kernels = step.KINDS[kind]
    plain: Callable[..., None] = getattr(kernels, function)
    back = "backward" in function

    def negate(run: Pass, buffer: Buffer) -> None:
        if buffer is not None:
            run.emit(_negate, blocks(buffer.numel(), FLAT), x=buffer, size=buffer.numel(), BLOCK=FLAT)

    def wrong(run: Pass, node: Node, *sinks: Any) -> None:
        if (node.in_forward and not back) or (node.in_backward and back):
            return plain(run, node, *sinks)  # a neighbour does it
        f = node if node.epilogue is None else node.epilogue
        buffers = [run.d[node.output]] if back else [run.x[f.output]] if function == "forward" else []
        if function in _TANGENTS:
            made = getattr(run, _TANGENTS[function])
            buffers.append(made[node.output if back else f.output])
        for buffer in buffers if back else ():
            negate(run, buffer)
        plain(run, node, *sinks)
        for buffer in buffers:
            negate(run, buffer)
        return None

    with mock.patch.object(kernels, function, wrong):
        yield
