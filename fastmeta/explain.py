"""What runs a call, what it costs, and why something faster does not: `MAML.explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fastmeta import backends
from fastmeta.backends import _hoisting
from fastmeta.backends._autocast import said
from fastmeta.backends._checkpoints import copy_bytes, run_again
from fastmeta.graph.cost import batch_readers, multiply_adds
from fastmeta.network.functional import norms_by_batch
from fastmeta.ops.plan import Call
from fastmeta.problem import Problem
from fastmeta.undisturbed import undrawn


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one call runs; printing it gives all of this.

    Args:
        backend: its name.
        what: the call in one line.
        runs: what the backend says of itself.
        cost: multiply-adds of one meta-step by memory mode; empty where the network was not
            captured.
        refused: backend -> why it does not run this.
        conventions: what a user may not expect.
    """

    backend: str
    what: str
    runs: tuple[str, ...]
    cost: dict[str, int]
    refused: dict[str, str]
    conventions: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.what, f"backend: {self.backend}", *self.runs]
        lines += [f"cost, memory={mode!r}: {count:.3g} multiply-adds" for mode, count in self.cost.items()]
        if not self.cost:
            lines.append("cost: not known")
        lines += [f"not on {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, *self.conventions])


def explain(call: Call) -> Explanation:
    """How a checked call runs. Reads shapes and options, and may run two tasks once on the `torch`
    backend."""
    return undrawn(call.plan.shapes.device, _explanation, call)


def _explanation(call: Call) -> Explanation:
    try:
        return _explained(call)
    except Exception:
        call.diagnose()
        raise


def _explained(call: Call) -> Explanation:
    problem, wrt = call.problem, call.wrt
    chosen = call.plan.backend.__name__.rpartition(".")[2]
    tried = backends.candidates(problem)
    before = tried[: tried.index(chosen)] if chosen in tried else tried
    refused = {name: _reason(name, problem, wrt) for name in before}
    runs: list[str] = []
    if hasattr(call.plan.backend, "describe"):
        runs = call.plan.backend.describe(problem, wrt)
    elif hasattr(call.plan.backend, "notes"):
        runs = call.plan.backend.notes(problem)
    return Explanation(
        chosen, _what(problem), tuple(runs), _cost(call, chosen), refused, _conventions(problem, chosen)
    )


def _reason(name: str, problem: Problem, wrt: frozenset[str]) -> str:
    """Why a backend did not get the call."""
    backend = backends.get(name)
    reason = backends.why_not(name, problem, wrt)
    if not reason and hasattr(backend, "yields"):
        reason = backend.yields(problem, wrt)
    return reason or "another backend was named"


def in_steps(whole: Explanation, queries: int) -> Explanation:
    """The explanation of a chain of inner steps, each a call of its own, from that of the whole in
    one call.

    Args:
        whole: its cost is not that of the chain, which is left out.
        queries: how many query losses there are.
    """
    line = (
        "each inner step is a call of its own and is run again on the way back: one more gradient of every "
        "step than "
        f'in one call with memory="store"; query losses are computed {queries} times'
    )
    return replace(whole, cost={}, conventions=(line, *whole.conventions))


def _cost(call: Call, chosen: str) -> dict[str, int]:
    """Multiply-adds by memory mode as the call runs."""
    problem = call.problem
    if chosen in ("torch", "reference"):
        return meta_step_cost(problem)
    if hasattr(call.plan.backend, "cost"):
        return dict(call.plan.backend.cost(problem, call.wrt))
    plan = _hoisting.hoisted(call.plan.backend.refuses, problem, call.wrt)
    of_one = partial(meta_step_cost, copy_bytes_of=getattr(call.plan.backend, "checkpoint_bytes", None))
    return of_one(problem) if plan is None else _hoisting.cost(problem, plan, of_one)


def meta_step_cost(problem: Problem, copy_bytes_of: Callable[[Problem], int] | None = None) -> dict[str, int]:
    """Multiply-adds of one meta-step by memory mode, {} without a program.

    Args:
        problem: the problem.
        copy_bytes_of: what one copy of theta and the state of the rule takes, of all tasks that run
            at once; None: as on the `torch` backend.

    Source: docs/architecture.md, "Cost".
    """
    if problem.program is None:
        return {}
    f, first = multiply_adds(problem.program)
    query = 0 if problem.query is None else (problem.query.examples or 0) * (3 * f - first)
    if problem.support is None or problem.steps == 0:
        return {"store": problem.tasks * query}
    examples = problem.support.examples or 0
    if problem.order == "first":
        modes = {"store": 3 * f - first}
    else:
        modes = {"store": 9 * f - 5 * first, "recompute": 11 * f - 6 * first}
    if problem.memory == "checkpoint":
        each = (copy_bytes_of or _copy_bytes)(problem)
        modes["checkpoint"] = modes["store"] + round(run_again(problem, each) * (3 * f - first))
    if problem.memory in modes:
        modes = {problem.memory: modes[problem.memory]}
    return {mode: problem.tasks * (examples * problem.steps * each + query) for mode, each in modes.items()}


def _copy_bytes(problem: Problem) -> int:
    return copy_bytes(problem, min(problem.tasks, problem.task_chunk or problem.tasks))


def _what(problem: Problem) -> str:
    parts = [f"T = {problem.tasks} tasks", f"K = {problem.steps} inner steps, {problem.order} order"]
    for at, letter, batch in ((1, "N", problem.support), (2, "M", problem.query)):
        if batch is not None and batch.examples is not None:
            parts.insert(at, f"{letter} = {batch.examples}")
    adapted = f"{len(problem.rates)} of {len(problem.params)} parameters adapted"
    dtype = str(next(iter(problem.params.values())).dtype).removeprefix("torch.")
    return ", ".join([*parts, adapted, dtype])


def _normalises_by_batch(problem: Problem) -> bool:
    if problem.program is not None:
        return bool(batch_readers(problem.program))
    return bool(norms_by_batch(problem.net, problem.batch_stats))


def _conventions(problem: Problem, chosen: str) -> tuple[str, ...]:
    autocast = said(chosen, next(iter(problem.params.values())).device)
    lines = [autocast] if autocast else []
    if problem.batch_stats == "module" and _normalises_by_batch(problem):
        lines.append(
            "batch norms in training mode use the statistics of the task's own batch (transductive: query "
            "examples are normalised together), and leave the running statistics alone"
        )
    elif _normalises_by_batch(problem):
        lines.append(
            "batch norm uses the statistics of the task's own batch, in eval mode too (transductive: query "
            "examples are normalised together), and leaves the running statistics alone"
        )
    if problem.task_chunk is not None and chosen != "torch":
        lines.append(
            f"task_chunk={problem.task_chunk} has no use here: only the torch backend runs tasks side by side"
        )
    if problem.order == "first" and problem.steps and problem.query is not None:
        lines.append(
            "first order: derivatives of the inner gradients are dropped; the meta-gradient is not exact"
        )
    return tuple(lines)
