"""A captured network as the CUDA kernels run it: without reshapes that move nothing, activations at
the end of the layers before them."""

from __future__ import annotations

from fastmeta.backends.cuda.tables import Layer, Value
from fastmeta.graph.nodes import Graph, Node
from fastmeta.graph.passes import Capabilities, annotate
from fastmeta.graph.program import Program
from fastmeta.layers.registry import KINDS


def _absorbs(graph: Graph, node: Node, f: Node) -> bool:
    return KINDS[node.kind].epilogue and f.output != graph.output  # the loss reads what is kept


CAPABILITIES = Capabilities(padded=True, image_input=False, windows=False, absorbs=_absorbs)


def simplify(
    program: Program, names: list[str], output_channels: bool = False
) -> tuple[list[Value], list[Layer], int]:
    """Values, layers and the output, as tables.

    Args:
        program: the captured network.
        names: the parameters in use, and the buffers that are read.
        output_channels: whether the output [C, d...] is wanted channels-last.
    """
    graph = annotate(program, CAPABILITIES, output_channels=output_channels)
    index = {name: i for i, name in enumerate(names)}
    values = [
        Value(value.rows, value.cols, value.turned, from_params=moves)
        for value, moves in zip(graph.values, graph.from_params, strict=True)
    ]
    return values, [_layer(graph, node, index) for node in graph.nodes], graph.output


def _layer(graph: Graph, node: Node, index: dict[str, int]) -> Layer:
    f = node if node.kind == "elementwise" else node.epilogue
    a, b = (*node.inputs, -1)[:2]
    weight, bias, mean, var = (
        -1 if p is None else index.get(graph.params[p], -1) for p in (*node.params, *[None] * 4)[:4]
    )
    made = Layer(node.kind, (a, b), node.output, weight=weight, bias=bias, mean=mean, var=var)
    if f is not None:
        made.function, made.function_constants = f.function, f.constants
    if f is not node:
        made.constants = node.constants
    made.pre = -1 if node.before is None else node.before
    made.adds, made.last = ((*flags, False)[:2] for flags in (node.adds, node.last))  # type: ignore[assignment]
    return made
