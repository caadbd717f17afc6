"""group_norm: y = w (x - mean) / std + b, each example by itself, over groups of channels.

x and y are [T, N images of H x W, C], the weight and bias of a task [C]. The kernels:
`channel_norm`.
"""

from __future__ import annotations

from fastmeta.kernels.channel_norm import ChannelNorm
from fastmeta.kernels.passes import Node, Pass, Sinks


def _norm(run: Pass, node: Node) -> ChannelNorm:
    value = run.values[node.inputs[0]]
    return ChannelNorm(run, node, run.examples, value.rows, int(node.constants[0]), node.constants[1])


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
