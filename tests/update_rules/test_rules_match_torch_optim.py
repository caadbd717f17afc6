"""Every update rule against `torch.optim` in value, and in every gradient against autograd through
a loop with the formulas of `torch.optim`."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rule_checks import assert_zero_gradients_match
from rule_loops import CASES, MSE, RuleCase, errors, loop, meta_gradient, problem
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
STEPS = pytest.mark.parametrize("steps", [3, 20])
BACKENDS = {
    "reference": {"backend": "reference"},
    "torch": {"backend": "torch"},
    "loop": {"backend": "torch", "task_chunk": 1, "memory": "recompute"},
    "checkpoint": {"backend": "torch", "memory": "checkpoint"},
}
ENGINES = {
    f"{name}-{memory}": {"backend": name, "memory": memory}
    for name in ("cpu", "machine")
    for memory in ("store", "recompute")
}
BACKENDS |= {} if os.environ.get("FASTMETA_NO_EXT") == "1" else ENGINES
WRT = ("params", "lr", "rule", "support_x", "query_x")


def ours(case: RuleCase, steps: int, lr: Tensor, numbers: dict[str, Tensor], **how: Any) -> fm.MetaGradient:
    net, params, data = problem(steps if how.get("support_per_step") else None)
    return fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=steps,
        update_rule=case.make(numbers), wrt=WRT, **how,
    )  # fmt: skip


def rates(case: RuleCase, steps: int) -> Tensor:
    return case.lr * torch.linspace(1, 0.7, steps, dtype=torch.float64)


def optimiser(case: RuleCase, params: list[Tensor]) -> torch.optim.Optimizer:
    """Of the same numbers, clipping left out."""
    numbers = {n: v for n, v in case.numbers.items() if not n.startswith("clip")}
    if "beta1" in numbers:
        numbers["betas"] = numbers.pop("beta1"), numbers.pop("beta2")
    name = "RMSprop" if case.rule == "RMSProp" else case.rule
    return getattr(torch.optim, name)(params, lr=case.lr, **numbers, **case.flags)


@STEPS
@pytest.mark.parametrize("backend", sorted({how["backend"] for how in BACKENDS.values()}))
@EACH
def test_values_match_torch_optim(case: RuleCase, steps: int, backend: str) -> None:
    net, params, (x, y, *_) = problem()
    rule = case.make()
    how = {"loss": "mse", "lr": case.lr, "steps": steps, "update_rule": rule, "backend": backend}
    adapted = fm.inner_sgd(net, params, x, y, **how)
    for t in range(len(x)):
        theta = {name: value.clone().requires_grad_() for name, value in params.items()}
        if case.rule == "Lion" or "eps_root" in case.numbers:  # which PyTorch has not
            lr = torch.tensor(case.lr, dtype=torch.float64)
            want = loop(case, net, theta, x[t], y[t], lr, case.numbers, steps)[0][-1]
        else:
            leaves = list(theta.values())
            steppers = optimiser(case, leaves)
            for _ in range(steps):
                steppers.zero_grad()
                MSE(functional_call(net, theta, (x[t],)), y[t]).backward()
                if "clip_value" in case.numbers:
                    torch.nn.utils.clip_grad_value_(leaves, case.numbers["clip_value"])
                if "clip_norm" in case.numbers:
                    torch.nn.utils.clip_grad_norm_(leaves, case.numbers["clip_norm"])
                steppers.step()
            want = theta
        for name, value in want.items():
            off = (adapted[name][t] - value.detach()).norm() / value.detach().norm()
            assert float(off) < 1e-9, name


@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        *[(name, 3) for name in BACKENDS],
        *[(name, 20) for name in BACKENDS if name not in ("reference", "loop")],
    ],
)
@EACH
def test_gradients_match_autograd(case: RuleCase, steps: int, backend: str) -> None:
    """By parameters, rates, every number of the rule, support and query inputs."""
    net, params, data = problem()
    lr, numbers = rates(case, steps), case.tensors()
    want = meta_gradient(case, net, params, data, lr, numbers, steps)
    for what, error in errors(ours(case, steps, lr, numbers, **BACKENDS[backend]), want).items():
        assert error < 1e-9, what


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "checkpoint")])
@EACH
def test_numbers_of_every_step_and_losses_of_every_step(case: RuleCase, backend: str) -> None:
    """Numbers [K], a support set of every step, weights on every query loss and task."""
    steps, weights = 4, (0.3, 0.0, 0.7, 0.1, 1.0)
    net, params, data = problem(steps)
    lr, numbers = rates(case, steps), case.tensors(steps)
    tasks = torch.tensor([0.4, 1.7], dtype=torch.float64)
    how = {"step_weights": weights, "task_weights": tasks}
    want = meta_gradient(case, net, params, data, lr, numbers, steps, per_step=True, **how)
    got = ours(case, steps, lr, numbers, support_per_step=True, **how, **BACKENDS[backend])
    for what, error in errors(got, want).items():
        assert error < 1e-9, what


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("loop", "checkpoint")])
@EACH
def test_first_order_matches_autograd(case: RuleCase, backend: str) -> None:
    """With inner gradients as constants, which weight decay and numbers of the rule pass by."""
    net, params, data = problem()
    lr, numbers = rates(case, 3), case.tensors()
    want = meta_gradient(case, net, params, data, lr, numbers, 3, first_order=True)
    for what, error in errors(ours(case, 3, lr, numbers, order="first", **BACKENDS[backend]), want).items():
        assert error < 1e-9, what


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "loop"])
@pytest.mark.parametrize("root", [0.0, 1e-6])
@pytest.mark.parametrize("rule", ["Adam", "AdamW", "RMSProp", "Adagrad", "SGD"])
def test_a_dead_unit_is_nan_where_the_formula_is(rule: str, root: float, backend: str) -> None:
    """The gradient of a unit that is never on is zero, where a square root has no derivative."""
    numbers: dict[str, float] = {"clip_norm": 0.5} if rule == "SGD" else {"eps": 1e-8}
    numbers |= {"eps_root": root} if root and rule != "SGD" else {}
    numbers |= {"beta1": 0.9, "beta2": 0.99} if rule.startswith("Adam") else {}
    numbers |= {"weight_decay": 0.1} if rule == "AdamW" else {}
    case = RuleCase("", rule, numbers | ({"alpha": 0.9} if rule == "RMSProp" else {}), lr=0.01)
    net, params, data = problem(dead=True)
    lr, own = rates(case, 3), case.tensors()
    want = meta_gradient(case, net, params, data, lr, own, 3)
    nan = any(bool(value.isnan().any()) for value in want["params"].values())
    assert nan == (not root and rule != "SGD")
    got = fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=3,
        update_rule=case.make(own), wrt=WRT, **BACKENDS[backend],
    )  # fmt: skip
    for what, error in errors(got, want).items():
        assert error < 1e-9, what


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_clipped_by_their_norm(backend: str) -> None:
    """A norm of zero: PyTorch's derivative of it is zero."""
    assert_zero_gradients_match(**BACKENDS[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["clip_value", "clip_norm"])
def test_clipping_at_the_threshold(kind: str, backend: str) -> None:
    """Below it nothing changes, not even a bit of it; at it the derivative is PyTorch's."""
    net, params, data = problem(tasks=1)
    theta = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss = MSE(functional_call(net, theta, (data[0][0],)), data[1][0])
    grads = torch.autograd.grad(loss, list(theta.values()))
    largest = max(float(g.abs().max()) for g in grads)
    norm = float(torch.cat([g.reshape(-1) for g in grads]).norm())
    at = largest if kind == "clip_value" else norm + 1e-6
    how = {"loss": "mse", "lr": 0.1, "steps": 1, "wrt": ("params", "query_x"), **BACKENDS[backend]}
    given = net, params, tuple(data[:2]), tuple(data[2:])
    plain = fm.meta_gradient(*given, **how)
    for factor in (1.001, 1.5):
        wide = fm.meta_gradient(*given, update_rule=fm.SGD(**{kind: factor * at}), **how)
        assert float((wide.loss - plain.loss).abs()) <= 1e-15
    case = RuleCase("", "SGD", {kind: at})
    lr, own = torch.tensor(0.1, dtype=torch.float64), case.tensors()
    want = meta_gradient(case, net, params, data, lr, own, 1)
    got = fm.meta_gradient(*given, update_rule=case.make(own), **{**how, "wrt": WRT, "lr": lr})
    if kind == "clip_norm" or backend in ENGINES:  # rounding decides on which side of it they are
        assert float((got.loss - want["task_losses"].mean()).abs()) < 1e-12
        return
    for what, error in errors(got, want).items():
        assert error < 1e-9 or what == "rule.clip_value", what  # whose derivative may be on either side


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [fm.Adam(), fm.RMSProp(), fm.Adagrad()], ids=lambda rule: rule.kind)
def test_a_zero_gradient_of_a_loss_without_second_derivatives(rule: fm.UpdateRule, backend: str) -> None:
    """The signs of L1 cancel in a bias: the derivative of its root is infinite, and nothing that is
    not zero depends on it."""
    net, params, data = problem()
    with torch.no_grad():
        data[1][:, :, :] = 100.0 * (-1) ** torch.arange(data[1].shape[1], dtype=torch.float64)[:, None]
    even = data[1].shape[1] // 2 * 2
    given = net, params, (data[0][:, :even], data[1][:, :even]), tuple(data[2:])
    how = {"loss": nn.L1Loss(), "lr": 0.01, "steps": 1, "update_rule": rule}
    want = fm.meta_gradient(*given, **how, backend="reference")
    got = fm.meta_gradient(*given, **how, **BACKENDS[backend])
    assert bool(want.grads["0.weight"].isfinite().all())
    for name, value in want.grads.items():
        torch.testing.assert_close(got.grads[name], value, rtol=1e-9, atol=1e-12, equal_nan=True)
