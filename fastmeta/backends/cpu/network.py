"""What the C++ engine can do beyond one layer at a time, and a graph as it takes it."""

from __future__ import annotations

from typing import Any

from fastmeta.graph.nodes import Graph, Node
from fastmeta.graph.passes import Capabilities, channel_norm, side_by_side

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]


def _absorbs(graph: Graph, node: Node, f: Node) -> bool:
    """A relu goes into the norm of images before it, or between two linear layers into both."""
    if f.function != "relu":
        return False
    if channel_norm(node):
        return True
    weight = node.params[0] if node.kind == "linear" else None
    if weight is None or graph.shapes[weight][0] <= _C.NARROW_ROWS:
        return False
    reader = graph.only_reader(f.output)
    return reader is not None and reader.kind == "linear"


def _pools(graph: Graph, norm: Node, pool: Node) -> bool:
    """Windows that lie side by side and do not reach over the edge."""
    x, y = graph.values[norm.output], graph.values[pool.output]
    kh, kw = map(int, pool.constants[:2])
    return side_by_side(pool) and y.height * kh <= x.height and y.width * kw <= x.width


def _recomputes(graph: Graph, conv: Node, norm: Node) -> bool:
    return channel_norm(norm)  # the engine does it where the convolution is cheap


CAPABILITIES = Capabilities(
    padded=True, absorbs=_absorbs, pools=_pools, recomputes=_recomputes, cancels_bias=True
)

#: As `_C.Plan` takes them.
Description = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], int]


def described(graph: Graph, index: dict[str, int]) -> Description:
    """A graph as `_C.Plan` takes it; `index` is the place of each parameter."""
    live = sorted({0} | {node.output for node in graph.nodes})
    number = {value: i for i, value in enumerate(live)}
    values = [
        (v.rows, v.cols, v.height, v.width, v.channels, graph.from_params[i])
        for i, v in ((i, graph.values[i]) for i in live)
    ]
    layers = [
        (
            node.kind,
            node.function,
            node.constants,
            [number[value] for value in node.inputs],
            number[node.output],
            [-1 if p is None else index.get(graph.params[p], -1) for p in node.params],
            _fused(graph, node),
        )
        for node in graph.nodes
    ]
    return values, layers, number[graph.output]


def _fused(graph: Graph, node: Node) -> dict[str, Any]:
    """What the engine is told of a node's neighbours."""
    fused: dict[str, Any] = {"adds": node.adds, "bias_cancels": node.bias_cancels}
    fused["relu_out"] = node.epilogue is not None
    before = graph.maker(node.inputs[0])
    if node.kind == "linear" and before is not None and before.kind == "linear":
        fused["relu_in"] = before.epilogue is not None
    if node.pool is not None:
        fused["pool"] = node.pool
    if node.recomputes is not None:
        fused["recomputes"] = graph.nodes.index(node.recomputes)
    return fused
