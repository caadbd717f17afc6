"""Meta-gradients against loops that call the module itself, and against finite differences of the
meta-loss.

`reference` exchanges a module's parameters as the other backends do, so what is wrong about that it
cannot see. Here each task has a copy of the module, its parameters are assigned as plain
attributes, and no line of the library takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain_autograd import error
from tensors import drawn
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastmeta as fm

RATE, STEPS, TASKS, N, M = 0.3, 2, 3, 5, 7


class _Checkpointed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.how == "sequential":
            hidden = checkpoint_sequential(self.body, 2, hidden, use_reentrant=False)
        elif self.how == "plain":
            hidden = self.body(hidden)
        else:
            hidden = checkpoint(self.body, hidden, use_reentrant=self.how == "reentrant")
        return self.last(hidden)


class _TwoHeads(nn.Module):
    """One trunk, registered by both heads."""

    def __init__(self) -> None:
        super().__init__()
        trunk = nn.Linear(3, 4)
        self.one, self.two = (
            nn.Sequential(trunk, nn.Tanh(), nn.Linear(4, 2)),
            nn.Sequential(trunk, nn.Linear(4, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x).sin()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x.unsqueeze(-1))  # [N, 3, 4]
        return self.down(self.attention(up, up, up, need_weights=True)[0].mean(1))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.out = kind(1, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x.unsqueeze(-1))[0][:, -1])


class _Stateful(nn.Module):
    """Starts from what it left behind: a tensor, a list, a buffer, a tensor written in place, a
    number."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.passes = how, 0
        self.linear = nn.Linear(3, 2)
        self.hidden: Tensor | None = None
        self.past: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(2))
        self.total = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        if self.how == "tensor":
            mean = y.mean(0)
            y = y if self.hidden is None else y + 0.5 * self.hidden
            self.hidden = mean
        elif self.how == "list":
            y = y + sum(self.past, torch.zeros(2))
            self.past.append(y.mean(0))
        elif self.how == "buffer":
            y = y * (1 + self.mean)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        elif self.how == "in_place":
            y = y * (1 + self.total)
            self.total.add_(y.detach().mean(0))
        else:
            self.passes += 1
            y = y / self.passes
        return y


def _tied() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(3, 2))


def _shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2))


def _prelu_twice() -> nn.Module:
    function = nn.PReLU()
    return nn.Sequential(nn.Linear(3, 4), function, nn.Linear(4, 4), function, nn.Linear(4, 2))


def _normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class _Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
        self.weights = [layer.weight for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights[0].T) @ self.weights[1].T + self.layers[1].bias


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "shared_module": _shared,
    "prelu_twice": _prelu_twice,
    "trunk_of_two_heads": _TwoHeads,
    "tied_weights": _tied,
    "checkpointed": lambda: _Checkpointed("not"),
    "checkpointed_reentrant": lambda: _Checkpointed("reentrant"),
    "checkpointed_sequential": lambda: _Checkpointed("sequential"),
    "weight_norm": lambda: _normed(parametrizations.weight_norm),
    "spectral_norm": lambda: _normed(parametrizations.spectral_norm).eval(),
    "lstm": lambda: _Recurrent(nn.LSTM),
    "gru": lambda: _Recurrent(nn.GRU),
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "attention": _Attention,
    **{
        f"state_{how}": lambda how=how: _Stateful(how)
        for how in ("tensor", "list", "buffer", "in_place", "number")
    },
}


def _network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETWORKS[name]().double()
        if isinstance(net, _Stateful):
            net.total = net.total.double()
        return net


def _episode() -> list[Tensor]:
    return drawn((TASKS, N, 3), (TASKS, N, 2), (TASKS, M, 3), (TASKS, M, 2), seed=1)


def _assign(net: nn.Module, names: list[str], theta: list[Tensor]) -> None:
    """Plain attributes in the place of parameters, in every module and list that has the parameter
    of a name."""
    for name, value in zip(names, theta, strict=True):
        path, _, key = name.rpartition(".")
        owner = net.get_submodule(path)
        old = owner._parameters.pop(key) if key in owner._parameters else getattr(owner, key)
        owner.__dict__[key] = value
        for module in net.modules():
            for other in [other for other, held in module._parameters.items() if held is old]:
                del module._parameters[other]
                module.__dict__[other] = value
            for other, held in vars(module).items():
                if held is old:
                    module.__dict__[other] = value
                if type(held) is list:
                    held[:] = [value if item is old else item for item in held]


def _meta_losses(net: nn.Module, names: list[str], theta: list[Tensor], order: str) -> Tensor:
    """Query losses [T] of a loop over tasks, each with a copy of the module."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*_episode(), strict=True):
        own, fast = copy.deepcopy(net), theta
        for _ in range(STEPS):
            _assign(own, names, fast)
            loss = (own(support_x) - support_y).square().mean()
            grads = torch.autograd.grad(loss, fast, create_graph=order == "second", retain_graph=True)
            fast = [value - RATE * grad for value, grad in zip(fast, grads, strict=True)]
        _assign(own, names, fast)
        losses.append((own(query_x) - query_y).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("order", "backend"),
    [("second", "auto"), ("second", "torch"), ("second", "reference"), ("first", "torch")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient_matches_loop_that_calls_the_module(
    name: str, order: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _network(name)
    names = [key for key, _ in net.named_parameters()]
    theta = [value.detach().clone().requires_grad_() for value in net.parameters()]
    same = net
    if isinstance(net, _Checkpointed):
        # checkpoints cannot be differentiated twice where they are reentrant, and in all cases
        # compute this
        same = _Checkpointed("plain").double()
        same.load_state_dict(net.state_dict())
    with monkeypatch.context() as patch:
        # the fused one has a wrong second derivative: torch.autograd.gradgradcheck refuses it
        patch.setattr(torch, "_weight_norm", lambda v, g, dim: v * g / v.norm(dim=1, keepdim=True))
        losses = _meta_losses(same, names, theta, order)
        want = torch.autograd.grad(losses.mean(), theta)
    maml = fm.MAML(net, loss="mse", inner_lr=RATE, inner_steps=STEPS, order=order, backend=backend)
    for _ in range(2):
        net.zero_grad()
        out = maml(*_episode())
        out.loss.backward()
        assert error(out.task_losses, losses.detach()) < 1e-9
        for key, value in zip(names, want, strict=True):
            grad = net.get_parameter(key).grad
            assert error(grad, value) < 1e-9 or float((grad - value).abs().max()) < 1e-13, key


# without kinks, and without anything that the networks themselves detach
SMOOTH = [
    "shared_module",
    "tied_weights",
    "checkpointed",
    "weight_norm",
    "lstm",
    "batch_norm",
    "attention",
    "state_tensor",
]


@pytest.mark.parametrize("name", SMOOTH)
def test_meta_gradient_matches_finite_differences_of_the_meta_loss(name: str) -> None:
    net = _network(name)
    names = [key for key, _ in net.named_parameters()]
    out = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (_episode()[0], _episode()[1]),
        (_episode()[2], _episode()[3]),
        loss="mse",
        lr=RATE,
        steps=STEPS,
        backend="torch",
    )
    generator = torch.Generator().manual_seed(2)
    theta = [value.detach() for value in net.parameters()]
    direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in theta]

    def meta_loss(at: float) -> float:
        moved = [(value + at * v).requires_grad_() for value, v in zip(theta, direction, strict=True)]
        return float(_meta_losses(net, names, moved, "first").mean().detach())

    h = 1e-3  # a formula of fourth order: what it leaves out is about 1e-12 of the derivative, rounding 1e-12
    numeric = (8 * (meta_loss(h) - meta_loss(-h)) - meta_loss(2 * h) + meta_loss(-2 * h)) / (12 * h)
    assert out.grads is not None
    exact = sum(float((out.grads[key] * v).sum()) for key, v in zip(names, direction, strict=True))
    assert abs(exact - numeric) < 1e-6 * abs(numeric), (exact, numeric)
