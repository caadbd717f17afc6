"""What backends refuse of norms."""

from __future__ import annotations

from fastmeta.graph.program import Program
from fastmeta.layers.registry import KINDS, kind_of
from fastmeta.problem import Batch, Problem

NORMS = frozenset(kind.name for kind in KINDS.values() if kind.family == "norm")


def refuses_norms(problem: Problem) -> str:
    """Why a network's norms cannot be run, "" if they can."""
    program = problem.program
    if program is None:
        return ""
    for batch in (problem.support if problem.steps else None, problem.query):
        if batch is not None and (reason := _refused(program, batch)):
            return reason
    # a matrix is laid out for products
    matrices = {layer.params[0] for layer in program.layers if kind_of(layer).matrix}
    for layer in program.layers:
        for name in layer.params:
            if layer.kind in NORMS and name is not None and name in matrices:
                return f"`{name}` belongs to a norm and is the weight of another layer"
    return ""


def _refused(program: Program, batch: Batch) -> str:
    """Why some layer cannot run on so many examples, "" if all can."""
    examples = batch.x.shape[2 if batch.per_step else 1]
    found = ((kind_of(layer).refuses, layer) for layer in program.layers)
    return next((why for refuses, layer in found if refuses and (why := refuses(layer, examples))), "")
