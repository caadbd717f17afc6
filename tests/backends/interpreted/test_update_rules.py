"""Update rules on the Triton backend: in value and in every gradient as autograd through loops in
plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rule_checks import (
    ALL,
    DEAD,
    VARIANTS,
    Idle,
    Variant,
    assert_case_matches,
    assert_custom_rules_are_refused,
    assert_dead_units_match,
    assert_matches_autograd,
    assert_matches_reference,
    assert_no_step_is_zero,
    assert_unread_parameters_match,
    assert_zero_gradients_match,
    case_of,
    number,
    random_sets,
)
from rule_loops import RuleCase
from torch import nn

import fastmeta as fm
from fastmeta.backends.triton import run as runs
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases.verification import VERIFICATION
from fastmeta.kernels.update_rule import BLOCK
from fastmeta.kernels.update_rules.numbers import ROW
from fastmeta.verify.problems import problem_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("label", "how"), ALL)
def test_gradients_match_autograd(label: str, how: str) -> None:
    assert_matches_autograd(case_of(label), "triton", VARIANTS[how])


def test_twenty_steps() -> None:
    assert_matches_autograd(case_of("adamw"), "triton", Variant(20, tasks=1))


@pytest.mark.parametrize("case", [DEAD[0], DEAD[4]], ids=lambda case: case.label)
def test_a_dead_unit_is_nan_where_the_formula_is(case: RuleCase) -> None:
    assert_dead_units_match(case, "triton")


def test_zero_gradients_clipped_by_their_norm() -> None:
    assert_zero_gradients_match(backend="triton")


def test_parameters_of_several_blocks() -> None:
    """The norm, and gradients of numbers, are sums over blocks; a parameter is frozen."""
    data = random_sets(2, 30, 2)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    assert sum(p.numel() for p in net.parameters()) > 2 * BLOCK
    rule = fm.AdamW(
        (number(0.9), 0.99), number([1e-3, 2e-3]), weight_decay=number(0.2),
        clip_value=number(0.1), clip_norm=number(0.2),
    )  # fmt: skip
    lr = {name: number(0.05) for name, _ in net.named_parameters() if name != "0.bias"}
    assert_matches_reference(net, data, rule, "triton", lr=lr, steps=2, adapt=list(lr))


def test_a_parameter_that_is_not_read() -> None:
    assert_unread_parameters_match("triton")
    decays = fm.SGD(number(0.5), number(0.1), nesterov=True)
    assert_matches_reference(Idle().double(), random_sets(2, 3, 2), decays, "triton", lr=0.1, steps=2)


def test_no_step_asks_for_nothing() -> None:
    assert_no_step_is_zero("triton")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lr_element_step_task-adam", "float64"),
        ("lr_head-adam-own_some", "float64"),
        ("mse-adagrad", "float32"),
    ],
)
def test_cases_match_reference(name: str, dtype: str) -> None:
    """`TRITON_INTERPRET=1 fastmeta verify --backend triton` runs all of them."""
    assert_case_matches(name, "triton", dtype)


def test_what_is_kept_is_counted() -> None:
    """Of each step theta, the gradient and the two parts of Adam's state."""
    case = next(case for case in VERIFICATION if case.rule == "adam_plain")
    made = []
    for steps in (4, 5):
        problem = problem_of(replace(case, steps=steps), torch.float32, 0)
        wrt = frozenset({"params"})
        net, on = runs.network(problem, wrt), torch.device("meta")
        made.append(MetaStep(problem, net, wrt, "recompute", "ieee", on))
    sets = 4 * made[0].tasks * made[0].layout.size
    assert made[1].memory.bytes - made[0].memory.bytes == 4 * (sets + ROW)


def test_a_rule_of_ones_own_is_refused() -> None:
    assert_custom_rules_are_refused("triton")
