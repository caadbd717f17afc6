"""Whether the `torch` backend keeps the graphs of all inner steps or runs every step again on the
way back."""

from __future__ import annotations

from fastmeta.backends._sweep import needs_sweep_back
from fastmeta.backends.torch import tasks
from fastmeta.problem import STORE_AT_MOST, Problem


def stores(problem: Problem, wrt: frozenset[str], at_once: int, vectorised: bool) -> bool:
    """Whether to keep them; "auto": as long as they take less than `STORE_AT_MOST`.

    Args:
        problem: its tensors detached.
        wrt: the gradients wanted.
        at_once: the number of tasks whose graphs exist at the same time.
        vectorised: tasks by vmap instead of a loop.
    """
    if problem.order == "first" or problem.steps == 0 or not needs_sweep_back(wrt):
        return False  # there is no Hessian-vector product
    if problem.memory != "auto":
        return problem.memory == "store"
    if tasks.must_store(problem):
        return True
    return tasks.graph_bytes(problem, vectorised) * at_once * problem.steps <= STORE_AT_MOST
