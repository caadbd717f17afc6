"""The vector machine on the CPU: any module whose steps can be traced, as primitive operators over
strided views, a task a thread or a task in every SIMD lane.

docs/machine.md says how a module becomes a program.
"""

from __future__ import annotations

import torch

from fastmeta.backends import _checkpoints, _inputs
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._native_rules import refuses_native_rule
from fastmeta.backends.machine import plan as plans
from fastmeta.backends.machine import run as runs
from fastmeta.backends.machine.choice import lanes_are_worth_it, slower
from fastmeta.problem import Problem, Result
from fastmeta.trace.record import UntraceableError

try:
    from fastmeta import _C
except ImportError as error:  # said by missing()
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

_DTYPES = (torch.float32, torch.float64)


def missing() -> str:
    """Why this backend cannot run anything here, "" if it can."""
    if _C is None:
        return f"the extension fastmeta._C is not built ({_IMPORT_ERROR}); reinstall with a C++ compiler"
    return ""


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`, "" if it can: the module is traced, and compared with
    itself, once."""
    if reason := refuses_native_rule(problem, own=True):
        return reason
    first = next(iter(problem.params.values()), None)
    if first is None:
        return "the network has no parameters"
    if first.device.type != "cpu":
        return f"tensors are on {first.device}"
    if first.dtype not in _DTYPES or any(p.dtype != first.dtype for p in problem.params.values()):
        return f"parameters must all be float32 or all float64, got {first.dtype} first"
    if problem.third:
        return "a third derivative is wanted"
    if not _inputs.runs(problem):
        return "nothing is run"
    if autocast_dtype(first.device) is not None:
        return "autocast is active"
    for loss in (problem.loss, problem.query_loss):
        if loss is not None and loss.learned:
            return f"`{loss.learned}` of the loss {loss.kind} requires grad"
    for batch in (problem.support, problem.query):
        for tensor in () if batch is None else _inputs.parts_of(batch, "").values():
            if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != first.dtype):
                return f"a tensor of a set is {tensor.dtype}"
    found = plans.programs(problem, wrt)
    if isinstance(found, str):
        return found
    rule = plans.own_rule(problem, wrt)
    if isinstance(rule, str):
        return rule
    key = f"checked {sorted(wrt)}"
    if key not in problem.scratch:
        try:
            reason = plans.check_first(problem, wrt, _unchecked)
            if not reason and rule is not None:
                reason = plans.check_rule(problem, wrt, _unchecked)
        except UntraceableError as error:
            reason = str(error)
        if reason:
            plans.remember_refusal(problem, wrt, reason)
            return reason
        problem.scratch[key] = True
    return ""


def yields(problem: Problem, wrt: frozenset[str]) -> str:
    """Why "auto" had better take a later backend for a problem that is not refused, "" if not."""
    found = plans.programs(problem, wrt)
    dtype = next(iter(problem.params.values())).dtype
    return found if isinstance(found, str) else slower(problem, found, dtype)


def faster_in_lanes(problem: Problem, wrt: frozenset[str]) -> str:
    """Why a problem that the `cpu` backend can run is faster here, "" where it is not: a task in
    every lane, where all lanes are full and their numbers stay in the cache."""
    if missing() or not lanes_are_worth_it(problem) or refuses(problem, wrt):
        return ""
    if not _job(problem, wrt, False).plan.lanes:
        return ""
    return f"the machine is faster here, with {problem.tasks} tasks side by side in the lanes"


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`.

    Raises:
        ValueError: a class index is out of range, or a learning rate is not finite.
        IndexError: an index that the module reads rows by is out of range.
    """
    job = _job(problem, wrt, adapted)
    if problem.rates is not job.number_rates:
        _inputs.check_rates(problem)
        rates = problem.rates.values()
        one = all(rate.numel() == 1 and rate.data_ptr() == next(iter(rates)).data_ptr() for rate in rates)
        job.number_rates = problem.rates if one else None
    return job.run(problem)


def _unchecked(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    return _job(problem, wrt, adapted).run(problem)


def _job(problem: Problem, wrt: frozenset[str], adapted: bool) -> runs.Job:
    job: runs.Job | None = problem.scratch.get("machine")
    if job is None or job.wrt != wrt or job.adapted != adapted:
        found = plans.programs(problem, wrt)
        if isinstance(found, str):
            raise RuntimeError(found)
        job = problem.scratch["machine"] = runs.Job(problem, wrt, adapted, found)
    return job


def poison(on: bool) -> None:
    """Fill scratch memory with NaN before every call, for tests."""
    runs.POISON = on


def cost(problem: Problem, wrt: frozenset[str]) -> dict[str, int]:
    """Multiply-adds of the products of one meta-step, by memory mode."""
    job = _job(problem, wrt, False)
    found, rows = job.programs, not job.plan.lanes
    support, query = (found.program(role, job.dtype, rows) for role in ("support", "query"))
    asked = 0 if query is None else sum(query.multiply_adds())
    once, gradient, product = (0, 0, 0) if support is None else support.multiply_adds()
    modes = {"store": gradient + product}
    if product:
        modes["recompute"] = 2 * gradient + product
    if job.plan.memory == "checkpoint":
        again = _checkpoints.run_again(problem, job.plan.copy_bytes)
        modes["checkpoint"] = round((1 + again) * gradient) + product
    if job.plan.memory in modes and problem.memory != "auto":
        modes = {problem.memory: modes[problem.memory]}
    return {mode: problem.tasks * (once + problem.steps * each + asked) for mode, each in modes.items()}


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """How `problem` runs here."""
    job = _job(problem, wrt, False)
    how = "a task in every lane" if job.plan.lanes else "a task a thread"
    few = job.plan.few
    tables = [] if few is None else [f"{t.most} of {t.rows} rows" for t in few.tables.values()]
    copies = [_checkpoints.said(problem, job.plan.copy_bytes)] if job.plan.memory == "checkpoint" else []
    return [
        f"traced: {how} ({_C.instruction_set()}, {str(job.dtype).removeprefix('torch.')})",
        *copies,
        f"memory: {job.plan.memory}, {job.plan.machine.workspace_bytes / 1024:.0f} KiB for each thread",
        *([f"tables: at most {', '.join(tables)} take part in a task"] if tables else []),
    ]
