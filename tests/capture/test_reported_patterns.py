"""Usage patterns of public bug reports, and what they bring up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from captured import RATE, STEPS, TOLERANCE, maml
from plain_autograd import MSE, episodes, error, network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("auto", "torch", "reference")


def _scaled_mse(scale: Tensor, output: Tensor, target: Tensor) -> Tensor:
    return scale * MSE(output, target)


def _moved(net: nn.Module, episode: list[Tensor], backend: str) -> dict[str, Callable[[], object]]:
    """Calls of which one thing has a tangent."""
    x, y, query_x, query_y = episode
    one = torch.ones((), dtype=torch.float64)
    dual = lambda t: forward_ad.make_dual(t.detach(), torch.ones_like(t))  # noqa: E731
    params = dict(net.named_parameters())
    return {
        "params": lambda: fm.task_forward(
            net, {name: dual(p) for name, p in params.items()}, x, backend=backend
        ),
        "support_x": lambda: maml(net, backend=backend)(dual(x), y, query_x, query_y),
        "query_y": lambda: maml(net, backend=backend)(x, y, query_x, dual(query_y)),
        "lr": lambda: fm.inner_sgd(net, params, x, y, loss="mse", lr=dual(one), steps=1, backend=backend),
        "loss": lambda: maml(net, loss=partial(_scaled_mse, dual(one)), backend=backend)(*episode),
    }


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["params", "support_x", "query_y", "lr", "loss"])
def test_rejects_forward_mode_by_name(which: str, backend: str, grad: bool) -> None:
    net, episode = network(), episodes()
    maml(net, backend=backend)(*episode)  # a plan is known
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        call = _moved(net, episode, backend)[which]
        with pytest.raises(RuntimeError, match="forward-mode differentiation is active"):
            call()


class Penalised(nn.Module):
    """A network whose forward pass leaves behind what a loss is to add."""

    def __init__(self, before: Tensor | float | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
        self.penalty = before
        self.parts: dict[str, Tensor] = {}
        self.features: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.penalty = hidden.square().mean()
        self.parts["kl"] = hidden.exp().mean()
        self.features[:] = [hidden]
        self.mean = hidden.mean(0)
        return self.last(hidden)


class Criterion(nn.Module):
    """A loss that holds the network."""

    def __init__(self, net: Penalised) -> None:
        super().__init__()
        self.net = net

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return MSE(output, target) + 3 * self.net.penalty


PENALTIES: dict[str, Callable[[Penalised], Callable[[Tensor, Tensor], Tensor]]] = {
    "attribute": lambda net: lambda o, y: MSE(o, y) + 3 * net.penalty,
    "dict": lambda net: lambda o, y: MSE(o, y) + 3 * net.parts["kl"],
    "list": lambda net: lambda o, y: MSE(o, y) + 3 * net.features[0].square().mean(),
    "buffer": lambda net: lambda o, y: MSE(o, y) + 3 * net.mean.square().mean(),
    "module": Criterion,
}


def _penalised(before: Tensor | float | None = 0.0) -> Penalised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Penalised(before)


def _by_the_module_itself(
    net: nn.Module,
    episode: list[Tensor],
    loss: Callable[..., Tensor],
    query_loss: Callable[..., Tensor],
    order: str,
) -> Tensor:
    """Query losses [T] by a loop that puts parameters into the module, calls it, and then the
    loss."""
    start = dict(net.named_parameters())
    owner = {name: net.get_submodule(name.rpartition(".")[0]) for name in start}
    losses = []

    def value(theta: dict[str, Tensor], x: Tensor, y: Tensor, function: Callable[..., Tensor]) -> Tensor:
        for name, tensor in theta.items():
            owner[name]._parameters[name.rpartition(".")[2]] = tensor  # type: ignore[assignment]
        return function(net(x), y)

    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta: dict[str, Tensor] = dict(start)
        for _ in range(STEPS):
            support = value(theta, support_x, support_y, loss)
            grads = torch.autograd.grad(support, list(theta.values()), create_graph=order == "second")
            theta = {name: p - RATE * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        losses.append(value(theta, query_x, query_y, query_loss))
    for name, tensor in start.items():
        owner[name]._parameters[name.rpartition(".")[2]] = tensor  # type: ignore[assignment]
    return torch.stack(losses)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", PENALTIES)
def test_loss_of_what_a_forward_pass_left_behind_matches_reference(
    which: str, backend: str, order: str
) -> None:
    net, other, episode = _penalised(), _penalised(), episodes()
    own, want = PENALTIES[which](net), PENALTIES[which](other)
    losses = _by_the_module_itself(other, episode, want, want, order)
    wanted = torch.autograd.grad(losses.mean(), list(other.parameters()))
    for memory in ("store", "recompute"):
        loss = maml(net, loss=own, backend=backend, order=order, memory=memory)(*episode).loss
        found = torch.autograd.grad(loss, list(net.parameters()), create_graph=order == "second")
        assert error(loss.detach(), losses.mean().detach()) < TOLERANCE
        assert all(error(a.detach(), b) < TOLERANCE for a, b in zip(found, wanted, strict=True))
    assert net.penalty == 0.0
    assert not net.parts
    assert not net.features


@pytest.mark.parametrize("before", [None, torch.zeros(())], ids=["None", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_penalty_in_the_query_loss_alone_matches_reference(backend: str, before: Tensor | None) -> None:
    net, other, episode = _penalised(before), _penalised(before), episodes()
    losses = _by_the_module_itself(other, episode, MSE, PENALTIES["attribute"](other), "second")
    wanted = torch.autograd.grad(losses.mean(), list(other.parameters()))
    loss = maml(net, query_loss=PENALTIES["attribute"](net), backend=backend)(*episode).loss
    found = torch.autograd.grad(loss, list(net.parameters()))
    assert all(error(a, b) < TOLERANCE for a, b in zip(found, wanted, strict=True))
    assert net.penalty is before


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_of_the_meta_parameters_matches_reference(backend: str) -> None:
    """What a loss reads of the network's parameters is where the inner loop starts, as with
    `functional_call`."""
    net, episode = network(), episodes()

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return MSE(output, target) * (1 + sum(p.square().sum() for p in net.parameters()))

    start = dict(net.named_parameters())
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta = {name: p.view_as(p) for name, p in start.items()}
        for _ in range(STEPS):
            support = penalised(functional_call(net, theta, (support_x,)), support_y)
            grads = torch.autograd.grad(support, list(theta.values()), create_graph=True)
            theta = {name: p - RATE * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        losses.append(penalised(functional_call(net, theta, (query_x,)), query_y))
    wanted = torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))
    found = torch.autograd.grad(
        maml(net, loss=penalised, backend=backend)(*episode).loss, list(net.parameters())
    )
    assert all(error(a, b) < TOLERANCE for a, b in zip(found, wanted, strict=True))
