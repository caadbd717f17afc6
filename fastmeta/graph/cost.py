"""What a layer program costs, and whether it mixes the examples of a batch."""

from __future__ import annotations

from math import prod

from fastmeta.graph.program import Layer, Program
from fastmeta.layers.registry import kind_of


def multiply_adds(program: Program) -> tuple[int, int]:
    """Multiply-adds (f, f1) of one example's forward pass; f1 are those of layers fed by the input.

    Source: the letters of docs/architecture.md, "Cost".
    """
    shapes = dict(program.params)
    total = first = 0
    for layer in program.layers:
        if not kind_of(layer).matrix or layer.params[0] is None:
            continue
        macs = prod(layer.shape) * prod(shapes[layer.params[0]][1:])
        total += macs
        first += macs if layer.inputs[0] == 0 else 0
    return total, first


def batch_readers(program: Program) -> list[Layer]:
    """The layers whose output for an example depends on the other examples of its batch."""
    found = [(layer, kind_of(layer).reads_batch) for layer in program.layers]
    return [layer for layer, reads in found if reads is not None and reads(layer)]
