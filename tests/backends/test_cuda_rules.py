"""Update rules on the cuda backend, its kernels compiled as ordinary C++: in value and in every
gradient as autograd through loops in plain PyTorch."""

from __future__ import annotations

import re

import pytest
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
from torch import nn

import fastmeta as fm
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.update_rules.rule import NUMBERS

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU"),
]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


#: The formulas are those of the C++ engine, which other tests compare in all of these.
SOME = [(label, how) for label, how in ALL if how != "numbers" or label == "sgd_nesterov"]


@pytest.mark.parametrize(("label", "how"), SOME)
def test_gradients_match_autograd(label: str, how: str) -> None:
    assert_matches_autograd(case_of(label), "cuda", VARIANTS[how])


def test_twenty_steps() -> None:
    assert_matches_autograd(case_of("rmsprop_centered"), "cuda", Variant(20))


def test_a_dead_unit_is_nan_where_the_formula_is() -> None:
    assert_dead_units_match(DEAD[0], "cuda")


def test_zero_gradients_clipped_by_their_norm() -> None:
    assert_zero_gradients_match(backend="cuda")


#: Bytes of shared memory, and blocks of a cluster.
CHIPS = {"little": (6_000, 1), "cluster": (12_000, 2)}


@pytest.mark.parametrize("where", CHIPS)
def test_blocks_of_three_threads_and_small_memory(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm, and gradients of numbers, are sums over threads; a parameter is frozen."""
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "3")
    monkeypatch.setattr(launches, "EMULATED", plans.Chip(*CHIPS[where]))
    net = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 2)).double()
    rule = fm.AdamW(
        (number(0.9), 0.99), number([1e-3, 2e-3]), weight_decay=number(0.2),
        clip_value=number(0.1), clip_norm=number(0.2),
    )  # fmt: skip
    lr = {name: number(0.05) for name, _ in net.named_parameters() if name != "0.bias"}
    data = random_sets(3, 5, 2)
    assert_matches_reference(net, data, rule, "cuda", lr=lr, steps=2, adapt=list(lr))
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, update_rule=rule, backend="cuda")
    text = str(maml.explain(*data))
    assert ("gradients and states" in text) == (where == "little")
    assert ("cluster of 2 blocks" in text) == (where == "cluster")


def test_a_parameter_that_is_not_read() -> None:
    assert_unread_parameters_match("cuda")
    net, data = Idle().double(), random_sets(2, 3, 2)
    for rule in (fm.SGD(weight_decay=0.1), fm.AdamW(weight_decay=number(0.1))):
        with pytest.raises(fm.BackendUnavailable, match="weight decay moves `idle`, which no layer reads"):
            assert_matches_reference(net, data, rule, "cuda", lr=0.1, steps=2)


def test_the_gradient_of_a_parameter_that_is_not_read_is_its_own() -> None:
    net, data = Idle().double(), random_sets(2, 3, 2)
    params = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    adapted = fm.inner_sgd(net, params, *data[:2], loss="mse", lr=0.1, steps=2, backend="cuda")
    adapted["idle"].sum().backward()
    assert params["idle"].grad.tolist() == [2.0] * 4


def test_no_step_asks_for_nothing() -> None:
    assert_no_step_is_zero("cuda")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lr_element_step_task-adam", "float64"),
        ("lr_head-adam-own_some", "float64"),
        ("inner_sgd-adam", "float64"),
        ("mse-adagrad", "float32"),
    ],
)
def test_cases_match_reference(name: str, dtype: str) -> None:
    """`FASTMETA_CUDA_EMULATE=1 fastmeta verify --backend cuda` runs all of them."""
    assert_case_matches(name, "cuda", dtype)


def test_a_rule_of_ones_own_is_refused() -> None:
    assert_custom_rules_are_refused("cuda")


def test_numbers_stand_in_the_order_of_the_header() -> None:
    text = (compiler.source_folder() / "shared" / "update_rules.h").read_text()
    rows = text.partition("#define FM_RULE_NUMBERS(F)")[2].partition("#define")[0]
    assert tuple(re.findall(r"F\((\w+)\)", rows)) == NUMBERS
