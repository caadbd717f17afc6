"""Rules of the user's own: functions, modules and networks on coordinates, against autograd through
a loop that calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_loops import MSE, Named, problem
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = {
    "reference": {"backend": "reference"},
    "torch": {"backend": "torch"},
    "recompute": {"backend": "torch", "memory": "recompute"},
    "loop": {"backend": "torch", "task_chunk": 1},
    "checkpoint": {"backend": "torch", "memory": "checkpoint"},
    **{
        f"machine-{way}": {"backend": "machine", "memory": way}
        for way in ("store", "recompute", "checkpoint")
    },
}
EACH = pytest.mark.parametrize("backend", BACKENDS)


class Coordinates(nn.Module):
    """An LSTM on every coordinate by itself (Andrychowicz et al., 2016), with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.out = nn.LSTMCell(1, 3), nn.LayerNorm(3), nn.Linear(3, 1)

    def init(self, theta: Named) -> dict[str, tuple[Tensor, Tensor]]:
        return {n: (v.new_zeros(v.numel(), 3), v.new_zeros(v.numel(), 3)) for n, v in theta.items()}

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        moved, after = {}, {}
        for name, value in theta.items():
            after[name] = self.cell(gradient[name].reshape(-1, 1), state[name])
            moved[name] = value + 0.1 * self.out(self.norm(after[name][0])).reshape(value.shape)
        return moved, after


class Scale(nn.Module):
    """Momentum with a learned size, and a count of the steps beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.mu = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.7))

    def init(self, theta: Named) -> tuple[Named, Tensor]:
        return {n: torch.zeros_like(v) for n, v in theta.items()}, torch.zeros((), dtype=torch.int64)

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        moved = {n: self.mu * state[0][n] + gradient[n] for n in theta}
        size = self.size / (1 + state[1])
        return {n: theta[n] - size * moved[n] for n in theta}, (moved, state[1] + 1)


class Looks(Scale):
    """One that vmap cannot run: it looks at a value."""

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        if float(gradient["0.bias"].sum()) > 1e9:
            raise RuntimeError("too large")
        return super().forward(theta, gradient, state)


class Started(Scale):
    """One whose state before the first step is made of theta."""

    def init(self, theta: Named) -> tuple[Named, Tensor]:
        return {n: 0.3 * v.tanh() for n, v in theta.items()}, torch.zeros((), dtype=torch.int64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().double()


def expected(module: Any, steps: int, lr: Tensor) -> dict[str, Any]:
    """By a loop: loss and gradients."""
    net, params, (sx, sy, qx, qy) = problem()
    theta0 = {n: v.clone().requires_grad_() for n, v in params.items()}
    own = list(module.parameters()) if isinstance(module, nn.Module) else []
    lr, sx = lr.clone().requires_grad_(), sx.clone().requires_grad_()
    losses = []
    for t in range(len(sx)):
        theta = dict(theta0)
        state = module.init(theta) if hasattr(module, "init") else ()
        for k in range(steps):
            loss = MSE(functional_call(net, theta, (sx[t],)), sy[t])
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            moved, state = module(theta, dict(zip(theta, g, strict=True)), state)
            theta = {n: v + lr[k] * (moved[n] - v) for n, v in theta.items()}
        losses.append(MSE(functional_call(net, theta, (qx[t],)), qy[t]))
    loss = torch.stack(losses).mean()
    leaves = [*theta0.values(), *own, lr, sx]
    grads = iter(torch.autograd.grad(loss, leaves, materialize_grads=True))
    names = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    return {
        "loss": loss.detach(),
        "params": {n: next(grads) for n in theta0},
        "rule": {n: next(grads) for n in names},
        "lr": next(grads),
        "support_x": next(grads),
    }


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@EACH
@pytest.mark.parametrize("make", [Coordinates, Scale, Started, Looks])
def test_modules_match_autograd(make: Callable[[], nn.Module], backend: str) -> None:
    module, steps = seeded(make), 4
    lr = torch.tensor([1.0, 0.5, 0.8, 1.2], dtype=torch.float64)
    want = expected(module, steps, lr)
    net, params, data = problem()

    def run() -> fm.MetaGradient:
        return fm.meta_gradient(
            net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=steps,
            update_rule=fm.CustomRule(module), wrt=("params", "lr", "rule", "support_x"), **BACKENDS[backend],
        )  # fmt: skip

    if make is Looks and "machine" in backend:
        with pytest.raises(
            fm.BackendUnavailable, match="the update rule: its code reads a value of a tensor"
        ):
            run()
        return
    got = run()
    assert off(got.loss, want["loss"]) < 1e-9
    assert off(got.lr, want["lr"]) < 1e-9
    assert off(got.support_x, want["support_x"]) < 1e-9
    for found, expected_ones in ((got.grads, want["params"]), (got.rule, want["rule"])):
        assert found.keys() == expected_ones.keys()
        for name, value in expected_ones.items():
            assert off(found[name], value) < 1e-9, name


@EACH
def test_a_function_matches_autograd(backend: str) -> None:
    """With no state and no parameters; its step is scaled by the rate of each parameter."""

    def signs(theta: Named, gradient: Named, state: tuple[()]) -> tuple[Named, tuple[()]]:
        return {n: v - gradient[n] * gradient[n].tanh() for n, v in theta.items()}, state

    want = expected(signs, 2, torch.full((2,), 0.3, dtype=torch.float64))
    net, params, data = problem()
    got = fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.3, steps=2,
        update_rule=fm.CustomRule(signs), **BACKENDS[backend],
    )  # fmt: skip
    for name, value in want["params"].items():
        assert off(got.grads[name], value) < 1e-9, name


@pytest.mark.parametrize("backend", ["torch", "recompute", "checkpoint"])
def test_random_numbers_are_the_same_on_the_way_back(backend: str, seeded: None) -> None:
    """Dropout of the steps: the gradient is that of the loss that came out."""

    def dropped(theta: Named, gradient: Named, state: tuple[()]) -> tuple[Named, tuple[()]]:
        moved = {n: nn.functional.dropout(gradient[n].tanh() * v, 0.5) for n, v in theta.items()}
        return {n: v - moved[n] for n, v in theta.items()}, state

    net, params, data = problem()

    def run(params: Named) -> fm.MetaGradient:
        torch.manual_seed(7)
        return fm.meta_gradient(
            net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=0.3, steps=4,
            update_rule=fm.CustomRule(dropped), **BACKENDS[backend],
        )  # fmt: skip

    got, step = run(params), 1e-6
    direction = {n: torch.randn_like(v) for n, v in params.items()}
    there, back = (run({n: v + sign * step * direction[n] for n, v in params.items()}) for sign in (1, -1))
    slope = sum((got.grads[n] * direction[n]).sum() for n in params)
    assert off((there.loss - back.loss) / (2 * step), slope) < 1e-6


def test_another_derivative_of_a_rule() -> None:
    """Gradients of gradients by a network with a norm, through `inner_sgd`."""
    module = seeded(Coordinates)
    net, params, (x, y, *_) = problem()
    theta = {n: v.clone().requires_grad_() for n, v in params.items()}
    weight = module.out.weight

    def second(adapted: Callable[[Named], Named]) -> Tensor:
        total = sum(v.sin().sum() for v in adapted(theta).values())
        g = torch.autograd.grad(total, [*theta.values(), weight], create_graph=True)
        return torch.autograd.grad(sum(v.square().sum() for v in g), weight)[0]

    def ours(theta: Named) -> Named:
        how = {"loss": "mse", "lr": 1.0, "steps": 2, "update_rule": fm.CustomRule(module)}
        return fm.inner_sgd(net, theta, x, y, **how, backend="torch")

    def plain(theta: Named) -> Named:
        found = []
        for t in range(len(x)):
            now, state = dict(theta), module.init(theta)
            for _ in range(2):
                loss = (functional_call(net, now, (x[t],)) - y[t]).square().mean()
                g = torch.autograd.grad(loss, list(now.values()), create_graph=True)
                moved, after = {}, {}
                for (n, v), d in zip(now.items(), g, strict=True):
                    after[n] = module.cell(d.reshape(-1, 1), state[n])
                    h = after[n][0]  # a norm by elementary operators: PyTorch's own is wrong here
                    h = (h - h.mean(-1, True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                    h = h * module.norm.weight + module.norm.bias
                    moved[n] = v + 0.1 * module.out(h).reshape(v.shape)
                now, state = moved, after
            found.append(now)
        return {n: torch.stack([one[n] for one in found]) for n in theta}

    assert off(second(ours), second(plain)) < 1e-9


def test_rejects_what_does_not_fit() -> None:
    net, params, data = problem()
    leaf = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def run(function: Any, init: Any = None, **how: Any) -> Any:
        given = net, params, tuple(data[:2]), tuple(data[2:])
        how = {"loss": "mse", "lr": 1.0, "steps": 1, "backend": "torch", **how}
        return fm.meta_gradient(*given, update_rule=fm.CustomRule(function, init), **how)

    with pytest.raises(ValueError, match=r"reads a tensor \(\) that requires grad and is none of its arg"):
        run(lambda theta, g, state: ({n: v - leaf * g[n] for n, v in theta.items()}, state))
    with pytest.raises(TypeError, match=r"must return \(theta, state\), theta a dict of tensors, got dict"):
        run(lambda theta, g, state: theta)
    with pytest.raises(
        ValueError, match=r"must return theta\['0.bias'\] as \(5,\) torch.float64, got NoneType"
    ):
        run(lambda theta, g, state: ({"0.weight": theta["0.weight"]}, state))
    with pytest.raises(ValueError, match="a state of the same form as it was given"):
        run(lambda theta, g, state: (theta, [state]))
    with pytest.raises(TypeError, match="must hold tensors"):
        run(lambda theta, g, state: (theta, state), init=lambda theta: object())
    with pytest.raises(TypeError, match="must be an instance, got the class Scale: write Scale"):
        fm.CustomRule(Scale)
    with pytest.raises(ValueError, match="`function` must be initialised, 'weight' has no shape yet"):
        fm.CustomRule(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="`init` must be callable, got int"):
        fm.CustomRule(lambda *a: a, 3)
    with pytest.raises(TypeError, match=r"must be an update rule.* wrap it, fastmeta.CustomRule"):
        fm.inner_sgd(net, params, *data[:2], loss="mse", lr=1.0, steps=1, update_rule=seeded(Scale))
    with pytest.raises(TypeError, match=r"size of CustomRule must be torch.float64, as the parameters, got"):
        run(Scale())
    with pytest.raises(fm.BackendUnavailable, match="the update rule is CustomRule"):
        run(seeded(Scale), backend="cpu")
