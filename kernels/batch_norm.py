"""batch_norm: y = w (x - mean) / std + b, every channel by itself, over the task's own batch or by
running statistics.

x and y are [T, N images of H x W, C], or rows [T, N, C]; the weight and bias of a task [C]. The
kernels: `channel_norm`; with the convolution before it, `recomputed_conv`.
"""

from __future__ import annotations

from fastmeta.kernels.channel_norm import ChannelNorm
from fastmeta.kernels.passes import Node, Pass, Sinks
from fastmeta.kernels.recomputed_conv import RecomputedConv


def _norm(run: Pass, node: Node) -> ChannelNorm:
    value = run.values[node.inputs[0]]
    kind = ChannelNorm if node.recomputes is None else RecomputedConv
    return kind(run, node, 1, run.rows(node.inputs[0]), value.cols, node.constants[0])


def forward(run: Pass, node: Node) -> None:
    """y = w x^ + b."""
    _norm(run, node).forward()


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx, dw, db."""
    _norm(run, node).backward(sinks)


def tangent(run: Pass, node: Node) -> None:
    """ry."""
    _norm(run, node).tangent()


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The tangents of dx, dw and db."""
    _norm(run, node).tangent_backward(sinks)
