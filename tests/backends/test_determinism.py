"""The cpu backend gives the same bits on any number of threads, from any thread, and in a forked
child."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.convolutional import image_net
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.models import Conv4
from fastmeta.problem import Problem
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import Key, quantities, relative_error

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)

RUNNABLE = [case for case in VERIFICATION if case.loss != "bce_weighted"]
#: More tasks than threads, fewer, not divisible; rows split inside of a task.
SHAPES = [
    Case("wide", partial(mlp, (31, 100, 65, 5)), (31,), tasks, shots, 29, 2, "ce", kinks=True)
    for tasks in (1, 2, 5, 17, 33)
    for shots in (1, 10, 70)
]
#: Images whose layers are large enough to be shared out where there are more threads than tasks.
IMAGES = [
    Case(
        label,
        partial(Conv4, 5, width=24, image_size=20, form=form),
        (1, 20, 20),
        tasks,
        3,
        4,
        2,
        "ce",
        kinks=True,
    )
    for label, form in (("pooled", "max_pool"), ("strided", "strided"))
    for tasks in (1, 2)
]
#: Windows of more taps than a tile collects pointers for: which of them a tile reads depends on its
#: other pixels.
TAPS = [
    Case(
        f"taps{kernel}",
        partial(image_net, *(partial(nn.Conv2d, 6, 24, kernel, padding=2), nn.Tanh), shape=(6, 9, 7)),
        (6, 9, 7),
        1,
        5,
        3,
        1,
        "ce",
    )
    for kernel in (5, 7)
]
SINUSOID = WORKLOADS["sinusoid"][3]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _solve(case: Case, dtype: torch.dtype = torch.float32) -> dict[Key, Tensor]:
    return _solution(case, problem_of(case, dtype, 0))


def _solution(case: Case, problem: Problem) -> dict[Key, Tensor]:
    return quantities(backends.get("cpu").solve(problem, wanted(case, problem), case.operator == "inner_sgd"))


def _same(a: dict[Key, Tensor], b: dict[Key, Tensor]) -> bool:
    """Bit for bit; the sign of zero counts, nan is never the same."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and torch.equal(a[key].signbit(), b[key].signbit()) for key in a
    )


@pytest.mark.parametrize("case", [*RUNNABLE, *SHAPES, *IMAGES, *TAPS], ids=lambda case: case.id)
def test_bits_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(_solve(case))
    assert [i for i, result in enumerate(results) if not _same(result, results[0])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_two_runs_give_the_same_bits(memory: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    case = replace(SINUSOID, memory=memory, wrt_inputs=True)
    first = _solve(case, dtype)
    assert all(_same(_solve(case, dtype), first) for _ in range(20))


def test_bits_do_not_depend_on_what_ran_before() -> None:
    torch.set_num_threads(2)
    fresh = _solve(SINUSOID)
    for case in RUNNABLE[::7]:
        _solve(case, torch.float64)
    assert _same(_solve(SINUSOID), fresh)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls_match_calls_one_by_one(threads: int) -> None:
    torch.set_num_threads(threads)
    cases = [SINUSOID, SHAPES[0], SHAPES[7], RUNNABLE[0], RUNNABLE[-1]] * 8
    alone = {case: _solve(case) for case in set(cases)}
    problems = [problem_of(case, torch.float32, 0) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(_solution, cases, problems))
    assert [
        case.id for case, result in zip(cases, together, strict=True) if not _same(result, alone[case])
    ] == []


def test_one_problem_from_many_threads_matches_reference() -> None:
    """The operators hand one plan and one scratch dict to every thread."""
    case = replace(SINUSOID, tasks=9)
    problem = problem_of(case, torch.float64, 0)
    wrt = wanted(case, problem)
    cpu = backends.get("cpu")
    ref = quantities(backends.get("reference").solve(problem, wrt, False))
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: quantities(cpu.solve(problem, wrt, False)), range(64)))
    assert max(relative_error(out, ref, list(ref)) for out in outs) <= 1e-9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gives_the_same_bits() -> None:
    """As in a DataLoader worker: the parent's pool has started, the child has none of its
    threads."""
    torch.set_num_threads(2)
    # drawing a case runs the network in PyTorch, whose OpenMP threads hang in a child
    problem, again, later = (problem_of(SINUSOID, torch.float32, 0) for _ in range(3))
    here = _solution(SINUSOID, problem)
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run in the child: it leaves by its exit status only.
        status = 1
        try:
            status = 0 if _same(_solution(SINUSOID, again), here) else 2
        finally:
            os._exit(status)
    status = _wait(child, seconds=60)
    assert status == 0, "the child hung" if status is None else f"the child left with status {status}"
    assert _same(_solution(SINUSOID, later), here)


def _wait(child: int, seconds: float) -> int | None:
    """The exit status of a child, or None (and no child any more) if it takes too long."""
    import signal
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
