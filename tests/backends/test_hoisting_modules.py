"""What depends on no adapted parameter is computed once: modules of networks that are run as they
are."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import EVERYTHING, assert_same, error, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.backends import reference
from fastmeta.backends import torch as backend
from fastmeta.backends._inputs import with_step_weights
from fastmeta.backends.torch.features import standing
from fastmeta.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCE = (4, 3)


class Attention(nn.Module):
    """Embeds, attends, normalises; nn.MultiheadAttention returns a pair with None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (hidden, _) = self.body(x)
        return self.head(outputs[:, -1] + hidden[0])


class Twice(nn.Module):
    """The body sees two views of the input, and in between is a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(x), self.body(x.flip(1))], 1))


class TwiceMoving(Twice):
    """Its second view is of something adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.view = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(x), self.body(self.view(x))], 1))


class InPlace(nn.Module):
    """Writes into what the body returned."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h *= self.scale
        return self.head(torch.tanh(h))


class Quantised(nn.Module):
    """What the second layer reads depends on an adapted parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        codes = F.one_hot(h.argmax(1), 4).to(h)
        return self.head(torch.cat([h, self.second(codes)], 1))


class Looking(nn.Module):
    """Takes another way if the values say so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.head.weight.sum() * self.body(x) if self.head.weight.sum() > 0 else self.body(x))
        return self.head(h)


class Counting(nn.Module):
    """Keeps an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.calls = nn.Linear(3, 4), nn.Linear(4, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(torch.tanh(self.body(x)))


class Tied(nn.Module):
    """The body's weight is used outside of the body as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.head(torch.tanh(self.body(x)))), self.body.weight)


class Drawing(nn.Module):
    """The body draws, by whatever it is given, before or behind what it computes."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.body, self.scale, self.head = nn.Linear(3, 4), Scale(draw), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(torch.tanh(self.body(x))))


class Scale(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.inside, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        by = 0.5 + self.draw()
        return torch.tanh(self.inside(x)).sin() * by


class Unseen(nn.Module):
    """What a scripted function makes of an adapted parameter no function mode sees; it has no
    gradient either."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.cat([h, self.second(_largest(h))], 1))


@torch.jit.script
def _largest(h: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(h.argmax(1), 4).to(h.dtype)


class Shaped(nn.Module):
    """How many values of an adapted parameter are positive scales what the body computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        positive = (self.head.weight > 0).nonzero().shape[0]
        return self.head(self.body(x * (1 + positive)))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


HEAD = ("head.weight", "head.bias")
#: name -> (network, one input, what adapts, what is computed once)
CASES = {
    "attention": (Attention, SEQUENCE, HEAD, ("embed", "attend", "norm")),
    "attention-norm": (Attention, SEQUENCE, ("norm.weight",), ("embed", "attend")),
    "recurrent": (Recurrent, SEQUENCE, HEAD, ("body",)),
    "twice": (Twice, (3,), HEAD, ("body",)),
    "twice-moving": (TwiceMoving, (3,), ("view.weight",), ()),
    "in-place": (InPlace, (3,), ("scale",), ("body",)),
    "quantised": (Quantised, (3,), ("first.weight",), ()),
    "looking": (Looking, (3,), HEAD, ()),
    "counting": (Counting, (3,), HEAD, ()),
    "tied": (Tied, (3,), HEAD, ("body",)),
    "unseen": (Unseen, (3,), ("first.weight",), ()),
    "shaped": (Shaped, (3,), HEAD, ()),
}
DRAWS: dict[str, Callable[[], Callable[[], Any]]] = {
    "python": lambda: random.random,
    "python-own": lambda: random.Random(3).random,
    "numpy": lambda: np.random.default_rng(3).random,
    "torch": lambda: partial(torch.rand, ()),
    "torch-own": lambda: partial(torch.rand, (), generator=torch.Generator().manual_seed(3)),
    "clock": lambda: lambda: time.perf_counter_ns() % 1009 / 1009,
    "entropy": lambda: lambda: os.urandom(1)[0] / 256,
    "iterator": lambda: itertools.cycle([0.1, 0.7, 0.3]).__next__,
}
OPTIONS = {
    "store": {"memory": "store"},
    "recompute": {"memory": "recompute", "momentum": 0.6, "weight_decay": 0.1},
    "one-task": {"tasks": 1, "steps": 3},
    "one-task-recompute": {"tasks": 1, "memory": "recompute"},
    "chunks": {"task_chunk": 2, "per_task": "some"},
    "first-order": {"order": "first"},
    "one-task-first-order": {"order": "first", "tasks": 1},
    "step-weights": {"step_weights": True, "steps": 3, "weighted": True, "rate_form": "all"},
    "one-task-step-weights": {
        "step_weights": True,
        "steps": 3,
        "weighted": True,
        "rate_form": "all",
        "tasks": 1,
    },
    "cotangents": {"cotangents": True, "per_task": "all"},
}


def names_of(problem: Problem) -> tuple[str, ...]:
    """The modules that are computed once."""
    found = standing(with_step_weights(problem))
    return tuple(dict.fromkeys(name for names in found.values() for name in names))


def problem_of(case: str, **options: object) -> Problem:
    make, shape, adapt, _ = CASES[case]
    torch.manual_seed(0)
    return make_problem(make().double(), shape, adapt=adapt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", ["attention", "twice", "in-place", "tied"])
def test_modules_computed_once_match_reference(case: str, options: dict) -> None:
    problem = problem_of(case, **options)
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_network_matches_reference(case: str, tasks: int) -> None:
    problem = problem_of(case, tasks=tasks)
    expected = reference.solve(problem, EVERYTHING, True)
    for _ in range(2):
        assert_same(backend.solve(problem, EVERYTHING, True), expected)
    assert names_of(problem) == CASES[case][3]


@pytest.mark.parametrize("wrt", ["", "params", "lr", "support_x", "query_x"])
def test_single_gradients_match_reference(wrt: str) -> None:
    for tasks in (1, 3):
        problem, wanted = problem_of("attention", tasks=tasks), frozenset({wrt} - {""})
        assert_same(backend.solve(problem, wanted, False), reference.solve(problem, wanted, False))


def test_what_is_random_is_computed_every_time_and_matches_reference() -> None:
    torch.manual_seed(0)
    problem = make_problem(dropout().double(), tasks=1, steps=3, adapt=("4.weight", "4.bias"))
    torch.manual_seed(1)
    expected = reference.solve(problem, EVERYTHING, True)
    for memory in ("store", "recompute"):
        torch.manual_seed(1)
        assert_same(backend.solve(replace(problem, memory=memory, scratch={}), EVERYTHING, True), expected)
    assert names_of(problem) == ("0",), "only the layer before the dropout"
    problem.net.eval()
    assert names_of(problem) == ("0", "2")
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("name", DRAWS)
def test_what_draws_is_drawn_every_time_and_matches_reference(name: str, tasks: int) -> None:
    torch.manual_seed(0)
    net, answers = Drawing(DRAWS[name]()).double(), []
    problem = make_problem(net, tasks=tasks, steps=3, adapt=HEAD, memory="store")
    assert "scale" not in names_of(problem)
    if name in ("clock", "entropy", "iterator"):
        return  # no two runs are the same
    for solver in (reference, backend):
        random.seed(1)
        torch.manual_seed(1)
        net.scale.draw = DRAWS[name]()
        answers.append(solver.solve(problem, EVERYTHING, True))
    if not (name.startswith("torch") and tasks > 1):  # vmap draws other numbers than a loop
        assert_same(*reversed(answers))


class Counts(torch.overrides.TorchFunctionMode):
    """Counts the calls of linear layers of three inputs."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.linear and args[0].shape[-1] == 3
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tasks", [1, 3])
def test_a_body_runs_once_a_set(tasks: int) -> None:
    problem = problem_of("attention", tasks=tasks, steps=4)
    backend.solve(problem, EVERYTHING, True)  # looks for what stands still, and at vmap
    with Counts() as counts:
        backend.solve(problem, EVERYTHING, True)
    assert counts.calls == 2, "the one query counts all four steps on the support set as one"


def test_a_network_is_looked_at_again_when_it_has_changed() -> None:
    problem = problem_of("attention")
    assert names_of(problem) == ("embed", "attend", "norm")
    handle = problem.net.attend.register_forward_hook(lambda module, inputs, output: None)
    assert names_of(problem) == (), "what a hook does is to be done at every pass"
    handle.remove()
    assert names_of(problem) == ("embed", "attend", "norm")
    problem.net.attend = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    assert names_of(problem) == ("embed",)


def test_explain_names_the_modules_and_nothing_is_left_behind() -> None:
    net = Attention().double()
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    problem = problem_of("attention")
    data = (problem.support.x, problem.support.y, problem.query.x, problem.query.y)  # type: ignore[union-attr]
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, adapt="head", backend="torch")
    assert "computed once per call, since no adapted parameter matters for it: embed, attend, norm" in str(
        maml.explain(*data)
    )
    maml(*data).loss.backward()
    for name, module in net.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items())


def test_a_captured_tensor_of_a_body_gets_its_gradient() -> None:
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x) * scale)

    for tasks in (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(Scaled(3, 4), nn.Linear(4, 2)).double()
        problem = make_problem(net, tasks=tasks)
        data = (problem.support.x, problem.support.y, problem.query.x, problem.query.y)  # type: ignore[union-attr]
        found = []
        for which in ("torch", "reference"):
            maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=3, adapt="head", backend=which)
            for _ in range(2):
                loss = maml(*data).loss
            (gradient,) = torch.autograd.grad(loss, [scale])
            found.append(gradient)
        assert error(*found) <= 1e-9
