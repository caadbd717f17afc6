"""Rules of the user's own that modify what they are given, change between calls, learn their first
state, count in integers, hold a generator or have nothing in them: the right answer, or an error
that says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_loops import Named, problem
from torch import Tensor, nn

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
WAYS = {
    "reference": {"backend": "reference"},
    "torch": {"backend": "torch"},
    "recompute": {"backend": "torch", "memory": "recompute"},
    "checkpoint": {"backend": "torch", "memory": "checkpoint"},
    "auto": {"backend": "auto"},
}
EACH = pytest.mark.parametrize("way", WAYS)


def _run(rule: fm.CustomRule, params: Named | None = None, steps: int = 5, **how: Any) -> fm.MetaGradient:
    net, own, data = problem()
    return fm.meta_gradient(
        net, own if params is None else params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.5,
        steps=steps, update_rule=rule, **how,
    )  # fmt: skip


def _zeros(theta: Named) -> Named:
    return {n: torch.zeros_like(v) for n, v in theta.items()}


def _theta(theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
    for n in theta:
        theta[n].sub_(0.1 * gradient[n])
    return theta, state


def _theta_in_secret(theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
    with torch.no_grad():
        return _theta(theta, gradient, state)


def _gradient(theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
    return {n: v - 0.1 * gradient[n].mul_(2) for n, v in theta.items()}, state


def _state(theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
    return {n: v - 0.1 * state[n].mul_(0.9).add_(gradient[n]) for n, v in theta.items()}, state


@EACH
@pytest.mark.parametrize("function", [_theta, _theta_in_secret, _gradient, _state])
def test_a_function_must_not_modify_what_it_is_given(function: Any, way: str) -> None:
    _, params, _ = problem()
    before = {n: v.clone() for n, v in params.items()}
    with pytest.raises(ValueError, match="the function must not modify theta, the gradient or the state"):
        _run(fm.CustomRule(function, _zeros), params, **WAYS[way])
    with pytest.raises(fm.BackendUnavailable, match="the function must not modify theta"):
        _run(fm.CustomRule(function, _zeros), params, backend="machine")
    assert all(torch.equal(before[n], v) for n, v in params.items())


@EACH
def test_init_must_not_modify_theta(way: str) -> None:
    def halved(theta: Named) -> Named:
        with torch.no_grad():
            return {n: v.mul_(0.5) for n, v in theta.items()}

    _, params, _ = problem()
    before = {n: v.clone() for n, v in params.items()}
    with pytest.raises(ValueError, match="`init` must not modify theta"):
        _run(fm.CustomRule(lambda theta, g, state: (g, state), halved), params, **WAYS[way])
    assert all(torch.equal(before[n], v) for n, v in params.items())


class Learned(nn.Module):
    """Whose first state is made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.size = nn.Parameter(torch.tensor(0.1, dtype=F64))

    def init(self, theta: Named) -> Named:
        return {n: self.start * torch.ones_like(v) for n, v in theta.items()}

    def forward(self, theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
        state = {n: 0.5 * state[n] + gradient[n] for n in theta}
        return {n: v - self.size * state[n] for n, v in theta.items()}, state


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch", "machine", "auto"])
def test_a_first_state_that_needs_a_gradient_is_refused_at_every_call(backend: str, per_task: bool) -> None:
    params = {n: v.expand(2, *v.shape) if per_task else v for n, v in problem()[1].items()}
    params = {n: v.clone().requires_grad_() for n, v in params.items()}
    module = Learned()
    rule = fm.CustomRule(module)
    module.start.requires_grad_(False)
    _run(rule, params, backend=backend)
    module.start.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`init` reads a tensor \(\) that requires grad and is not theta"):
        _run(rule, params, backend=backend)


class Drawing:
    """With a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        noise = {n: torch.rand(v.shape, generator=self.generator, dtype=F64) for n, v in theta.items()}
        return {n: v - 0.5 * gradient[n] * noise[n] for n, v in theta.items()}, state


@EACH
def test_a_generator_of_its_own_draws_the_same_on_the_way_back(way: str) -> None:
    _, params, _ = problem()
    direction = {n: torch.cos(torch.arange(v.numel(), dtype=F64)).reshape(v.shape) for n, v in params.items()}
    found = [
        _run(fm.CustomRule(Drawing()), {n: v + s * direction[n] for n, v in params.items()}, **WAYS[way])
        for s in (0.0, 1e-6, -1e-6)
    ]
    slope = sum((by * direction[n]).sum() for n, by in found[0].grads.items())
    assert float((found[1].loss - found[2].loss) / 2e-6 - slope) == pytest.approx(0, abs=1e-7)


def test_checkpoints_leave_the_random_state_as_it_is() -> None:
    """To know how large a copy is takes a first state, which may be drawn."""

    def run(memory: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        rule = fm.CustomRule(
            lambda theta, g, state: ({n: v - 0.1 * g[n] * state[n] for n, v in theta.items()}, state),
            lambda theta: {n: torch.rand_like(v) for n, v in theta.items()},
        )
        return _run(rule, backend="torch", memory=memory).loss, torch.rand(3)

    with torch.random.fork_rng(devices=[]):
        ones, others = run("recompute"), run("checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


class Hollow(nn.Module):
    """With a parameter and a state without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=F64))

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        return {n: v - 0.1 * gradient[n] for n, v in theta.items()}, state


def _plain(theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
    return {n: v - 0.1 * gradient[n] for n, v in theta.items()}, state


@pytest.mark.parametrize(
    ("function", "init"), [(Hollow(), None), (_plain, lambda theta: torch.zeros(0, 3, dtype=F64))]
)
def test_tensors_without_elements(function: Any, init: Any) -> None:
    expected = _run(fm.CustomRule(_plain), backend="reference")
    found = _run(fm.CustomRule(function, init))
    for n, by in expected.grads.items():
        assert float((found.grads[n] - by).norm()) <= 1e-9 * float(by.norm())
    with pytest.raises(fm.BackendUnavailable, match="holds a tensor without elements"):
        _run(fm.CustomRule(function, init), backend="machine")


def _of(value: Callable[[Tensor], Any]) -> Any:
    def counted(theta: Named, gradient: Named, state: Tensor) -> tuple[Named, Tensor]:
        return {n: v - 0.1 * gradient[n] * (1 + value(state)) for n, v in theta.items()}, state + 1

    return counted


def _congruential(theta: Named, gradient: Named, state: Tensor) -> tuple[Named, Tensor]:
    size = (state % 7).to(F64)
    after = (state * 1103515245 + 12345) % (1 << 31)
    return {n: v - 0.1 * gradient[n] * size for n, v in theta.items()}, after


COUNTS = {
    "bool": (_of(lambda s: s.bool()), 0),
    "sum_of_bools": (_of(lambda s: (s > 0) + (s > 1)), 0),
    "remainder": (_of(lambda s: (s - 3) % 2), 0),
    "large_products": (_congruential, 42),
    "large_start": (_of(lambda s: s % 3), (1 << 55) + 1),
    "narrow": (_of(lambda s: (s * 1).to(torch.uint8)), 253),
}


@pytest.mark.parametrize("name", COUNTS)
def test_integers_of_a_state(name: str) -> None:
    """On the machine they are floating-point numbers: it is right, or says that it cannot be."""
    function, first = COUNTS[name]
    rule = fm.CustomRule(function, lambda theta: torch.full((), first, dtype=torch.int64))
    expected, found = _run(rule, steps=6, backend="reference"), _run(rule, steps=6)
    for n, by in expected.grads.items():
        assert float((found.grads[n] - by).norm()) <= 1e-9 * float(by.norm())
    if name in ("large_products", "large_start", "narrow"):
        with pytest.raises(fm.BackendUnavailable, match="the update rule: "):
            _run(rule, steps=6, backend="machine")
    else:
        _run(rule, steps=6, backend="machine")


class Changing(nn.Module):
    """With a mode, a number and a start that somebody changes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.factor, self.share = 1.0, 0.0

    def init(self, theta: Named) -> Named:
        return {n: self.share * v if self.share else torch.zeros_like(v) for n, v in theta.items()}

    def forward(self, theta: Named, gradient: Named, state: Named) -> tuple[Named, Named]:
        size = self.size * self.factor * (1 if self.training else 3) * FACTOR
        state = {n: 0.5 * state[n] + gradient[n] for n in theta}
        return {n: v - size * state[n] for n, v in theta.items()}, state


FACTOR = 1.0


def _changes() -> dict[str, Callable[[nn.Module, pytest.MonkeyPatch], object]]:
    hook = lambda module, given, out: ({n: 0.9 * v for n, v in out[0].items()}, out[1])  # noqa: E731
    return {
        "mode": lambda module, patch: module.eval(),
        "number": lambda module, patch: setattr(module, "factor", 2.0),
        "start": lambda module, patch: setattr(module, "share", 0.3),
        "global": lambda module, patch: patch.setitem(globals(), "FACTOR", 0.5),
        "hook": lambda module, patch: module.register_forward_hook(hook),
        "parameter": lambda module, patch: setattr(module, "size", nn.Parameter(2 * module.size.detach())),
    }


@pytest.mark.parametrize("what", _changes())
def test_a_rule_that_changes_between_two_calls(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one object: it is traced again."""
    module, found, (net, _, data) = Changing(), {}, problem()
    algorithms = {
        name: fm.MAML(
            net, loss="mse", inner_lr=0.5, inner_steps=3, update_rule=fm.CustomRule(module), backend=name
        )
        for name in ("auto", "torch")
    }
    for change in (None, _changes()[what]):
        if change is not None:
            change(module, monkeypatch)
        for name, maml in algorithms.items():
            maml.zero_grad()
            loss = maml(*data).loss
            loss.backward()
            grads = [value.grad.flatten() for value in maml.parameters()]
            found[name] = torch.cat([loss.detach().reshape(1), *grads])
        torch.testing.assert_close(found["auto"], found["torch"], rtol=1e-9, atol=1e-12)
