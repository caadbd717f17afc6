"""Where the engine keeps an image channels-last and where rows as torch has them, and the copies
between the two."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from fastmeta.graph.program import Layer, Program
from fastmeta.layers.registry import kind_of


@dataclass(slots=True)
class EngineProgram:
    """A program with every value's layout, as lists of what `_C.Plan` takes; parameters still by
    name."""

    program: Program
    values: list[tuple[int, int, int, int, bool]] = field(
        default_factory=list
    )  # rows, cols, height, width, channels
    layers: list[tuple[Layer, tuple[int, ...], int]] = field(default_factory=list)  # layer, inputs, output
    output: int = 0

    def add_value(self, shape: tuple[int, ...], channels: bool) -> int:
        """Another value of this shape; its number."""
        self.values.append(layout(shape, channels))
        return len(self.values) - 1


def layout(shape: tuple[int, ...], channels: bool) -> tuple[int, int, int, int, bool]:
    """(rows, cols, height, width, channels) of one example."""
    if not shape:
        return (1, 1, 1, 1, False)
    if not channels:
        return (prod(shape[:-1]), shape[-1], prod(shape[:-1]), 1, False)
    width = shape[-1] if len(shape) > 1 else 1
    return (prod(shape[1:]), shape[0], prod(shape[1:-1]), width, True)


def lay_out(program: Program, output_channels: bool = False) -> EngineProgram:
    """Choose every value's layout, and convert by a reshape where a layer reads another one than
    was written.

    Args:
        program: the captured network.
        output_channels: whether its output [C, d...] is wanted channels-last, else in torch's
            order.
    """
    engine = EngineProgram(program)
    # of each value of the program: layout -> its number in the engine
    places: list[dict[bool, int]] = []

    def place(value: int, channels: bool) -> None:
        places.append({channels: engine.add_value(program.value_shape(value), channels)})

    def read(value: int, channels: bool) -> int:
        known = places[value]
        if channels not in known:
            (source,) = known.values()
            shape = program.value_shape(value)
            known[channels] = engine.add_value(shape, channels)
            engine.layers.append((Layer("reshape", (), shape), (source,), known[channels]))
        return known[channels]

    place(0, _wanted(program, 0, output_channels))
    for output, layer in enumerate(program.layers, start=1):
        order = kind_of(layer).order
        if order == "image":
            channels = True
        elif order == "rows" or layer.kind == "reshape":
            channels = False
        else:
            channels = next(iter(places[layer.inputs[0]]))
        if layer.kind == "concat":
            layer, channels = _concat(layer, channels)
        if layer.kind == "reshape":
            inputs: tuple[int, ...] = tuple(next(iter(places[value].values())) for value in layer.inputs)
            channels = _wanted(program, output, output_channels)
        else:
            inputs = tuple(read(value, channels) for value in layer.inputs)
        place(output, channels)
        engine.layers.append((layer, inputs, next(iter(places[output].values()))))
    engine.output = read(program.output, output_channels)
    return engine


def _concat(layer: Layer, channels: bool) -> tuple[Layer, bool]:
    """Which layout a concat reads, and with the constant that the engine takes: 0 where columns lie
    side by side, else the number of times that its blocks of rows alternate."""
    at = int(layer.constants[0])
    channels = channels and at == 0 and len(layer.shape) > 1
    side_by_side = channels or at == len(layer.shape) - 1
    return replace(layer, constants=(0.0 if side_by_side else float(prod(layer.shape[:at])),)), channels


def _wanted(program: Program, value: int, output_channels: bool) -> bool:
    """Whether the first layer that cares, or else whoever reads the output, reads this value as an
    image."""
    same = {value}
    for output, layer in enumerate(program.layers, start=1):
        if same.isdisjoint(layer.inputs):
            continue
        order = kind_of(layer).order
        if order == "image":
            return True
        if order == "rows" or layer.kind == "reshape":
            return False
        same.add(output)
    return output_channels and program.output in same
