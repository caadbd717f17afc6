"""What backends refuse of norms."""

from __future__ import annotations

from math import prod

from fastmeta.graph.program import Program, normalises
from fastmeta.problem import Batch, Problem

NORMS = frozenset({"batch_norm", "layer_norm", "group_norm"})


def refuses_norms(problem: Problem) -> str:
    """Why a network's norms cannot be run, "" if they can."""
    program = problem.program
    if program is None:
        return ""
    read = (problem.support if problem.steps else None, problem.query)
    if any(_one_value(program, batch) for batch in read if batch is not None):
        return "batch norm over one value per channel"
    # a matrix is laid out for products
    matrices = {layer.params[0] for layer in program.layers if layer.kind not in NORMS and layer.params}
    for layer in program.layers:
        for name in layer.params:
            if layer.kind in NORMS and name is not None and name in matrices:
                return f"`{name}` belongs to a norm and is the weight of another layer"
    return ""


def _one_value(program: Program, batch: Batch) -> bool:
    """Whether some norm over its batch has a single value per channel."""
    examples = batch.x.shape[2 if batch.per_step else 1]
    return any(normalises(layer) and examples * prod(layer.shape[1:]) == 1 for layer in program.layers)
