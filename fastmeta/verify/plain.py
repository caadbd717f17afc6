"""A layer program in plain PyTorch: every layer by the forward of its record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastmeta.graph.program import Layer, Program
from fastmeta.layers.registry import kind_of


def run(program: Program, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What a program computes.

    Args:
        program: the captured network.
        params: its parameters, and the buffers that it names.
        x: [N, *in], one task's examples.

    Returns:
        [N, *out].

    Raises:
        ValueError: a layer makes another shape than it says.
    """
    values = [x]
    for _, _, value in steps(program, params, x):
        values.append(value)
    return values[program.output]


def steps(
    program: Program, params: Mapping[str, Tensor], x: Tensor
) -> Iterator[tuple[Layer, list[Tensor], Tensor]]:
    """The layers of `run` one by one, each with its inputs and its output."""
    values = [x]
    for layer in program.layers:
        inputs = [values[i] for i in layer.inputs]
        out = kind_of(layer).forward(layer, params, *inputs)
        if tuple(out.shape) != (len(x), *layer.shape):
            raise ValueError(f"{layer.kind} makes {list(out.shape)}, not [{len(x)}, *{list(layer.shape)}]")
        values.append(out)
        yield layer, inputs, out


def kink_distance(program: Program, params: Mapping[str, Tensor], x: Tensor) -> float:
    """The least distance of any layer's input from a kink."""
    found = math.inf
    for layer, inputs, _ in steps(program, params, x):
        kinks = kind_of(layer).kinks
        if kinks is not None:
            found = min(found, float(kinks(layer, *inputs)))
    return found
