"""What depends on no adapted parameter is computed once: in captured networks, in parts of a
problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import EVERYTHING, assert_same, error, make_problem
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends import _hoisting, cpu, reference
from fastmeta.capture.capture import captured
from fastmeta.graph.split import split
from fastmeta.problem import Batch, Problem

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
        return nn.Sequential(
            nn.Conv2d(inputs, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2)
        )

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
    "momentum-and-decay": (
        mlp,
        (3,),
        {"adapt": ("4.weight",), "momentum": 0.7, "weight_decay": 0.1, "steps": 3},
    ),
    "step-weights": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "step_weights": True, "steps": 3}),
    "weighted": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "weighted": True, "rate_form": "all"}),
    "cotangents": (mlp, (3,), {"adapt": ("2.weight", "4.bias"), "cotangents": True}),
    "per-task": (mlp, (3,), {"adapt": ("4.weight",), "per_task": "all", "cotangents": True}),
    "some-per-task": (mlp, (3,), {"adapt": ("4.weight",), "per_task": "some"}),
    "first-order": (mlp, (3,), {"adapt": ("4.weight", "4.bias"), "order": "first"}),
    "support-per-step": (mlp, (3,), {"adapt": ("4.weight",), "per_step": True}),
    "conv4": (conv4, IMAGE, {"adapt": ("3.weight", "3.bias"), "loss": "cross_entropy"}),
    "conv4-first-order": (conv4, IMAGE, {"adapt": ("3.weight",), "loss": "cross_entropy", "order": "first"}),
    "conv4-running": (
        conv4,
        IMAGE,
        {"adapt": ("3.weight",), "loss": "cross_entropy", "batch_stats": "running"},
    ),
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
    program, refused = captured(net, shape, torch.float64, problem.batch_stats)
    assert program is not None, refused
    if problem.output_grad is not None:  # the operators ask for one or the other
        problem = replace(problem, query_loss=None, query=Batch(problem.query.x))  # type: ignore[union-attr]
    return replace(problem, program=program)


def differentiable(problem: Problem) -> frozenset[str]:
    """What can be asked for: class indices have no gradient."""
    indices = (
        problem.query is not None and problem.query.y is not None and not problem.query.y.is_floating_point()
    )
    return EVERYTHING - {"support_y", "query_y"} if indices else EVERYTHING


@pytest.mark.parametrize("case", CASES)
def test_hoisting_matches_reference(case: str) -> None:
    problem = problem_of(case)
    wrt = differentiable(problem)
    expected = reference.solve(problem, wrt, True)
    parts: list[Problem] = []

    def one(part: Problem, wrt: frozenset[str], adapted: bool) -> object:
        parts.append(part)
        return cpu._solve(part, wrt, adapted)

    for _ in range(2):  # the second call finds all plans made
        found = _hoisting.solve(one, cpu.refuses, problem, wrt, True)  # type: ignore[arg-type]
        found.loss = found.grads.flat_params = None
        assert_same(found, expected)
    assert (len(parts) == 2) == (case in WHOLE), "in one piece or not"


@pytest.mark.parametrize("wrt", ["params", "lr", "support_x", "query_x", "support_weights", "query_y", ""])
@pytest.mark.parametrize("case", ["weighted", "conv4-first-order"])
def test_single_gradients_of_a_hoisted_problem_match_reference(case: str, wrt: str) -> None:
    problem = problem_of(case)
    wanted = differentiable(problem) & {wrt}
    found = cpu.solve(problem, wanted, False)
    found.loss = found.grads.flat_params = None
    assert_same(found, reference.solve(problem, wanted, False))


def test_the_largest_body_is_hoisted() -> None:
    layers = {}
    for case in CASES:
        problem = problem_of(case)
        halves = split(problem.program, problem.rates)  # type: ignore[arg-type]
        layers[case] = 0 if halves is None else len(halves.body.layers)
    expected = {"mlp": 4, "middle": 2, "first-layer": 0, "residual-head": 8, "residual-over-the-cut": 5}
    expected |= {"conv4": 9, "conv4-second-block": 4, "tied": 2}
    assert {case: layers[case] for case in expected} == expected


def test_no_gradient_goes_back_into_a_body_that_needs_none() -> None:
    calls = []

    def one(part: Problem, wrt: frozenset[str], adapted: bool) -> object:
        calls.append((part.steps, wrt))
        return cpu._solve(part, wrt, adapted)

    _hoisting.solve(one, cpu.refuses, problem_of("mlp"), frozenset({"lr"}), False)  # type: ignore[arg-type]
    assert calls == [(0, frozenset()), (0, frozenset()), (2, frozenset({"lr"}))]


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
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_gradients_of_a_frozen_body_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, passes = mlp().double(), []
    for parameter in list(net.parameters())[:-2]:
        parameter.requires_grad_(False)
    solve = cpu._solve
    monkeypatch.setattr(
        cpu, "_solve", lambda p, wrt, adapted: passes.append(p.steps) or solve(p, wrt, adapted)
    )
    problem = problem_of("mlp")
    episode = (problem.support.x, problem.support.y, problem.query.x, problem.query.y)  # type: ignore[union-attr]
    gradients = {}
    for backend in ("cpu", "reference"):
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, adapt="head", backend=backend)
        maml(*episode).loss.backward()
        gradients[backend] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
    assert passes[-3:] == [0, 0, 2], "the body forward, the inner loop, and nothing more"
    assert gradients["cpu"].keys() == {"4.weight", "4.bias"}
    for name, expected in gradients["reference"].items():
        assert error(gradients["cpu"][name], expected) <= 1e-9


def test_explain_says_what_is_computed_once() -> None:
    problem = problem_of("mlp")
    data = (problem.support.x, problem.support.y, problem.query.x, problem.query.y)  # type: ignore[union-attr]
    counts = {}
    for adapt in ("all", "head"):
        maml = fm.MAML(problem.net, loss="mse", inner_lr=0.1, inner_steps=2, adapt=adapt, backend="cpu")
        said = maml.explain(*data)
        assert ("computed once per call: the first 4 of 5 layers" in str(said)) == (adapt == "head")
        counts[adapt] = said.cost
    # f = 21 + 35 + 10 multiply-adds; N = 7, M = 5, three tasks, two steps
    assert counts["all"]["store"] == 3 * (7 * 2 * (9 * 66 - 5 * 21) + 5 * (3 * 66 - 21))
    body, head = (7 + 5) * (4 * 56 - 21), 7 * 2 * (9 * 10 - 5 * 10) + 5 * (3 * 10 - 10)
    assert counts["head"]["store"] == 3 * (body + head)
