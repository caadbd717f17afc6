"""rms_norm: the last dimensions of each example divided by the root of their mean square."""

from __future__ import annotations

from fastmeta.kernels.passes import Node, Pass, Sinks
from fastmeta.kernels.row_norm import RowNorm

_CENTRED = False


def forward(run: Pass, node: Node) -> None:
    """y = w x^."""
    RowNorm(run, node, _CENTRED).forward()


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx, dw."""
    RowNorm(run, node, _CENTRED).backward(sinks)


def tangent(run: Pass, node: Node) -> None:
    """ry."""
    RowNorm(run, node, _CENTRED).tangent()


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The tangents of dx and dw."""
    RowNorm(run, node, _CENTRED).tangent_backward(sinks)
