"""Any module and any loss in PyTorch, by the recursion of docs/architecture.md instead of a graph of the inner loop.

It keeps theta_0 .. theta_K and the graph of every step's gradient (`memory="store"`), or that of one step at a time,
which is run again on the way back ("recompute"). Tasks run under vmap or in a loop (`notes` says so), all of them at
once or `task_chunk` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured
from fastmeta.backends._random_state import RandomState
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.alone import Captures, alone
from fastmeta.backends.torch.chunks import chunks, joined
from fastmeta.backends.torch.features import Moved, names_of
from fastmeta.backends.torch.memory import stores
from fastmeta.backends.torch.still import give_up
from fastmeta.backends.torch.sweep import Sweep, needs_sweep_back
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
        once = names_of(p)
    lines = [f"computed once per call, since no adapted parameter matters for it: {', '.join(once)}"] if once else []
    lines += [f"tasks run in a loop: {reason}"] if reason else []
    if at_once < problem.tasks:
        lines.append(f"tasks run {at_once} at a time, and no more than theirs is in memory")
    return lines


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`; the random state moves on as if every forward pass had run once."""
    try:
        return _solve(problem, wrt, adapted)
    except Moved:
        give_up(problem.net)
        return _solve(problem, wrt, adapted)


def _solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    device = _inputs.any_batch(problem).x.device
    with isolated(device):
        _inputs.check_rates(problem)
        _inputs.check_class_indices(problem, tasks.output_shape)
        if problem.tasks == 1 and problem.scratch.get("torch alone") == wrt:  # known to be nothing more to do
            try:
                return alone(_inputs.with_step_weights(problem), wrt, adapted)
            except Captures:
                problem.scratch["torch alone"] = None
        p = _inputs.detached(problem)
        if _at_once(p) == 1 or tasks.why_loop(p):
            return _loop(p, wrt, adapted)
        start = RandomState.now(device)
        try:
            return _vectorised(p, wrt, adapted)
        except (torch.OutOfMemoryError, Moved):
            raise
        except Exception as error:
            start.restore()
            result = _loop(p, wrt, adapted)  # an error of the caller's own comes out here
            tasks.remember_loop(p, error)
            return result


def objective(problem: Problem) -> tuple[Tensor, Captured]:
    """J with its graph, from the tensors of `problem` as they are, and what else it depends on; draws as `solve`."""
    with isolated(_inputs.any_batch(problem).x.device):
        p = _inputs.with_step_weights(problem)
        captured = Captured(p.captures, keep=True)
        vectorised = _at_once(p) > 1 and not tasks.why_loop(_inputs.detached(p))
        parts = chunks(p if vectorised else replace(p, task_chunk=1))
        return torch.stack([unrolled(part, vectorised, captured) for part in parts]).sum(), captured


def _at_once(problem: Problem) -> int:
    return min(problem.tasks, problem.task_chunk or problem.tasks)


def _vectorised(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """All tasks of a chunk at once, by vmap."""
    store = stores(problem, wrt, _at_once(problem), True)
    return joined(problem, (Sweep(part, wrt, True, store).run(adapted) for part in chunks(problem)))


def _loop(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """One task after the other, each from its first inner step to its gradient."""
    return joined(problem, _each_alone(problem, wrt, adapted))


def _each_alone(problem: Problem, wrt: frozenset[str], adapted: bool) -> Iterator[Result]:
    graphs = problem.order == "second" and problem.steps > 0 and needs_sweep_back(wrt)
    whole_graph, scratch, known = not graphs or stores(problem, wrt, 1, False), problem.scratch, "torch alone"
    for part in chunks(problem if problem.tasks == 1 else replace(problem, task_chunk=1)):
        if whole_graph and scratch.get(known, wrt) == wrt:
            # which random numbers a task draws matters: the first time, it may have to be run again
            start = None if known in scratch else RandomState.now(_inputs.any_batch(part).x.device)
            try:
                result = alone(part, wrt, adapted)
                scratch[known] = wrt
                yield result
                continue
            except Captures:
                scratch[known] = None
                if start is not None:
                    start.restore()
        yield Sweep(part, wrt, False, store=whole_graph and graphs).run(adapted)
