"""Any module and any loss in PyTorch, by the recursion of docs/architecture.md instead of a graph of the inner loop.

It keeps theta_0 .. theta_K and, for one step at a time, the graph of its gradient: `memory="store"` and "recompute"
mean the same here, every step is recomputed on the way back. Tasks run under vmap or in a loop (`notes` says so).
"""

from __future__ import annotations

import torch

from fastmeta.backends import _inputs
from fastmeta.backends import _torch_tasks as tasks
from fastmeta.backends._random_state import RandomState
from fastmeta.backends._torch_sweep import Sweep
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
        reason = tasks.why_loop(_inputs.detached(problem)) if problem.tasks > 1 else ""
    return [f"tasks run in a loop: {reason}"] if reason else []


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`; the random state moves on as if every forward pass had run once."""
    device = _inputs.any_batch(problem).x.device
    with isolated(device):
        p = _inputs.detached(problem)
        _inputs.check_class_indices(p, tasks.output_shape)
        if p.tasks == 1 or tasks.why_loop(p):
            return Sweep(p, wrt, vectorised=False).run(adapted)
        start = RandomState.now(device)
        try:
            return Sweep(p, wrt, vectorised=True).run(adapted)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            start.restore()
            result = Sweep(p, wrt, vectorised=False).run(adapted)  # an error of the caller's own comes out here
            tasks.remember_loop(p, error)
            return result
