"""What backends refuse of norms."""

from __future__ import annotations

from math import prod

from fastmeta.problem import Problem


def refuses_batch(problem: Problem) -> str:
    """Why the batches cannot be normalised, "" if they can: by the task's own batch takes two values per channel."""
    if problem.program is None or problem.batch_stats != "task":
        return ""
    pixels = [prod(layer.shape[1:]) for layer in problem.program.layers if layer.kind == "batch_norm"]
    for batch in (problem.support, problem.query):
        if batch is not None and batch.x.shape[2 if batch.per_step else 1] * min(pixels, default=2) == 1:
            return "batch norm over one value per channel"
    return ""
