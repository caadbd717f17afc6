"""The parts of a meta-gradient on the cpu backend, from the one case list: `pytest bench` (needs
pytest-benchmark).

The forward pass alone, query losses after the inner loop, and meta-gradients in float64, to find
what a change did. `fastmeta bench` times the whole in float32 beside other libraries, `fastmeta
cost` both orders in both memory modes. A meta-gradient is compared with the float64 reference
before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastmeta import _C, backends
from fastmeta.benchmark.cost import flops
from fastmeta.cases import Case
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of

CASES = [
    case
    for name, cases in WORKLOADS.items()
    if name not in NOT_CAPTURED
    for case in cases
    if case.tasks <= 32
]
PARAMS = frozenset({"params"})


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _time(
    benchmark: BenchmarkFixture, case: Case, wrt: frozenset[str], threads: int, dtype: torch.dtype
) -> None:
    cpu = backends.get("cpu")
    problem = problem_of(case, dtype, 0)
    benchmark(lambda: cpu.solve(problem, wrt, False))
    if wrt and benchmark.stats is not None:
        peak = _C.fma_peak(str(dtype).removeprefix("torch."), threads)
        benchmark.extra_info["share of peak"] = round(
            flops(case) / benchmark.stats.stats.median / 1e9 / peak, 3
        )


def _check(case: Case) -> None:
    out = runs.run(case, "cpu", torch.float64, 0)
    errors = rule.errors(out, runs.truth(case, 0).tensors, torch.float64)
    assert max(errors.values()) <= rule.FLOAT64


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_query_loss_only(benchmark: BenchmarkFixture, case: Case, threads: int) -> None:
    _time(benchmark, case, frozenset(), threads, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_only(benchmark: BenchmarkFixture, case: Case, threads: int) -> None:
    _time(benchmark, replace(case, operator="task_forward", steps=0), frozenset(), threads, torch.float32)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.id)
def test_float64(benchmark: BenchmarkFixture, case: Case, threads: int) -> None:
    _check(case)
    _time(benchmark, case, PARAMS, threads, torch.float64)
