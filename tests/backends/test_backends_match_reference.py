"""Every backend against the float64 reference, in value and in every gradient, on every case of the
list."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.verification import VERIFICATION
from fastmeta.problem import Batch, Problem
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"f64": "float64", "f32": "float32"}
#: The cpu backend may be missing only where it was left out on purpose, never because its build
#: broke.
NO_EXTENSION = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)
BACKENDS = [pytest.param("cpu", marks=NO_EXTENSION), "torch"]
#: What a backend says no to; any other refusal is a failure.
REFUSED = {"cpu": {"bce_weighted"}, "torch": set()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VERIFICATION, ids=lambda case: case.id)
def test_backend_matches_reference(case: Case, dtype: str, backend: str) -> None:
    rows = verify_case(case, backend, DTYPES[dtype])
    assert rows
    assert any(row.skipped for row in rows) == (case.loss in REFUSED[backend]), rows[0].note
    assert [str(row) for row in rows if not row.passed] == []


SMOOTH = [
    case
    for case in VERIFICATION
    if not case.kinks
    and case.order == "second"
    and case.steps < 20
    and case.loss not in REFUSED["cpu"]
    and not case.rule  # clipping and signs jump; tests/update_rules compares all of them with autograd
    and "0"
    not in case.weighted  # where there are no weights, the loss jumps: its derivative by them is a convention
]

#: Central differences of sixth order: the error is h^6 / 140 times the seventh derivative.
STENCIL = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
STEP = 1e-2


@NO_EXTENSION
@pytest.mark.parametrize("case", SMOOTH[::2], ids=lambda case: case.id)
def test_cpu_gradients_match_finite_differences(case: Case) -> None:
    """The same J, differentiated along a random direction by differences of its value, one input at
    a time."""
    cpu = backends.get("cpu")
    problem = problem_of(case, torch.float64, 0)
    grads = cpu.solve(problem, wanted(case, problem), False).grads
    generator = torch.Generator().manual_seed(1)
    for name in sorted(wanted(case, problem)):
        inputs = _get(problem, name)
        direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in inputs]
        length = sum(float(d.square().sum()) for d in direction) ** 0.5
        # J is far more curved in the rates than in anything else: a step must be small beside them.
        unit = max(float(v.abs().max()) for v in inputs if v.numel()) or 0.01 if name == "lr" else 1.0
        direction = [unit * d / length for d in direction]
        numeric = 0.0
        for steps, weight in STENCIL.items():
            for sign in (1, -1):
                moved = [v + sign * steps * STEP * d for v, d in zip(inputs, direction, strict=True)]
                numeric += sign * weight * _objective(case, _set(problem, name, moved)) / STEP
        gradient = getattr(grads, name)
        gradient = list(gradient.values()) if isinstance(gradient, dict) else [gradient]
        analytic = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        size = unit * sum(float(g.square().sum()) for g in gradient) ** 0.5
        assert abs(analytic - numeric) <= 1e-9 * max(size, 1.0), name


def _objective(case: Case, problem: Problem) -> float:
    """J of `fastmeta.problem`, from the values that the cpu backend returns."""
    result = backends.get("cpu").solve(problem, frozenset(), problem.adapted_grad is not None)
    total = 0.0
    if result.task_losses is not None:
        weights = torch.ones(case.tasks) if problem.task_weights is None else problem.task_weights
        total += float((weights * result.task_losses).sum()) / case.tasks
    for name, cotangent in (problem.adapted_grad or {}).items():
        total += float((cotangent * result.adapted[name]).sum())
    if problem.output_grad is not None:
        total += float((problem.output_grad * result.output).sum())
    return total


def _get(problem: Problem, name: str) -> list[Tensor]:
    if name == "params":
        return list(problem.params.values())
    if name == "lr":
        return list(problem.rates.values())
    side, part = name.split("_")
    return [getattr(getattr(problem, side), part)]


def _set(problem: Problem, name: str, values: list[Tensor]) -> Problem:
    if name == "params":
        return replace(problem, scratch={}, params=dict(zip(problem.params, values, strict=True)))
    if name == "lr":
        return replace(problem, scratch={}, rates=dict(zip(problem.rates, values, strict=True)))
    side, part = name.split("_")
    batch: Batch = replace(getattr(problem, side), **{part: values[0]})
    return replace(problem, scratch={}, **{side: batch})
