"""Update rules on a backend against autograd through loops in plain PyTorch (`rule_loops`), for the
tests of several backends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from rule_loops import CASES, RuleCase, errors, meta_gradient, problem
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify import verify_case

number = partial(torch.tensor, dtype=torch.float64)
WRT = ("params", "lr", "rule", "support_x", "query_x")


@dataclass(frozen=True)
class Variant:
    """How a rule is asked for."""

    steps: int = 3
    tasks: int = 2
    numbers_of_steps: bool = False  # numbers [K] instead of ()
    per_step: bool = False  # a support set for each step
    step_weights: tuple[float, ...] | None = None
    first_order: bool = False
    memory: str = "auto"


VARIANTS = {
    "sets of steps": Variant(
        numbers_of_steps=True, per_step=True, step_weights=(0.3, 0.0, 0.7, 1.0), memory="recompute"
    ),
    "numbers": Variant(tasks=1),
    "first order": Variant(tasks=1, first_order=True),
}
#: Every case of `rule_loops`, and every variant: (label, variant).
ALL = [
    (label, how)
    for how, labels in {
        "sets of steps": "sgd_dampening sgd_clip_norm adam adamw rmsprop_centered adagrad lion",
        "numbers": "sgd sgd_nesterov adam_root rmsprop adagrad_start",
        "first order": "sgd_clip_value adamw rmsprop_centered",
    }.items()
    for label in labels.split()
]
assert {label for label, _ in ALL} == {case.label for case in CASES}
#: A dead unit: NaN, and with `eps_root` none.
DEAD = [
    RuleCase("adam", "Adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}, lr=0.01),
    RuleCase("adam_root", "Adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "eps_root": 1e-6}, lr=0.01),
    RuleCase("adamw", "AdamW", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}, lr=0.01),
    RuleCase("rmsprop", "RMSProp", {"alpha": 0.9, "eps": 1e-8}, lr=0.01),
    RuleCase("adagrad", "Adagrad", {"eps": 1e-8}, lr=0.01),
    RuleCase("sgd", "SGD", {"clip_norm": 0.5}, lr=0.01),
]


def case_of(label: str) -> RuleCase:
    """The case of `rule_loops` with that label."""
    return next(case for case in CASES if case.label == label)


def rates(case: RuleCase, steps: int) -> Tensor:
    """[K], falling."""
    return case.lr * torch.linspace(1, 0.7, steps, dtype=torch.float64)


def assert_matches_autograd(
    case: RuleCase, backend: str, how: Variant, *, dead: bool = False
) -> dict[str, Any]:
    """Losses and every gradient within 1e-9; what autograd found."""
    net, params, data = problem(how.steps if how.per_step else None, how.tasks, dead)
    lr, numbers = rates(case, how.steps), case.tensors(how.steps if how.numbers_of_steps else None)
    tasks = torch.tensor([0.4, 1.7][: how.tasks], dtype=torch.float64)
    weighted = {"step_weights": how.step_weights, "task_weights": tasks}
    want = meta_gradient(
        case, net, params, data, lr, numbers, how.steps,
        per_step=how.per_step, first_order=how.first_order, **weighted,
    )  # fmt: skip
    got = fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=how.steps,
        update_rule=case.make(numbers), wrt=WRT, backend=backend, support_per_step=how.per_step,
        order="first" if how.first_order else "second", memory=how.memory, **weighted,
    )  # fmt: skip
    wrong = {what: error for what, error in errors(got, want).items() if not error < 1e-9}
    assert not wrong, wrong
    return want


def assert_dead_units_match(case: RuleCase, backend: str) -> None:
    """NaN where autograd through the formulas has NaN, and nowhere else."""
    want = assert_matches_autograd(case, backend, Variant(), dead=True)
    nan = any(bool(value.isnan().any()) for value in want["params"].values())
    assert nan == (case.rule != "SGD" and "eps_root" not in case.numbers)


def assert_zero_gradients_match(**how: Any) -> None:
    """A norm of zero: PyTorch's derivative of it is zero."""
    case = RuleCase("", "SGD", {"clip_norm": 0.5})
    net, params, data = problem()
    data[0], data[1] = torch.zeros_like(data[0]), torch.zeros_like(data[1])
    params = {name: torch.zeros_like(value) for name, value in params.items()}
    lr, numbers = rates(case, 3), case.tensors()
    want = meta_gradient(case, net, params, data, lr, numbers, 3)
    got = fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=3,
        update_rule=case.make(numbers), wrt=WRT, **how,
    )  # fmt: skip
    for what, error in errors(got, want).items():
        assert error < 1e-9, what


def assert_matches_reference(net: Any, data: list[Tensor], rule: fm.SGD, backend: str, **given: Any) -> None:
    """Losses, adapted parameters and every gradient as `reference` has them, within 1e-9."""
    found = {}
    how = {"loss": "mse", "update_rule": rule, **given}
    wrt = ("params", "lr", *(["rule"] if rule.learned else []))
    params = dict(net.named_parameters())
    for name in ("reference", backend):
        out = fm.meta_gradient(net, params, tuple(data[:2]), tuple(data[2:]), wrt=wrt, backend=name, **how)
        adapted = fm.inner_sgd(net, params, *data[:2], backend=name, **how)
        lr = out.lr if isinstance(out.lr, dict) else {"lr": out.lr}
        groups = {"params": out.grads, "lr": lr, "rule": out.rule or {}, "adapted": adapted}
        found[name] = {f"{g}.{n}": v.detach() for g, values in groups.items() for n, v in values.items()}
        found[name]["losses"] = out.task_losses
    assert found[backend].keys() == found["reference"].keys()
    for what, value in found["reference"].items():
        torch.testing.assert_close(
            found[backend][what], value, rtol=1e-9, atol=1e-11, msg=lambda m, w=what: f"{w}: {m}"
        )


def random_sets(tasks: int, inputs: int, outputs: int) -> list[Tensor]:
    """Support and query sets of five examples: x, y, x, y."""
    torch.manual_seed(0)
    return [torch.randn(tasks, 5, n, dtype=torch.float64) for n in (inputs, outputs, inputs, outputs)]


class Idle(nn.Module):
    """With a parameter that no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.idle = nn.Linear(3, 2), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def assert_unread_parameters_match(backend: str) -> None:
    """A parameter that no layer reads has no gradient, and no part in the norm."""
    rule = fm.SGD(number(0.5), nesterov=True, clip_norm=number(0.3))
    assert_matches_reference(Idle().double(), random_sets(2, 3, 2), rule, backend, lr=0.1, steps=3)


def assert_no_step_is_zero(backend: str) -> None:
    """Of no step nothing depends on the numbers."""
    net, data = nn.Linear(3, 2).double(), random_sets(2, 3, 2)
    rule = fm.Adam(eps=number(1e-3))
    out = fm.meta_gradient(
        net, dict(net.named_parameters()), tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.1, steps=0,
        update_rule=rule, wrt=("params", "rule"), backend=backend,
    )  # fmt: skip
    assert out.rule is not None
    assert float(out.rule["eps"]) == 0


def assert_custom_rules_are_refused(backend: str) -> None:
    """With the reason."""
    net, data = nn.Linear(3, 2).double(), random_sets(2, 3, 2)
    with pytest.raises(fm.BackendUnavailable, match="the update rule is CustomRule"):
        fm.inner_sgd(
            net, dict(net.named_parameters()), *data[:2], loss="mse", lr=1.0, steps=1,
            update_rule=fm.CustomRule(nn.Identity()), backend=backend,
        )  # fmt: skip


def assert_case_matches(name: str, backend: str, dtype: str) -> None:
    """The first verification case with a rule and this in its name."""
    case = next(case for case in VERIFICATION if case.rule and name in case.id)
    rows = verify_case(case, backend, dtype)
    assert rows
    assert [str(row) for row in rows if row.skipped or not row.passed] == []
