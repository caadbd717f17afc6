"""The C++ engine on the CPU: SIMD inside a task, tasks over threads, the same bits on any number of
threads."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastmeta.backends import _checkpoints, _hoisting, machine
from fastmeta.backends._layers import refuses_layers, without_kernels
from fastmeta.backends._losses import refuses_loss
from fastmeta.backends._native_rules import refuses_native_rule
from fastmeta.backends._rules import refuses_unread
from fastmeta.backends.cpu import plan as plans
from fastmeta.backends.cpu import run as runs
from fastmeta.problem import Problem, Result

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
    """Why this backend cannot run `problem`, "" if it can; reads shapes, dtypes and options
    only."""
    if reason := refuses_native_rule(problem):
        return reason
    program = problem.program
    if program is None:
        return f"the network was not captured: {problem.refused}"
    first = next(iter(problem.params.values()))
    if first.device.type != "cpu":
        return f"tensors are on {first.device}"
    if first.dtype not in _DTYPES or any(p.dtype != first.dtype for p in problem.params.values()):
        return f"parameters must all be float32 or all float64, got {first.dtype} first"
    if reason := without_kernels(program, *_known()):
        return reason
    if reason := refuses_layers(problem):
        return reason
    used = plans.used_params(program)
    if not used:
        return "the output depends on no parameter"
    if reason := refuses_unread(problem, used):
        return reason
    for batch, loss in ((problem.support, problem.loss), (problem.query, problem.query_loss)):
        if batch is not None and batch.x.dtype != first.dtype:
            return f"the network's input is {batch.x.dtype}"
        if loss is not None and (reason := refuses_loss(loss)):
            return reason
    return ""


def yields(problem: Problem, wrt: frozenset[str]) -> str:
    """Why "auto" had better take the machine, "" if not."""
    return machine.faster_in_lanes(problem, wrt)


@lru_cache(maxsize=1)
def _known() -> tuple[frozenset[str], frozenset[str]]:
    """The layer kinds and the element-wise functions that the extension was built with."""
    return frozenset(_C.kinds()), frozenset(_C.functions())


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`.

    Raises:
        ValueError: a class index is out of range, or a learning rate is not finite.
    """
    return _hoisting.solve(_solve, refuses, problem, wrt, adapted)


def _solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    scratch = problem.scratch
    job = scratch.get("cpu")
    if job is None or job.wrt != wrt or job.adapted != adapted:
        job = scratch["cpu"] = runs.Job(problem, wrt, adapted)
    return job.run(problem)


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """What runs, in a few lines for `explain()`."""
    return _hoisting.describe(_describe, refuses, problem, wrt)


def _describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    job = runs.Job(problem, wrt, False)
    kinds = [layer.function or layer.kind for layer in problem.program.layers]  # type: ignore[union-attr]
    copies = []
    if job.memory == "checkpoint":
        copies = [_checkpoints.said(problem, plans.checkpoint_bytes(problem))]
    return [
        f"kernels: {' '.join(kinds)} ({_C.instruction_set()}, {str(job.dtype).removeprefix('torch.')})",
        *copies,
        f"memory: {job.memory}, {job.plan.workspace_bytes / 1024:.0f} KiB for each of at most "
        f"{min(problem.tasks, torch.get_num_threads())} threads",
    ]


def checkpoint_bytes(problem: Problem) -> int:
    """What one copy of theta and the state of the rule takes, of all tasks that run at once, in
    bytes."""
    return plans.checkpoint_bytes(problem)


def workspace_bytes(problem: Problem, wrt: frozenset[str]) -> int:
    """Bytes of scratch memory that one running task takes for this problem."""
    plan = _hoisting.hoisted(refuses, problem, wrt)
    parts = (
        [(problem, wrt)] if plan is None else [(part, of) for _, part, of in _hoisting.parts(problem, plan)]
    )
    return max(
        int(plans.make_plan(part, of, plans.memory_mode(part, of)).workspace_bytes) for part, of in parts
    )


def parameter_set_bytes(problem: Problem) -> int:
    """Bytes of one set of parameters in the engine's padded layout."""
    return int(plans.make_plan(problem, frozenset(), "store").parameter_set_bytes)


def poison(on: bool) -> None:
    """Fill scratch memory and outputs with NaN before every call, for tests."""
    runs.POISON = on
