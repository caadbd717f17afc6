"""Which values lie channels-last, which in PyTorch's order, and the reshapes between the two."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from fastmeta.graph.nodes import Graph, Node, Value
from fastmeta.graph.program import Layer, Program
from fastmeta.layers.kind import Order
from fastmeta.layers.registry import KINDS


def lay_out(program: Program, output_channels: bool = False) -> Graph:
    """A program as a graph, one node a layer, and a reshape wherever a layer reads another order.

    Args:
        program: the captured network.
        output_channels: the output [C, d...] is wanted channels-last, else in PyTorch's order.
    """
    shapes = dict(program.params) | dict(program.buffers)
    index = {name: i for i, name in enumerate(shapes)}
    graph = Graph([], [], 0, list(shapes), list(shapes.values()), len(program.params))
    # of each value of the program: channels-last or not -> its number in the graph
    places: list[dict[bool, int]] = []

    def place(value: int, channels: bool) -> int:
        number = graph.new_value(layout(program.value_shape(value), channels))
        places.append({channels: number})
        return number

    def add(layer: Layer, inputs: tuple[int, ...], output: int) -> None:
        params = tuple(None if name is None else index[name] for name in layer.params)
        node = Node(len(graph.nodes), layer.kind, inputs, output, params, layer.function, layer.constants)
        node.shape = layer.shape
        graph.nodes.append(node)

    def read(value: int, channels: bool) -> int:
        known = places[value]
        if channels not in known:
            (source,) = known.values()
            shape = program.value_shape(value)
            known[channels] = graph.new_value(layout(shape, channels))
            add(Layer("reshape", (), shape), (source,), known[channels])
        return known[channels]

    place(0, _wanted(program, 0, output_channels))
    for output, layer in enumerate(program.layers, start=1):
        order = _order(program, layer)
        channels = order == "image"
        if order == "either" and layer.kind != "reshape":
            channels = next(iter(places[layer.inputs[0]]))
        if layer.kind == "concat":
            layer, channels = _concat(layer, channels)
        if layer.kind == "reshape":
            inputs: tuple[int, ...] = tuple(next(iter(places[value].values())) for value in layer.inputs)
            channels = _wanted(program, output, output_channels)
        else:
            inputs = tuple(read(value, channels) for value in layer.inputs)
        add(layer, inputs, place(output, channels))
    graph.output = read(program.output, output_channels)
    return graph


def layout(shape: tuple[int, ...], channels: bool) -> Value:
    """Rows and columns of one example of this shape."""
    if not shape:
        return Value(1, 1, 1, 1, False)
    if not channels:
        return Value(prod(shape[:-1]), shape[-1], prod(shape[:-1]), 1, False)
    width = shape[-1] if len(shape) > 1 else 1
    return Value(prod(shape[1:]), shape[0], prod(shape[1:-1]), width, True)


def _order(program: Program, layer: Layer) -> Order:
    return KINDS[layer.kind].order_of(layer, *map(program.value_shape, layer.inputs))


def _concat(layer: Layer, channels: bool) -> tuple[Layer, bool]:
    """A concat with the constant that kernels take, and whether it reads channels-last.

    The constant is 0 where columns lie side by side, else how often its blocks of rows alternate.
    """
    at = int(layer.constants[0])
    channels = channels and at == 0 and len(layer.shape) > 1
    side_by_side = channels or at == len(layer.shape) - 1
    return replace(layer, constants=(0.0 if side_by_side else float(prod(layer.shape[:at])),)), channels


def _wanted(program: Program, value: int, output_channels: bool) -> bool:
    """Whether a value is read as an image, by the first layer with an order or as the output."""
    same = {value}
    for output, layer in enumerate(program.layers, start=1):
        if same.isdisjoint(layer.inputs):
            continue
        order = _order(program, layer)
        if order != "either" or layer.kind == "reshape":
            return order == "image"
        same.add(output)
    return output_channels and program.output in same
