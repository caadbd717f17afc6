"""Rules of the user's own as programs of the machine: lanes, what changes between calls, what it
refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import make_problem, tensors_of
from rule_loops import Named
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends.machine.choice import forced
from fastmeta.problem import Scratch

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS, STEPS, F64 = 11, 3, torch.float64


class Recurrent(nn.Module):
    """An LSTM on coordinates whose first state is learned by nobody, but depends on theta."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(2, 3), nn.Linear(3, 1)

    def init(self, theta: Named) -> dict[str, tuple[Tensor, Tensor]]:
        return {n: (v.reshape(-1, 1).expand(-1, 3), v.new_ones(v.numel(), 3)) for n, v in theta.items()}

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        inputs = {n: torch.stack([gradient[n].flatten(), v.flatten()], 1) for n, v in theta.items()}
        state = {n: self.cell(inputs[n], state[n]) for n in theta}
        return {n: v + 0.1 * self.out(state[n][0]).reshape(v.shape) for n, v in theta.items()}, state


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).to(F64)


def _data() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(TASKS, 5, n, dtype=F64, generator=draw) for n in (3, 2, 3, 2)]


def _answer(rule: Any, backend: str) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _net()
    data = _data()
    got = fm.meta_gradient(
        net, dict(net.named_parameters()), tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.5, steps=STEPS,
        update_rule=rule, backend=backend,
    )  # fmt: skip
    return {**got.grads, "losses": got.task_losses}


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
def test_matches_reference_in_rows_and_lanes(memory: str, order: str, seeded: None) -> None:
    """A set a step, parameters of each task, a rate for each element, losses in the objective."""
    rule = fm.CustomRule(Recurrent().to(F64))
    made = make_problem(
        _net(), tasks=TASKS, steps=STEPS, per_task="some", per_step=True, rate_form="all", lr=0.5,
        step_weights=True, weighted=True, cotangents=True, memory=memory, order=order,
        support_step_weights=(0.5, 0.0, 0.7),
    )  # fmt: skip
    made = replace(made, rule=rule, hyper=rule.values)
    wrt = frozenset({"params", "lr", "rule", "support_x", "support_y", "support_weights", "query_x"})
    expected = tensors_of(backends.get("reference").solve(made, wrt, True))
    for lanes in (False, True):
        given = replace(made, scratch=Scratch())
        with forced(lanes):
            assert backends.get("machine").refuses(given, wrt) == ""
            found = tensors_of(backends.get("machine").solve(given, wrt, True))
        for what, value in expected.items():
            assert float((found[what] - value).norm() / value.norm()) < 1e-9, what


def test_learns_through_the_algorithm_and_sees_new_parameters(seeded: None) -> None:
    net, module, losses = _net(), Recurrent().to(F64), []
    for backend in ("machine", "torch"):
        own = Recurrent().to(F64)
        own.load_state_dict(module.state_dict())
        maml = fm.MAML(
            net, loss="mse", inner_lr=1.0, inner_steps=STEPS, update_rule=fm.CustomRule(own), backend=backend
        )
        optimizer = torch.optim.Adam(own.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            loss = maml(*_data()).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[3] < losses[0]
    torch.testing.assert_close(losses[:4], losses[4:], rtol=1e-9, atol=0)


class Stepping:
    """A function with a number that somebody changes."""

    def __init__(self) -> None:
        self.size = 0.1

    def __call__(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        return {n: v - self.size * gradient[n].tanh() for n, v in theta.items()}, state


def test_a_function_that_changes_is_traced_again() -> None:
    function = Stepping()
    for size in (0.1, 0.3, 0.1):
        function.size = size
        rule = fm.CustomRule(function)
        expected, found = _answer(rule, "reference"), _answer(rule, "machine")
        for what, value in expected.items():
            assert float((found[what] - value).norm()) <= 1e-9 * float(value.norm()), what


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.tensor(0.1, dtype=F64))

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        return {n: v - self.size * gradient[n] for n, v in theta.items()}, state


def counting(theta: Named, gradient: Named, state: int) -> tuple[Named, int]:
    return {n: v - 0.1 / (1 + state) * gradient[n] for n, v in theta.items()}, state + 1


def noisy(theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
    return {n: v - 0.1 * gradient[n] * torch.rand_like(v) for n, v in theta.items()}, state


def branching(theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
    size = 0.1 if gradient["2.bias"].sum() > 0 else 0.2
    return {n: v - size * gradient[n] for n, v in theta.items()}, state


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (fm.CustomRule(Buffered()), "the update rule: it reads a tensor"),
        (fm.CustomRule(counting, init=lambda theta: 0), "the update rule: .*no tensor, and changes it"),
        (fm.CustomRule(noisy), "the update rule.*random numbers"),
        (fm.CustomRule(branching), "the update rule: .*reads a value"),
    ],
    ids=["buffer", "count", "random", "branch"],
)
def test_refuses_what_is_no_program(rule: fm.CustomRule, reason: str) -> None:
    with pytest.raises(fm.BackendUnavailable, match=reason):
        _answer(rule, "machine")
    maml = fm.MAML(_net(), loss="mse", inner_lr=1.0, inner_steps=2, update_rule=rule)
    said = str(maml.explain(*_data()))
    assert "backend: torch" in said
    assert "not on machine: the update rule" in said
