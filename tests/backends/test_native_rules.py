"""Update rules on the C++ engines against the reference, with every form of rates and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import _C
from fastmeta.backends.machine.choice import forced
from fastmeta.cases.rules import RULES, rule_of_case
from fastmeta.update_rules.rule import NUMBERS

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, STEPS, F64 = 11, 3, torch.float64
ENGINES = [("cpu", None), ("machine", False), ("machine", True)]
#: Two each, so that all forms of rates meet all options.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers": ("number", {}),
    "elements, first order": ("element", {"order": "first"}),
    "tasks, recomputed": ("task", {"memory": "recompute"}),
    "steps, step weights": ("step", {"step_weights": (0.1, 0.2, 0.3, 0.4)}),
    "elements, a set a step": ("element", {"support_per_step": True}),
}


def _rates(form: str, params: dict[str, Tensor]) -> Any:
    if form == "element":
        return {n: torch.rand(1, 1, *p.shape, dtype=F64) / 10 for n, p in params.items()}
    if form == "task":
        return {n: torch.rand(1, TASKS, *[1] * p.dim(), dtype=F64) / 10 for n, p in params.items()}
    return torch.tensor([0.05, 0.02, 0.03], dtype=F64) if form == "step" else 0.05


def _answer(
    net: nn.Module, sets: list[Any], lr: Any, rule: Any, backend: str, **given: Any
) -> dict[str, Any]:
    wrt = ["params", "lr", "support_x", *(["rule"] if rule.learned else [])]
    found = fm.meta_gradient(
        net, dict(net.named_parameters()), *sets, loss="mse", lr=lr, steps=STEPS, update_rule=rule, wrt=wrt,
        backend=backend, **given,
    )  # fmt: skip
    rates = found.lr if isinstance(found.lr, dict) else {"lr": found.lr}
    groups = {"params": found.grads, "lr": rates, "rule": found.rule}
    named = {f"{group}.{n}": v for group, values in groups.items() for n, v in (values or {}).items()}
    return {**named, "losses": found.task_losses, "support_x": found.support_x}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", RULES)
def test_matches_reference(name: str, options: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).to(F64)
    form, given = OPTIONS[options]
    lead = (TASKS, STEPS) if given.get("support_per_step") else (TASKS,)
    draw = [
        torch.randn(*at, dtype=F64) for at in ((*lead, 5, 3), (*lead, 5, 2), (TASKS, 5, 3), (TASKS, 5, 2))
    ]
    sets = [(draw[0], draw[1]), (draw[2], draw[3])]
    rule = rule_of_case(name, F64, torch.device("cpu"), STEPS)
    lr = _rates(form, dict(net.named_parameters()))
    expected = _answer(net, sets, lr, rule, "reference", **given)
    for backend, lanes in ENGINES:
        with forced(lanes):
            found = _answer(net, sets, lr, rule, backend, **given)
        assert found.keys() == expected.keys()
        for what, value in expected.items():
            torch.testing.assert_close(
                found[what], value, rtol=1e-9, atol=1e-11, msg=lambda m, w=what, b=backend: f"{w} on {b}: {m}"
            )


@pytest.mark.parametrize(("backend", "lanes"), ENGINES)
@pytest.mark.parametrize("units", [1, 16, 17])
def test_padding_has_no_part(backend: str, lanes: bool | None, units: int) -> None:
    """Without eps the rule divides zero by zero wherever a parameter is padded."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, units), nn.Tanh(), nn.Linear(units, 2)).to(F64)
    draw = [torch.randn(TASKS, 5, n, dtype=F64) for n in (3, 2, 3, 2)]
    rule = fm.Adam(eps=0.0, clip_norm=torch.tensor(0.3, dtype=F64))
    sets = [(draw[0], draw[1]), (draw[2], draw[3])]
    expected = _answer(net, sets, 0.05, rule, "reference")
    with forced(lanes):
        found = _answer(net, sets, 0.05, rule, backend)
    for what, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[what], value, rtol=1e-8, atol=1e-10)


def test_numbers_stand_in_the_order_of_the_engines() -> None:
    assert tuple(_C.rule_numbers()) == NUMBERS


@pytest.mark.parametrize("backend", ["cpu", "machine"])
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).to(F64)
    draw = [torch.randn(TASKS, 5, n, dtype=F64) for n in (3, 2, 3, 2)]
    rule = rule_of_case("adam", F64, torch.device("cpu"), STEPS)
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(_answer(net, [(draw[0], draw[1]), (draw[2], draw[3])], 0.05, rule, backend))
    for other in answers[1:]:
        for what, value in answers[0].items():
            assert torch.equal(other[what], value), what


class Beside(nn.Module):
    """A unit that is never on, beside a path that goes around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.inner.bias[0] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(x + self.inner(x).relu())


@pytest.mark.parametrize(("backend", "lanes"), ENGINES)
def test_nan_stays_where_autograd_has_it(backend: str, lanes: bool | None, seeded: None) -> None:
    """Adam's root has no derivative at the weights of that unit."""
    net = Beside().to(F64)
    draw = [torch.randn(TASKS, 5, n, dtype=F64) for n in (3, 2, 3, 2)]
    sets = [(draw[0], draw[1]), (draw[2], draw[3])]
    expected = _answer(net, sets, 0.05, fm.Adam(), "reference")
    assert any(value.isnan().any() for value in expected.values())
    assert not all(value.isnan().any() for value in expected.values())
    with forced(lanes):
        found = _answer(net, sets, 0.05, fm.Adam(), backend)
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, rtol=1e-8, atol=1e-10, equal_nan=True, msg=what)
