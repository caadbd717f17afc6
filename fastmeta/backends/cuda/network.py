"""A captured network as the CUDA kernels run it: without reshapes that move nothing, activations in
epilogues."""

from __future__ import annotations

from fastmeta.backends._layout import lay_out
from fastmeta.backends._norms import NORMS
from fastmeta.backends.cuda.tables import Layer, Value
from fastmeta.graph.program import Program

#: Kinds that take the activation behind them.
_WITH_EPILOGUE = NORMS | {"linear"}


def simplify(
    program: Program, names: list[str], output_channels: bool = False
) -> tuple[list[Value], list[Layer], int]:
    """Values, layers and the output: reshapes that move nothing are gone, activations are in
    epilogues.

    Args:
        program: the captured network.
        names: the parameters in use, and the buffers that are read.
        output_channels: whether the output [C, d...] is wanted channels-last.
    """
    index = {name: i for i, name in enumerate(names)}
    engine = lay_out(program, output_channels)
    # in one row, or one column, both orders are the same
    values = [Value(rows, cols, image and rows > 1 and cols > 1) for rows, cols, _, _, image in engine.values]
    layers, output = _image_input(values), engine.output
    entry = layers[0].output if layers else 0
    for layer, inputs, out in engine.layers:
        weight, bias, mean, var = (index.get(name or "", -1) for name in (*layer.params, *[None] * 4)[:4])
        a, b = (entry if v == 0 else v for v in (*inputs, -1)[:2])
        made = Layer(layer.kind, (a, b), out, weight=weight, bias=bias, mean=mean, var=var)
        if layer.kind == "elementwise":
            made.function, made.function_constants = layer.function, layer.constants
        else:
            made.constants = layer.constants
        layers.append(made)
    output = entry if output == 0 else output
    layers, output = _without_reshapes(values, layers, output)
    layers = _with_activations(layers, output)
    for made in layers:
        moves = (
            made.weight >= 0 or made.bias >= 0 or any(values[v].from_params for v in made.inputs if v >= 0)
        )
        values[made.output].from_params = moves
        if made.pre >= 0:
            values[made.pre].from_params = moves
    _mark_last(layers, output)
    return values, layers, output


def _image_input(values: list[Value]) -> list[Layer]:
    """The user's input is in torch's order: a reshape where the network reads it channels-last."""
    first = values[0]
    if not first.channels:
        return []
    values.append(first)
    values[0] = Value(first.cols, first.rows)
    return [Layer("reshape", (0, -1), len(values) - 1)]


def _readers(layers: list[Layer], value: int) -> list[Layer]:
    return [layer for layer in layers for v in layer.inputs if v == value]


def _without_reshapes(values: list[Value], layers: list[Layer], output: int) -> tuple[list[Layer], int]:
    kept: list[Layer] = []
    for i, layer in enumerate(layers):
        a, out = layer.inputs[0], layer.output
        if layer.kind == "reshape":
            same = all(
                getattr(values[a], what) == getattr(values[out], what)
                for what in ("rows", "cols", "channels")
            )
            # the user's input is dense: its only reader just says how to read it
            only = a == 0 and not values[out].channels and len(_readers(layers[i:] + kept, 0)) == 1
            if not same and only:
                values[0].rows, values[0].cols, same = values[out].rows, values[out].cols, True
            if same:
                output = a if output == out else output
                for later in layers[i:]:
                    later.inputs = tuple(a if v == out else v for v in later.inputs)  # type: ignore[assignment]
                continue
        kept.append(layer)
    return kept, output


def _with_activations(layers: list[Layer], output: int) -> list[Layer]:
    """linear or norm -> elementwise, where nobody else reads what lies between, nor the loss what
    comes out."""
    gone: set[int] = set()
    for layer in layers:
        readers = _readers(layers, layer.output)
        if layer.kind not in _WITH_EPILOGUE or layer.output == output:
            continue
        if len(readers) != 1 or readers[0].kind != "elementwise":
            continue
        activation = readers[0]
        if activation.output == output:
            continue
        layer.pre, layer.output = layer.output, activation.output
        layer.function, layer.function_constants = activation.function, activation.function_constants
        gone.add(id(activation))
    return [layer for layer in layers if id(layer) not in gone]


def _mark_last(layers: list[Layer], output: int) -> None:
    """In a backward pass: who adds to a value's gradient, and who is last. The loss is the first at
    the output."""
    written = {output}
    final: dict[int, tuple[Layer, int]] = {}
    for layer in reversed(layers):
        adds = []
        for j, v in enumerate(layer.inputs):
            adds.append(v in written)
            if v >= 0:
                written.add(v)
                final[v] = (layer, j)
        layer.adds = (adds[0], adds[1])
    for layer, j in final.values():
        layer.last = (j == 0 or layer.last[0], j == 1 or layer.last[1])
