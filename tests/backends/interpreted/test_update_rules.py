"""Update rules on the Triton backend: in value and in every gradient as autograd through loops in
plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from rule_checks import (
    ALL,
    DEAD,
    VARIANTS,
    Variant,
    assert_dead_units_match,
    assert_matches_autograd,
    assert_matches_reference,
    assert_zero_gradients_match,
    case_of,
)
from rule_loops import RuleCase
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.cases.verification import VERIFICATION
from fastmeta.kernels.update_rule import BLOCK
from fastmeta.verify import verify_case

pytestmark = pytest.mark.usefixtures("one_thread")
number = partial(torch.tensor, dtype=torch.float64)


@pytest.mark.parametrize(("label", "how"), ALL)
def test_gradients_match_autograd(label: str, how: str) -> None:
    assert_matches_autograd(case_of(label), "triton", VARIANTS[how])


def test_twenty_steps() -> None:
    assert_matches_autograd(case_of("adamw"), "triton", Variant(20, tasks=1))


@pytest.mark.parametrize("case", DEAD[:2] + DEAD[3:5], ids=lambda case: case.label)
def test_a_dead_unit_is_nan_where_the_formula_is(case: RuleCase) -> None:
    assert_dead_units_match(case, "triton")


def test_zero_gradients_clipped_by_their_norm() -> None:
    assert_zero_gradients_match("triton")


def _data(tasks: int, inputs: int, outputs: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tasks, 5, n, dtype=torch.float64) for n in (inputs, outputs, inputs, outputs)]


def test_parameters_of_several_blocks() -> None:
    """The norm, and gradients of numbers, are sums over blocks; a parameter is frozen."""
    data = _data(2, 30, 2)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    assert sum(p.numel() for p in net.parameters()) > 2 * BLOCK
    rule = fm.AdamW(
        (number(0.9), 0.99), number([1e-3, 2e-3]), weight_decay=number(0.2),
        clip_value=number(0.1), clip_norm=number(0.2),
    )  # fmt: skip
    lr = {name: number(0.05) for name, _ in net.named_parameters() if name != "0.bias"}
    assert_matches_reference(net, data, rule, "triton", lr=lr, steps=2, adapt=list(lr))


class Idle(nn.Module):
    """A parameter that no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.idle = nn.Linear(3, 2), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_a_parameter_that_is_not_read_decays() -> None:
    net, data = Idle().double(), _data(2, 3, 2)
    rule = fm.SGD(number(0.5), number(0.1), nesterov=True)
    assert_matches_reference(net, data, rule, "triton", lr=0.1, steps=3)


def test_no_step_asks_for_nothing() -> None:
    net, data = nn.Linear(3, 2).double(), _data(2, 3, 2)
    rule = fm.Adam(eps=number(1e-3))
    out = fm.meta_gradient(
        net, dict(net.named_parameters()), tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.1, steps=0,
        update_rule=rule, wrt=("params", "rule"), backend="triton",
    )  # fmt: skip
    assert out.rule is not None
    assert float(out.rule["eps"]) == 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lr_element_step_task-adam", "float64"),
        ("lr_head-adam-own_some", "float64"),
        ("inner_sgd-adam", "float64"),
        ("mse-adamw", "float32"),
    ],
)
def test_cases_match_reference(name: str, dtype: str) -> None:
    """All cases with rules: `TRITON_INTERPRET=1 fastmeta verify --backend triton --case adam`."""
    case = next(case for case in VERIFICATION if case.rule and name in case.id)
    rows = verify_case(case, "triton", dtype)
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []


def test_what_is_kept_is_counted() -> None:
    """Of each step the gradient, and the two parts of Adam's state but for the last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))
    data = [x.float() for x in _data(4, 30, 2)]
    said = {}
    for steps in (4, 5):
        maml = fm.MAML(
            net, loss="mse", inner_lr=0.1, inner_steps=steps, update_rule=fm.Adam(), memory="recompute",
            backend="triton",
        )  # fmt: skip
        text = str(maml.explain(*data))
        said[steps] = float(text.split("memory: recompute, ")[1].split(" MiB")[0])
    size = 4 * sum(-(-p.numel() // 16) * 16 for p in net.parameters()) * 4
    assert said[5] - said[4] == pytest.approx(4 * size / 2**20, abs=0.1)  # theta, gradient, state


def test_a_rule_of_ones_own_is_refused() -> None:
    net, data = nn.Linear(3, 2).double(), _data(2, 3, 2)
    with pytest.raises(fm.BackendUnavailable, match="the update rule is CustomRule"):
        fm.inner_sgd(
            net, dict(net.named_parameters()), *data[:2], loss="mse", lr=1.0, steps=1,
            update_rule=fm.CustomRule(nn.Identity()), backend="triton",
        )  # fmt: skip
