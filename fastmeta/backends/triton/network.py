"""What the Triton kernels can do beyond one layer at a time."""

from __future__ import annotations

from fastmeta.graph.nodes import Graph, Node
from fastmeta.graph.passes import Capabilities, annotate, side_by_side
from fastmeta.graph.program import Program
from fastmeta.kernels.recomputed_conv import is_small


def build(program: Program, input_gradients: bool, output_channels: bool = False) -> Graph:
    """The graph of a program.

    Args:
        program: the network.
        input_gradients: gradients of the network's input are wanted.
        output_channels: the output [C, d...] is wanted channels-last.
    """
    graph = annotate(program, CAPABILITIES, output_channels=output_channels, input_gradients=input_gradients)
    for norm in [node for node in graph.nodes if node.recomputes is not None]:
        norm.sums_from = None
        graph.nodes.remove(norm.recomputes)  # type: ignore[arg-type]
    return graph


def _pools(graph: Graph, norm: Node, pool: Node) -> bool:
    return side_by_side(pool)


def _sums_tiles(graph: Graph, conv: Node, norm: Node) -> bool:
    if conv.kind != "conv2d" or norm.kind != "batch_norm" or norm.params[2] is not None:
        return False  # of running statistics there is nothing to sum
    return graph.values[conv.output].cols == graph.values[norm.inputs[0]].cols


def _recomputes(graph: Graph, conv: Node, norm: Node) -> bool:
    # not where the norm reads it under another height and width
    same = graph.values[conv.output] == graph.values[norm.inputs[0]]
    return norm.sums_from is conv and same and is_small(conv, graph.values[conv.inputs[0]].cols)


CAPABILITIES = Capabilities(
    padded=False,
    folds_affine=True,
    ends=True,
    pools=_pools,
    pools_first=True,
    sums_tiles=_sums_tiles,
    recomputes=_recomputes,
)


def engine_shape(shape: tuple[int, ...], node_kind: str) -> tuple[int, ...]:
    """A parameter as the kernels read it: a convolution's weight is [O, *taps, C]."""
    return (shape[0], *shape[2:], shape[1]) if node_kind == "conv2d" else shape
