"""What depends on no adapted parameter is computed once: in captured networks, in parts of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import EVERYTHING, assert_same, make_problem
from torch import Tensor, nn

from fastmeta.backends import _hoisting, cpu, reference
from fastmeta.network.capture import captured
from fastmeta.network.split import split
from fastmeta.problem import Problem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(cpu.missing()), reason="extension not built"),
]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs."""
    monkeypatch.setattr(_hoisting, "WORTH", {"cpu": -math.inf, "cuda": -math.inf})


class Residual(nn.Module):
    """x + f(x), then a block whose skip goes around the layer that adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(x))
        return self.head(x + torch.tanh(self.middle(x)))


class Tied(nn.Module):
    """The body's weight is used behind the head once more."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(self.head(torch.tanh(self.body(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def conv4() -> nn.Module:
    def block(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2))

    net = nn.Sequential(block(1), block(4), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 1, 8, 8))
    return net


IMAGE = (1, 8, 8)
#: name -> (network, one input, what make_problem takes)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, object]]] = {
    "mlp": (mlp, (3,), {"adapt": ("4.weight", "4.bias")}),
    "one-step": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "steps": 1}),
    "no-step": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "steps": 0}),
    "three-steps-recompute": (mlp, (3,), {"adapt": ("4.weight",), "steps": 3, "memory": "recompute"}),
    "middle": (mlp, (3,), {"adapt": ("2.weight",)}),
    "first-layer": (mlp, (3,), {"adapt": ("0.weight",)}),
    "momentum-and-decay": (mlp, (3,), {"adapt": ("4.weight",), "momentum": 0.7, "weight_decay": 0.1, "steps": 3}),
    "step-weights": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "step_weights": True, "steps": 3}),
    "weighted": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "weighted": True, "rate_form": "all"}),
    "cotangents": (mlp, (3,), {"adapt": ("2.weight", "4.bias"), "cotangents": True}),
    "per-task": (mlp, (3,), {"adapt": ("4.weight",), "per_task": "all", "cotangents": True}),
    "some-per-task": (mlp, (3,), {"adapt": ("4.weight",), "per_task": "some"}),
    "first-order": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "order": "first"}),
    "support-per-step": (mlp, (3,), {"adapt": ("4.weight",), "per_step": True}),
    "conv4": (conv4, IMAGE, {"adapt": ("3.weight", "3.bias"), "loss": "cross_entropy"}),
    "conv4-first-order": (conv4, IMAGE, {"adapt": ("3.weight",), "loss": "cross_entropy", "order": "first"}),
    "conv4-running": (conv4, IMAGE, {"adapt": ("3.weight",), "loss": "cross_entropy", "batch_stats": "running"}),
    "conv4-second-block": (conv4, IMAGE, {"adapt": ("1.0.weight", "1.1.bias"), "loss": "cross_entropy"}),
    "residual-head": (Residual, (3,), {"adapt": ("head.weight", "head.bias")}),
    "residual-over-the-cut": (Residual, (3,), {"adapt": ("middle.weight",)}),
    "tied": (Tied, (3,), {"adapt": ("head.weight",), "cotangents": True}),
}
#: Those that there is no body to hoist in.
WHOLE = {"no-step", "first-layer", "support-per-step"}


def problem_of(case: str) -> Problem:
    make, shape, options = CASES[case]
    torch.manual_seed(0)
    net = make().double()
    problem = make_problem(net, shape, **options)  # type: ignore[arg-type]
    program, refused = captured(net, shape, torch.float64)
    assert program is not None, refused
    return replace(problem, program=program)


@pytest.mark.parametrize("case", CASES)
def test_hoisting_matches_reference(case: str) -> None:
    problem = problem_of(case)
    expected = reference.solve(problem, EVERYTHING, True)
    parts: list[Problem] = []

    def one(part: Problem, wrt: frozenset[str], adapted: bool) -> object:
        parts.append(part)
        return cpu._solve(part, wrt, adapted)

    for _ in range(2):  # the second call finds all plans made
        found = _hoisting.solve(one, cpu.refuses, problem, EVERYTHING, True)  # type: ignore[arg-type]
        found.loss = found.grads.flat_params = None
        assert_same(found, expected)
    assert (len(parts) == 2) == (case in WHOLE), "in one piece or not"
    assert case in WHOLE or sum(part.steps > 0 for part in parts) == 2, "one inner loop a call"


@pytest.mark.parametrize("wrt", ["params", "lr", "support_x", "query_x", "support_weights", "query_y", ""])
@pytest.mark.parametrize("case", ["weighted", "conv4-first-order"])
def test_single_gradients_of_a_hoisted_problem_match_reference(case: str, wrt: str) -> None:
    problem, wanted = problem_of(case), frozenset({wrt} - {""})
    found = cpu.solve(problem, wanted, False)
    found.loss = found.grads.flat_params = None
    assert_same(found, reference.solve(problem, wanted, False))


def test_the_largest_body_is_hoisted() -> None:
    layers = {}
    for case in CASES:
        problem = problem_of(case)
        halves = split(problem.program, problem.rates)  # type: ignore[arg-type]
        layers[case] = 0 if halves is None else len(halves.body.layers)
    assert layers["mlp"] == 4 and layers["middle"] == 2 and layers["first-layer"] == 0
    assert layers["residual-head"] == 8 and layers["residual-over-the-cut"] == 5
    assert layers["conv4"] == 9 and layers["conv4-second-block"] == 4


def test_no_gradient_goes_back_into_a_body_that_needs_none() -> None:
    calls = []

    def one(part: Problem, wrt: frozenset[str], adapted: bool) -> object:
        calls.append((part.steps, wrt))
        return cpu._solve(part, wrt, adapted)

    _hoisting.solve(one, cpu.refuses, problem_of("mlp"), frozenset({"lr"}), False)  # type: ignore[arg-type]
    assert calls == [(0, frozenset()), (2, frozenset({"lr"}))]


def test_small_bodies_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    problem = problem_of("mlp")
    assert _hoisting.hoisted(cpu.refuses, problem, EVERYTHING) is None


def test_bits_of_a_hoisted_call_do_not_depend_on_the_threads() -> None:
    problem, found = problem_of("conv4"), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads = cpu.solve(problem, frozenset({"params"}), False).grads.params
        found.append(torch.cat([gradient.flatten() for gradient in (grads or {}).values()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
