"""Any module and any loss in PyTorch, by the recursion of docs/architecture.md instead of a graph
of the inner loop.

It keeps theta_0 .. theta_K and the graph of every step's gradient (`memory="store"`), or that of
one step at a time, which is run again on the way back ("recompute"), or not even every theta
("checkpoint"). Tasks run under vmap or in a
loop (`notes` says so), all of them at once or `task_chunk` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.backends import _checkpoints, _inputs, reference
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._captured import Captured, rerun
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._random_state import RandomState
from fastmeta.backends._rule_tasks import check_reads
from fastmeta.backends._sweep import goes_back
from fastmeta.backends._twice import NotTwiceDifferentiableError, named_in
from fastmeta.backends.torch import checkpointed, tasks
from fastmeta.backends.torch.alone import alone
from fastmeta.backends.torch.checkpointed import CheckpointedSweep
from fastmeta.backends.torch.chunks import chunks, joined
from fastmeta.backends.torch.features import Moved, standing
from fastmeta.backends.torch.memory import stores
from fastmeta.backends.torch.replay import WHY, NotReplayedError
from fastmeta.backends.torch.still import give_up
from fastmeta.backends.torch.sweep import EagerSweep
from fastmeta.backends.torch.unrolled import unrolled
from fastmeta.network.functional import isolated
from fastmeta.problem import Problem, Result
from fastmeta.undisturbed import asynchronous


def missing() -> str:
    """Why this backend cannot run anything here: it always can."""
    return ""


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`: it can run any."""
    return ""


def notes(problem: Problem) -> list[str]:
    """What a user should know about how `problem` runs here; may run two of its tasks once to find
    out."""
    device = problem.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device), named_in(problem):
        p = _inputs.detached(problem)
        at_once = _at_once(p)
        state = carries_state(p) if p.steps and _inputs.runs(p) else ""
        if state:
            return [
                f"tasks run in a loop that keeps the graphs of all steps: the network carries `{state}` over"
            ]
        reason = tasks.why_loop(p) if at_once > 1 and _inputs.runs(p) else ""
        once = dict.fromkeys(name for names in standing(p).values() for name in names)
    lines = (
        [f"computed once per call, since no adapted parameter matters for it: {', '.join(once)}"]
        if once
        else []
    )
    lines += [f"tasks run in a loop: {reason}"] if reason else []
    if tasks.must_store(p):
        lines.append(f"the graphs of all inner steps are kept: {WHY}")
    if at_once < problem.tasks:
        lines.append(f"tasks run {at_once} at a time, and no more than theirs is in memory")
    return lines


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """How `problem` runs here: `notes`, and what is kept of its inner steps."""
    lines = notes(problem)
    device = problem.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device), named_in(problem):
        p = _inputs.detached(problem)
        if not p.steps or not goes_back(p, wrt) or (_inputs.runs(p) and carries_state(p)):
            return lines
        at_once = _at_once(p)
        vectorised = at_once > 1 and _inputs.runs(p) and not tasks.why_loop(p)
        return [*lines, _memory(p, wrt, at_once if vectorised else 1, vectorised)]


def _memory(p: Problem, wrt: frozenset[str], at_once: int, vectorised: bool) -> str:
    """What is kept of the inner steps of the tasks that run at once."""
    if p.memory == "checkpoint":
        return checkpointed.said(p, at_once)
    store = stores(p, wrt, at_once, vectorised)
    if store:
        what, size = "store: the graphs", tasks.graph_bytes(p, vectorised) * at_once
    else:
        what, size = "recompute: the adapted parameters", _checkpoints.copy_bytes(p, at_once)
        if p.rule is not None and not p.rule.written:  # the adjoint of the step reads all of this
            what += ", gradients and states of the rule"
            size += _checkpoints.copy_bytes(replace(p, rule=None), at_once)
    times = "once" if store or p.order == "first" else "2 times"
    kept = f"about {size * p.steps / 1024:.0f} KiB"
    return f"memory: {what} of all {p.steps} inner steps, {kept}; each is run {times}"


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`; the random state moves on as if every forward pass had run once.

    Raises:
        RuntimeError: memory="recompute", and a step that was run again was another one.
        NotImplementedError: second order, and an operator has no second derivative.
    """
    device = problem.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device), named_in(problem):
        p = _inputs.detached(problem)
        _inputs.check_rates(p)
        _inputs.check_class_indices(p, tasks.output_shape)
        check_reads(p)
        if (wrt or p.steps) and _inputs.runs(p) and carries_state(p) and p.steps:
            return _with_state(p, wrt, adapted)
        start = RandomState.of(p)
        vectorised = _at_once(p) > 1 and _inputs.runs(p) and not tasks.why_loop(p)
        if p.memory == "checkpoint":
            checkpointed.check(p, _at_once(p) if vectorised else 1)
        try:
            return rerun(p, lambda p: _replayable(p, wrt, adapted, vectorised, start), start)
        except (torch.OutOfMemoryError, NotReplayedError, NotTwiceDifferentiableError):
            raise
        except Exception as error:
            if not vectorised or asynchronous(error):
                raise
            start.restore()
            # an error of the caller's own comes out here
            result = rerun(p, lambda p: _replayable(p, wrt, adapted, False, start), start)
            tasks.remember_loop(p, tasks.failure(error))
            return result


def objective(problem: Problem) -> tuple[Tensor, Captured]:
    """J with its graph, from the tensors of `problem` as they are, and what else it depends on;
    draws as `solve`."""

    def whole(p: Problem) -> tuple[Tensor, Captured]:
        captured = Captured(p, keep=True)
        parts = chunks(p if vectorised else replace(p, task_chunk=1))
        return torch.stack([unrolled(part, vectorised, captured) for part in parts]).sum(), captured

    device = problem.device
    problem = replace(problem, autocast=autocast_dtype(device))
    with isolated(device):
        detached = _inputs.detached(problem)
        if problem.steps and carries_state(detached):
            return reference.objective(problem)
        vectorised = _at_once(problem) > 1 and _inputs.runs(problem) and not tasks.why_loop(detached)
        return rerun(_inputs.with_graph(problem), whole)


def _replayable(
    p: Problem, wrt: frozenset[str], adapted: bool, vectorised: bool, start: RandomState
) -> Result:
    """The answer; the graphs of all steps are kept where "auto" finds that a step cannot be run
    again."""
    try:
        result = _answer(p, wrt, adapted, vectorised, start)
    except NotReplayedError as error:
        if p.memory != "auto":
            raise NotReplayedError(f"memory={p.memory!r}: {error}; use memory='store'") from None
        start.restore()
        tasks.remember_to_store(p)
        result = _answer(p, wrt, adapted, vectorised, start)
    drawn = start.drawn_outside_torch(start.anew()) if vectorised else ""
    if not drawn:
        return result
    tasks.remember_loop(p, tasks.drawn_once(drawn))
    start.restore()
    return _replayable(p, wrt, adapted, False, start)


def _at_once(problem: Problem) -> int:
    return min(problem.tasks, problem.task_chunk or problem.tasks)


def _with_state(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """A step that starts from what the last one left can be followed back through the graph of all
    steps alone."""
    return joined(problem, (reference.solve(part, wrt, adapted) for part in chunks(problem)))


def _answer(p: Problem, wrt: frozenset[str], adapted: bool, vectorised: bool, start: RandomState) -> Result:
    """The answer, with what stands still computed once."""
    answers = _at_once_answers if vectorised else _one_by_one
    still = standing(p)
    try:
        return joined(p, answers(p, wrt, adapted, still))
    except Moved:
        give_up(p.net)
        start.restore()
        return joined(p, answers(p, wrt, adapted, {}))


def _at_once_answers(
    problem: Problem, wrt: frozenset[str], adapted: bool, still: Mapping[str, tuple[str, ...]]
) -> Iterator[Result]:
    """All tasks of a chunk by vmap."""
    if problem.memory == "checkpoint":
        return (CheckpointedSweep(part, wrt, True, still).run(adapted) for part in chunks(problem))
    store = stores(problem, wrt, _at_once(problem), True)
    return (EagerSweep(part, wrt, True, store, still).run(adapted) for part in chunks(problem))


def _one_by_one(
    problem: Problem, wrt: frozenset[str], adapted: bool, still: Mapping[str, tuple[str, ...]]
) -> Iterator[Result]:
    """One task after the other, each from its first inner step to its gradient."""
    parts = chunks(replace(problem, task_chunk=1))
    if problem.memory == "checkpoint":
        return (CheckpointedSweep(part, wrt, False, still).run(adapted) for part in parts)
    graphs = problem.order == "second" and problem.steps > 0 and goes_back(problem, wrt)
    if not graphs or stores(problem, wrt, 1, False):
        return (alone(part, wrt, adapted, still) for part in parts)
    return (EagerSweep(part, wrt, False, False, still).run(adapted) for part in parts)
