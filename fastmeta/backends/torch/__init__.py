"""Any module and any loss in PyTorch, by the recursion of docs/architecture.md instead of a graph of the inner loop.

It keeps theta_0 .. theta_K and the graph of every step's gradient (`memory="store"`), or that of one step at a time,
which is run again on the way back ("recompute"). Tasks run under vmap or in a loop (`notes` says so), all of them at
once or `task_chunk` at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured
from fastmeta.backends._random_state import RandomState
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.chunks import Joined, chunks
from fastmeta.backends.torch.memory import stores
from fastmeta.backends.torch.sweep import Sweep
from fastmeta.backends.torch.unrolled import unrolled
from fastmeta.network.functional import isolated
from fastmeta.problem import Problem, Result


def missing() -> str:
    """Why this backend cannot run anything here: it always can."""
    return ""


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`: it can run any."""
    return ""


def notes(problem: Problem) -> list[str]:
    """What a user should know about how `problem` runs here; may run two of its tasks once to find out."""
    with isolated(_inputs.any_batch(problem).x.device):
        p = _inputs.detached(problem)
        at_once = _at_once(p)
        reason = tasks.why_loop(p) if at_once > 1 else ""
    lines = [f"tasks run in a loop: {reason}"] if reason else []
    if at_once < problem.tasks:
        lines.append(f"tasks run {at_once} at a time, and no more than theirs is in memory")
    return lines


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`; the random state moves on as if every forward pass had run once."""
    device = _inputs.any_batch(problem).x.device
    with isolated(device):
        p = _inputs.detached(problem)
        _inputs.check_rates(p)
        _inputs.check_class_indices(p, tasks.output_shape)
        if _at_once(p) == 1 or tasks.why_loop(p):
            return _sweep(p, wrt, adapted, vectorised=False)
        start = RandomState.now(device)
        try:
            return _sweep(p, wrt, adapted, vectorised=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            start.restore()
            result = _sweep(p, wrt, adapted, vectorised=False)  # an error of the caller's own comes out here
            tasks.remember_loop(p, error)
            return result


def objective(problem: Problem) -> tuple[Tensor, Captured]:
    """J with its graph, from the tensors of `problem` as they are, and what else it depends on; draws as `solve`."""
    with isolated(_inputs.any_batch(problem).x.device):
        vectorised = _at_once(problem) > 1 and not tasks.why_loop(_inputs.detached(problem))
        p = _inputs.with_graph(problem)
        captured = Captured(p, keep=True)
        return torch.stack([unrolled(part, vectorised, captured) for part in chunks(p)]).sum(), captured


def _at_once(problem: Problem) -> int:
    return min(problem.tasks, problem.task_chunk or problem.tasks)


def _sweep(problem: Problem, wrt: frozenset[str], adapted: bool, vectorised: bool) -> Result:
    store = stores(problem, wrt, _at_once(problem), vectorised)
    parts = chunks(problem)
    result = Sweep(next(parts), wrt, vectorised, store).run(adapted)
    if _at_once(problem) == problem.tasks:
        return result
    joined = Joined(problem, result)
    for part in parts:
        joined.add(Sweep(part, wrt, vectorised, store).run(adapted))
    return joined.result()
