"""The case list itself, and that the rule it is judged by can say no."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.case import OPERATORS, RATES
from fastmeta.cases.losses import LOSSES
from fastmeta.cases.networks import ACTIVATIONS
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.losses import resolve
from fastmeta.verify import rule, runs, verify_case
from fastmeta.verify.kinks import KinkDistance
from fastmeta.verify.permute import Permutation
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import quantities, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

BY_ID = {case.id: case for case in VERIFICATION}
SMOOTH = BY_ID["tanh-T3-N7-M5-K2-mse"]
KINKED = BY_ID["relu-3x13x7x2-T3-N7-M5-K2-mse"]


def _tensors(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    made = case.build(dtype, seed)
    for field in fields(made):
        value = getattr(made, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, dict):
            found.update({f"{field.name}.{name}": entry for name, entry in value.items()})
    return found


def test_case_ids_are_unique() -> None:
    cases = [*VERIFICATION, *(case for workload in WORKLOADS.values() for case in workload)]
    assert len({case.id for case in cases}) == len(cases)


def test_the_list_reaches_every_layer_loss_and_option() -> None:
    labels = " ".join(case.label for case in VERIFICATION)
    assert [name for name in ACTIVATIONS if f"{name}-" not in labels] == []
    assert {case.loss for case in VERIFICATION} == set(LOSSES)
    assert {case.rates for case in VERIFICATION} == set(RATES)
    assert {case.operator for case in VERIFICATION} == set(OPERATORS)
    assert {case.steps for case in VERIFICATION} >= {0, 1, 2, 3}
    assert {case.memory for case in VERIFICATION} == {"auto", "store", "recompute", "checkpoint"}
    assert {case.per_task for case in VERIFICATION} == {"", "all", "some"}


@pytest.mark.parametrize("case", VERIFICATION[::9], ids=lambda case: case.id)
def test_a_seed_gives_the_same_numbers_in_both_dtypes(case: Case) -> None:
    single, double, other = (
        _tensors(case, torch.float32),
        _tensors(case, torch.float64),
        _tensors(case, torch.float32, 1),
    )
    assert single.keys() == double.keys()
    for name, value in single.items():
        assert torch.equal(value.double(), double[name].double()), name
    assert not torch.equal(single["query_x"], other["query_x"])
    assert single["query_x"].dtype == torch.float32
    assert double["query_x"].dtype == torch.float64


@pytest.mark.parametrize("case", VERIFICATION, ids=lambda case: case.id)
def test_kinks_are_declared(case: Case) -> None:
    problem = problem_of(case, torch.float64, 0)
    with KinkDistance(problem.loss, problem.query_loss) as kinks:
        backends.get("reference").solve(problem, wanted(case, problem), False)
    assert math.isfinite(kinks.smallest) == case.kinks


def test_kink_distance_finds_the_nearest_argument() -> None:
    with KinkDistance(resolve(torch.nn.HuberLoss(delta=0.5))) as kinks:
        torch.nn.functional.relu(torch.tensor([3.0, -0.25]))
        assert kinks.smallest == 0.25
        resolve(torch.nn.HuberLoss(delta=0.5))(torch.tensor([[1.0]]), torch.tensor([[0.375]]))
    assert kinks.smallest == 0.125


PERMUTED = ("tanh-T3-N7-M5-K3-mse-per_step", "bn_mlp-T3-N7-M5-K2-ce", "ln_mlp-T3-N7-M5-K2-ce")


@pytest.mark.parametrize(
    "case", [SMOOTH, KINKED, *(BY_ID[case_id] for case_id in PERMUTED)], ids=lambda case: case.id
)
def test_permuted_run_matches_reference(case: Case) -> None:
    problem = problem_of(case, torch.float64, 0)
    permutation = Permutation(problem, 3)
    shuffled = permutation.apply(problem)
    assert not torch.equal(shuffled.support.x, problem.support.x)
    assert not torch.equal(shuffled.params["0.weight"], problem.params["0.weight"])
    result = backends.get("reference").solve(shuffled, wanted(case, problem), True)
    out, ref = quantities(permutation.undo(problem, result)), runs.truth(case, 0).tensors
    errors = rule.errors({key: value for key, value in out.items() if key in ref}, ref, torch.float64)
    assert max(errors.values()) <= rule.FLOAT64


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [SMOOTH, KINKED], ids=lambda case: case.id)
def test_rejects_a_gradient_that_is_a_little_wrong(
    case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.get("torch")
    solve = backend.solve

    def wrong(*arguments: object) -> object:
        result = solve(*arguments)
        result.grads.params["2.weight"] *= 1 + (1e-8 if dtype == "float64" else 1e-5)
        return result

    assert all(row.passed for row in verify_case(case, "torch", dtype))
    monkeypatch.setattr(backend, "solve", wrong)
    failed = [row.quantity for row in verify_case(case, "torch", dtype) if not row.passed]
    assert any(name.startswith("d_params 2.weight") for name in failed)


def test_rejects_a_missing_gradient_and_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get("torch")
    solve = backend.solve

    def incomplete(*arguments: object) -> object:
        result = solve(*arguments)
        return replace(result, grads=replace(result.grads, lr=None))

    monkeypatch.setattr(backend, "solve", incomplete)
    failed = {row.quantity.split()[0] for row in verify_case(SMOOTH, "torch", "float64") if not row.passed}
    assert failed == {"d_lr"}
    monkeypatch.setattr(backend, "solve", lambda *_: 1 / 0)
    (row,) = verify_case(SMOOTH, "torch", "float64")
    assert not row.passed
    assert "ZeroDivisionError" in row.note


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rejects_what_is_not_finite(bad: float) -> None:
    ref = {("output", ""): torch.ones(3)}
    out = {("output", ""): torch.tensor([1.0, bad, 1.0])}
    assert relative_error(out, ref, list(ref)) == math.inf
    row = rule.Row("case", "cpu", "float32", "output", math.nan, 0.0, 1.0)
    assert not row.passed


def test_rejects_a_wrong_shape_and_something_where_nothing_should_be() -> None:
    zero = {("d_support_x", ""): torch.zeros(3)}
    assert relative_error({("d_support_x", ""): torch.zeros(1)}, zero, list(zero)) == math.inf
    assert relative_error({("d_support_x", ""): torch.full((3,), 1e-3)}, zero, list(zero)) > rule.FLOAT64
    assert relative_error({("d_support_x", ""): torch.zeros(3)}, zero, list(zero)) == 0
