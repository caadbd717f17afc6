"""Networks and losses that draw from Python, NumPy or generators of their own: every run again
draws the same."""

import itertools
import os
import random
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

_GLOBAL = np.random.default_rng(5)


class _Held:
    def __init__(self, generator):
        self.inside = {"rng": [generator]}

    def draw(self):
        return self.inside["rng"][0].random()


class _Scaled(nn.Module):
    """Half of its passes are ten times as large: `draw` decides."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(3, 1).double(), draw

    def forward(self, x):
        return torch.tanh(self.linear(x)) * (1 + 9 * float(self.draw() < 0.5))


class _GlobalRead(_Scaled):
    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * (1 + 9 * (_GLOBAL.random() < 0.5))


class _OwnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(3, 1).double(), torch.Generator().manual_seed(4)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * torch.rand((), generator=self.generator, dtype=x.dtype)


def _closure():
    generator = random.Random(3)
    return lambda: generator.random()


NETS = {
    "python": lambda: _Scaled(random.random),
    "python-through-lambda": lambda: _Scaled(lambda: random.random()),
    "python-own": lambda: _Scaled(random.Random(2).random),
    "python-closure": lambda: _Scaled(_closure()),
    "numpy": lambda: _Scaled(np.random.random),
    "numpy-own": lambda: _Scaled(np.random.default_rng(2).random),
    "numpy-legacy": lambda: _Scaled(np.random.RandomState(2).rand),
    "numpy-mt19937": lambda: _Scaled(np.random.Generator(np.random.MT19937(2)).random),
    "numpy-global-name": _GlobalRead,
    "held-deep": lambda: _Scaled(_Held(np.random.default_rng(2)).draw),
    "torch": lambda: _Scaled(lambda: torch.rand(()).item()),
    "torch-own": _OwnTorch,
}
NOT_REPLAYABLE = {
    "urandom": lambda: _Scaled(lambda: os.urandom(1)[0] / 256),
    "system": lambda: _Scaled(random.SystemRandom().random),
    "iterator": lambda: _Scaled(itertools.cycle([0.2, 0.9, 0.9, 0.2, 0.9]).__next__),
    "clock": lambda: _Scaled(lambda: time.perf_counter_ns() % 1009 / 1009),
}


def _episode(tasks=2):
    x = torch.randn(2, tasks, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(2, tasks, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x[0], y[0], x[1], y[1]


def _seed():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is meant
    torch.manual_seed(1)
    global _GLOBAL
    _GLOBAL = np.random.default_rng(5)


def _next_draws():
    numbers = [random.random(), np.random.random(), torch.rand(()).item()]  # noqa: NPY002 - the global generator
    return torch.tensor(numbers, dtype=torch.float64)


def _answer(make, memory, steps=3, loss="mse", tasks=2, warm=True, **options):
    """Loss, gradients, and a draw from each global generator after the call."""
    torch.manual_seed(0)
    maml = fm.MAML(
        make(), loss=loss, inner_lr=0.1, inner_steps=steps, memory=memory, backend="torch", **options
    )
    if warm:  # checks of a first call draw as well, and must leave no trace
        other = fm.MAML(
            make(), loss=loss, inner_lr=0.1, inner_steps=steps, memory=memory, backend="torch", **options
        )
        other(*_episode(tasks))
    torch.manual_seed(0)
    maml.net.load_state_dict({k: torch.full_like(v, 0.3) for k, v in maml.net.state_dict().items()})
    _seed()
    out = maml(*_episode(tasks))
    out.loss.backward()
    after = _next_draws()
    return torch.cat(
        [out.loss.detach().reshape(1), *(p.grad.flatten() for p in maml.net.parameters()), after]
    )


@pytest.mark.parametrize("name", NETS)
def test_recompute_of_random_network_matches_store(name):
    stored = _answer(NETS[name], "store")
    torch.testing.assert_close(_answer(NETS[name], "recompute"), stored, rtol=1e-12, atol=0)
    torch.testing.assert_close(_answer(NETS[name], "auto", warm=False), stored, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NETS)
def test_random_network_matches_plain_loop(name):
    def plain():
        torch.manual_seed(0)
        net = NETS[name]()
        net.load_state_dict({k: torch.full_like(v, 0.3) for k, v in net.state_dict().items()})
        _seed()
        sx, sy, qx, qy = (tensor[0] for tensor in _episode(1))
        theta = dict(net.named_parameters())
        for _ in range(3):
            inner = F.mse_loss(torch.func.functional_call(net, theta, (sx,)), sy)
            gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            theta = {k: v - 0.1 * g for (k, v), g in zip(theta.items(), gradient, strict=True)}
        loss = F.mse_loss(torch.func.functional_call(net, theta, (qx,)), qy)
        loss.backward()
        after = _next_draws()
        return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in net.parameters()), after])

    expected = plain()
    for memory in ("store", "recompute", "auto"):
        torch.testing.assert_close(_answer(NETS[name], memory, tasks=1), expected, rtol=1e-9, atol=1e-12)


def test_python_draws_are_each_tasks_own():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return x * self.scale + random.random()

    maml = fm.MAML(Noise(), loss="mse", inner_lr=0.1, inner_steps=1)
    x = torch.zeros(3, 2, 1, dtype=torch.float64)
    output = maml(x, x, x, x).output[:, 0, 0]
    assert len(set(output.tolist())) == 3
    assert "Python's `random`" in str(maml.explain(x, x, x, x))


def test_draws_that_begin_later_are_each_tasks_own():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.on = nn.Parameter(torch.ones(1, dtype=torch.float64)), [False]

        def forward(self, x):
            return x * self.scale + (random.random() if self.on[0] else 0.0)

    maml = fm.MAML(Late(), loss="mse", inner_lr=0.1, inner_steps=1, backend="torch")
    x = torch.zeros(3, 2, 1, dtype=torch.float64)
    maml(x, x, x, x)
    maml.net.on[0] = True
    random.seed(0)
    assert len(set(maml(x, x, x, x).output[:, 0, 0].tolist())) == 3
    drawn = random.random()
    random.seed(0)
    assert drawn == [random.random() for _ in range(7)][-1]  # three for the inner step, three for the queries


def test_random_loss_matches_store():
    generator = np.random.default_rng(1)

    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target + generator.normal())

    def answer(memory):
        nonlocal generator
        generator = np.random.default_rng(1)
        return _answer(lambda: _Scaled(lambda: 1.0), memory, loss=noisy, warm=False)

    torch.testing.assert_close(answer("recompute"), answer("store"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NOT_REPLAYABLE)
def test_rejects_recomputing_what_cannot_be_replayed(name):
    torch.manual_seed(0)
    maml = fm.MAML(
        NOT_REPLAYABLE[name](), loss="mse", inner_lr=0.1, inner_steps=5, memory="recompute", backend="torch"
    )
    before = [p.clone() for p in maml.net.parameters()]

    def several():  # each has odds of 1 in 1000 to draw the same ten times
        for _ in range(8):
            maml(*_episode())

    with pytest.raises(RuntimeError, match=r"memory='recompute': .*cannot be replayed.*memory='store'"):
        several()
    assert all(torch.equal(a, b) for a, b in zip(before, maml.net.parameters(), strict=True))


def test_auto_stores_what_cannot_be_replayed(monkeypatch):
    monkeypatch.setattr("fastmeta.backends.torch.memory.STORE_AT_MOST", 0)
    maml = fm.MAML(NOT_REPLAYABLE["urandom"](), loss="mse", inner_lr=0.1, inner_steps=5, backend="torch")
    for _ in range(8):
        maml(*_episode())
    assert "cannot be replayed" in str(maml.explain(*_episode()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("operator", ["inner_sgd", "task_forward"])
def test_operators_gradient_of_random_network_matches_plain_loop(name, operator):
    def params(net):
        return {k: torch.full_like(v, 0.3).requires_grad_() for k, v in net.named_parameters()}

    x, y, _, _ = _episode(1)

    def ours():
        net = NETS[name]()
        theta = params(net)
        _seed()
        if operator == "task_forward":
            value = fm.task_forward(net, theta, x).square().sum()
        else:
            adapted = fm.inner_sgd(net, theta, x, y, loss="mse", lr=0.1, steps=2)
            value = sum(v.square().sum() for v in adapted.values())
        _next_draws()  # somebody draws between forward and backward
        return torch.autograd.grad(value, list(theta.values()))

    def plain():
        net = NETS[name]()
        theta = leaves = params(net)
        _seed()
        if operator == "task_forward":
            value = torch.func.functional_call(net, theta, (x[0],)).square().sum()
        else:
            for _ in range(2):
                inner = F.mse_loss(torch.func.functional_call(net, theta, (x[0],)), y[0])
                gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
                theta = {k: v - 0.1 * g for (k, v), g in zip(theta.items(), gradient, strict=True)}
            value = sum(v.square().sum() for v in theta.values())
        return torch.autograd.grad(value, list(leaves.values()))

    for mine, theirs in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_rejects_backward_of_what_cannot_be_replayed():
    net = NOT_REPLAYABLE["urandom"]()
    theta = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
    x, y, _, _ = _episode()

    def several():
        for _ in range(8):
            adapted = fm.inner_sgd(net, theta, x, y, loss="mse", lr=0.1, steps=5)
            sum(v.sum() for v in adapted.values()).backward()

    with pytest.raises(RuntimeError, match=r"inner_sgd: .*cannot be replayed"):
        several()


def test_gradient_that_cancels_is_not_taken_for_another_run():
    torch.manual_seed(0)
    # the bias in front of the batch norm has a gradient of zero but for rounding
    layers = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(50, 3)
    net = nn.Sequential(*layers).double()
    x, y = torch.randn(2, 3, 2, 5, 5, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    found = {}
    for backend in ("torch", "reference"):
        params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        values = fm.task_gradient(net, params, x, y, loss="mse", backend=backend)
        sum(value.pow(2).sum() for value in values.values()).backward()
        found[backend] = torch.cat([value.grad.flatten() for value in params.values()])
    assert (found["torch"] - found["reference"]).norm() <= 1e-9 * found["reference"].norm()
