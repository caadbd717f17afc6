"""Update rules on the `inductor` backend, what it traces being run as it is: rules themselves are
not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_loops import CASES, RuleCase, errors, meta_gradient, problem
from torch import nn
from traced_programs import run_as_traced

import fastmeta as fm
from fastmeta.backends import inductor

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(inductor.missing()), reason=inductor.missing() or "present"),
]
WRT = ("params", "lr", "rule", "support_x", "query_x")


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_gradients_match_autograd(case: RuleCase, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_traced(monkeypatch)
    net, params, data = problem()
    weights = (0.3, 0.0, 0.2, 1.0)
    for factor in (1.0, 0.7):  # another call of the same sort, which reads other numbers
        lr, numbers = torch.tensor(factor * case.lr, dtype=torch.float64), case.tensors(3)
        numbers = {name: value * (0.9 + 0.1 * factor) for name, value in numbers.items()}
        how: dict[str, Any] = {"step_weights": weights}
        want = meta_gradient(case, net, params, data, lr, numbers, 3, first_order=order == "first", **how)
        got = fm.meta_gradient(
            net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=3, order=order,
            update_rule=case.make(numbers), wrt=WRT, backend="inductor", **how,
        )  # fmt: skip
        for what, error in errors(got, want).items():
            assert error < 1e-9, what


def test_refuses_rules_of_ones_own() -> None:
    net, params, (x, y, *_) = problem()
    rule = fm.CustomRule(nn.Identity())
    with pytest.raises(fm.BackendUnavailable, match="the update rule is CustomRule"):
        fm.inner_sgd(net, params, x, y, loss="mse", lr=1.0, steps=1, update_rule=rule, backend="inductor")
