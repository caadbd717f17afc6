"""A layer program in two: a body without some parameters, and a rest that reads one value of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from fastmeta.graph.program import Layer, Program


@dataclass(frozen=True, slots=True)
class Halves:
    """The parts: `rest`, applied to the output of `body`, is the whole program."""

    body: Program
    # reads the body's output; has all parameters but those that only the body reads
    rest: Program


def split(program: Program, moving: Collection[str]) -> Halves | None:
    """Cut off the largest body that depends on no parameter in `moving`.

    The rest reads the output of the body, and no other value of it.

    Args:
        program: the whole.
        moving: names of parameters.

    Returns:
        The parts; None if there is no such body with parameters, or if the output depends on
        nothing in `moving`.
    """
    still = _independent(program, moving)
    if program.output in still:
        return None
    for cut in sorted(still - {0}, reverse=True):  # a later cut has the earlier ones in its body
        shape, behind = program.value_shape(cut), _behind(program, cut)
        if behind is None or not shape:
            continue
        body = _part(program, _needed(program, cut), 0, cut)
        rest = _part(program, behind, cut, program.output)
        inside, outside = _params(body), _params(rest)
        if not inside:
            return None
        return Halves(
            replace(body, params=tuple(entry for entry in program.params if entry[0] in inside)),
            replace(
                rest, params=tuple(entry for entry in program.params if entry[0] not in inside - outside)
            ),
        )
    return None


def _independent(program: Program, moving: Collection[str]) -> set[int]:
    """The values that depend on no parameter in `moving`."""
    still = {0}
    for value, layer in enumerate(program.layers, start=1):
        if still.issuperset(layer.inputs) and not any(name in moving for name in layer.params):
            still.add(value)
    return still


def _needed(program: Program, value: int, given: int = 0) -> set[int]:
    """`value` and the values that it is computed from, back to the input and to `given`."""
    found, todo = set(), [value]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        found.add(at)
        if at not in (0, given):
            todo += program.layers[at - 1].inputs
    return found


def _behind(program: Program, cut: int) -> set[int] | None:
    """The values between `cut` and the output; None if they read the input too."""
    found = _needed(program, program.output, cut)
    return None if 0 in found else found - {cut}


def _part(program: Program, values: set[int], first: int, last: int) -> Program:
    """The layers of `values` as a program from value `first` to value `last`.

    It lists the parameters of the whole program.
    """
    number = {first: 0}
    layers: list[Layer] = []
    for value in sorted(values - {first}):
        layer = program.layers[value - 1]
        layers.append(replace(layer, inputs=tuple(number[i] for i in layer.inputs)))
        number[value] = len(layers)
    used = {name for layer in layers for name in layer.params}
    buffers = tuple(entry for entry in program.buffers if entry[0] in used)
    return Program(program.value_shape(first), tuple(layers), number[last], program.params, buffers)


def _params(part: Program) -> set[str]:
    """The parameters that some layer reads."""
    names = {name for name, _ in part.params}
    return {name for layer in part.layers for name in layer.params if name in names}
