"""What backends refuse of layers, whatever their kernels can do."""

from __future__ import annotations

from collections.abc import Collection

from fastmeta.graph.program import Program
from fastmeta.layers.registry import kind_of
from fastmeta.problem import Batch, Problem


def without_kernels(program: Program, kinds: Collection[str], functions: Collection[str]) -> str:
    """Why a backend with kernels for these layer kinds and element-wise functions cannot run a
    program, "" if it can."""
    for layer in program.layers:
        if layer.kind not in kinds:
            return f"{layer.kind} has no kernels"
        if kind_of(layer).family == "pointwise" and layer.function not in functions:
            return f"{layer.function} has no kernels"
    return ""


def refuses_layers(problem: Problem) -> str:
    """Why a network's layers cannot be run, "" if they can."""
    program = problem.program
    if program is None:
        return ""
    for batch in (problem.support if problem.steps else None, problem.query):
        if batch is not None and (reason := _refused(program, batch)):
            return reason
    # a matrix is laid out for products
    matrices = {layer.params[0] for layer in program.layers if kind_of(layer).matrix}
    for layer in program.layers:
        vectors = layer.params[1:] if kind_of(layer).matrix else layer.params
        for name in vectors:
            if name is not None and name in matrices:
                return f"`{name}` belongs to {layer.kind} and is the weight of another layer"
    return ""


def _refused(program: Program, batch: Batch) -> str:
    """Why some layer cannot run on so many examples, "" if all can."""
    examples = batch.x.shape[2 if batch.per_step else 1]
    found = ((kind_of(layer).refuses, layer) for layer in program.layers)
    return next((why for refuses, layer in found if refuses and (why := refuses(layer, examples))), "")
