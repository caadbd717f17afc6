"""Which of the machine's two ways a problem takes, and when PyTorch itself is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastmeta.backends.machine.programs import Programs
from fastmeta.problem import Problem
from fastmeta.trace.ir import Space
from fastmeta.trace.passes.tables import Few

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

#: What all lanes together may hold at once, in bytes: measured where the second-level cache has 1
#: MiB, a task in every lane wins below and loses above.
_LANES_AT_MOST = 3 << 19
#: Multiply-adds of one step of one task above which PyTorch's own threads inside of a product pay,
#: where there are more threads than tasks.
_LARGE = 20_000_000

#: How much of all lanes of all threads must have tasks for them to beat the row engine of the `cpu`
#: backend; then they do, 1.1 to 1.6 times, on every network that fits (10 to 100 units measured).
_LANES_FILLED = 0.8

_forced: bool | None = None


@contextmanager
def forced(lanes: bool | None) -> Iterator[None]:
    """Take one of the two ways, whatever the sizes say; for tests and measurements."""
    global _forced
    before, _forced = _forced, lanes
    try:
        yield
    finally:
        _forced = before


def in_lanes(problem: Problem, programs: Programs, dtype: torch.dtype, few: Few | None = None) -> bool:
    """Whether one task is in every lane: where all lanes have one, and together fit the cache."""
    if _forced is not None:
        return _forced
    lanes = int(_C.machine_lanes(dtype == torch.float64))
    if problem.tasks < lanes:
        return False
    traced = [t for t in (programs.support, programs.query) if t is not None]
    theta = max((t.layout.sizes.get(Space.THETA, 0) for t in traced), default=0)
    if few is not None:
        theta = few.size
    if _bytes(4 * theta, lanes, dtype) > _LANES_AT_MOST:
        return False
    for role in ("support", "query"):
        program = programs.program(role, dtype, False, few)
        if program is not None:
            own = sum(program.sizes.get(s, 0) for s in (Space.WORK, Space.KEPT, Space.ONCE, Space.OTHER))
            if _bytes(own + 4 * theta, lanes, dtype) > _LANES_AT_MOST:
                return False
    return True


def lanes_are_worth_it(problem: Problem) -> bool:
    """Whether a task in every lane may be faster than the row engine: a first look, at the numbers
    of tasks and parameters alone."""
    first = next(iter(problem.params.values()))
    if _forced is not None or problem.steps == 0 or first.dtype not in (torch.float32, torch.float64):
        return False
    lanes = int(_C.machine_lanes(first.dtype == torch.float64))
    groups, threads = -(-problem.tasks // lanes), torch.get_num_threads()
    rounds = -(-groups // threads)
    if problem.tasks < _LANES_FILLED * lanes * threads * rounds:
        return False
    own = {name: problem.tasks if name in problem.per_task else 1 for name in problem.rates}
    theta = sum(problem.params[name].numel() // tasks for name, tasks in own.items())
    return _bytes(4 * theta, lanes, first.dtype) <= _LANES_AT_MOST


def _bytes(elements: int, lanes: int, dtype: torch.dtype) -> int:
    return elements * lanes * dtype.itemsize


def slower(problem: Problem, programs: Programs, dtype: torch.dtype) -> str:
    """Why "auto" had better take PyTorch, "" if not: the machine runs one task on one thread."""
    if problem.tasks >= torch.get_num_threads() or _forced is not None:
        return ""
    for role in ("support", "query"):
        program = programs.program(role, dtype, rows=True)
        if program is not None and sum(program.multiply_adds()) > _LARGE:
            return (
                f"{problem.tasks} of large tasks for {torch.get_num_threads()} threads: a product of "
                "PyTorch's takes them all"
            )
    return ""
