"""Any module and any loss in PyTorch, by the recursion of docs/architecture.md instead of a graph of the inner loop.

It keeps theta_0 .. theta_K and the graph of every step's gradient (`memory="store"`), or that of one step at a time,
which is run again on the way back ("recompute"). Tasks run under vmap or in a loop (`notes` says so), all of them at
once or `task_chunk` at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmeta.backends import _inputs
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._random_state import RandomState
from fastmeta.backends._twice import NotTwiceDifferentiableError, named_in
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.chunks import Joined, chunks
from fastmeta.backends.torch.memory import stores
from fastmeta.backends.torch.replay import WHY, NotReplayedError
from fastmeta.backends.torch.sweep import Sweep
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
    device = _inputs.any_batch(problem).x.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device), named_in(problem):
        p = _inputs.detached(problem)
        at_once = _at_once(p)
        reason = tasks.why_loop(p) if at_once > 1 and _inputs.runs(p) else ""
    lines = [f"tasks run in a loop: {reason}"] if reason else []
    if tasks.must_store(p):
        lines.append(f"the graphs of all inner steps are kept: {WHY}")
    if at_once < problem.tasks:
        lines.append(f"tasks run {at_once} at a time, and no more than theirs is in memory")
    return lines


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`; the random state moves on as if every forward pass had run once.

    Raises:
        RuntimeError: memory="recompute", and a step that was run again was another one.
        NotImplementedError: second order, and an operator has no second derivative.
    """
    device = _inputs.any_batch(problem).x.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device), named_in(problem):
        p = _inputs.detached(problem)
        _inputs.check_rates(p)
        _inputs.check_class_indices(p, tasks.output_shape)
        start = RandomState.of(p)
        vectorised = _at_once(p) > 1 and _inputs.runs(p) and not tasks.why_loop(p)
        try:
            return _replayable(p, wrt, adapted, vectorised, start)
        except (torch.OutOfMemoryError, NotReplayedError, NotTwiceDifferentiableError):
            raise
        except Exception as error:
            if not vectorised:
                raise
            start.restore()
            result = _replayable(p, wrt, adapted, False, start)  # an error of the caller's own comes out here
            tasks.remember_loop(p, tasks.failure(error))
            return result


def _replayable(p: Problem, wrt: frozenset[str], adapted: bool, vectorised: bool, start: RandomState) -> Result:
    """The answer; the graphs of all steps are kept where "auto" finds that a step cannot be run again."""
    try:
        result = _sweep(p, wrt, adapted, vectorised)
    except NotReplayedError as error:
        if p.memory != "auto":
            raise NotReplayedError(f"memory={p.memory!r}: {error}; use memory='store'") from None
        start.restore()
        tasks.remember_to_store(p)
        result = _sweep(p, wrt, adapted, vectorised)
    drawn = start.drawn_outside_torch(start.anew()) if vectorised else ""
    if not drawn:
        return result
    tasks.remember_loop(p, tasks.drawn_once(drawn))
    start.restore()
    return _replayable(p, wrt, adapted, False, start)


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
