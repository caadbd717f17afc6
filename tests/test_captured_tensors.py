"""Tensors that require grad and that a loss or a network reads past its arguments get their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from tests.plain_autograd import MSE, episodes, error, network

TOLERANCE = 1e-9
BACKENDS = ("torch", "reference")
ORDERS = ("first", "second")
STEPS, RATE = 2, 0.1

GLOBAL = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


def tensor(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()


class Holder:
    """An object of the user's."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * MSE(output, target)


class LearnedLoss(nn.Module):
    """A loss network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(seed=5, width=3)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.net(torch.cat([output, target], -1)).square().mean()


class Doubled(torch.autograd.Function):
    """Called without PyTorch's functions seeing its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return 2 * scale * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return 2 * scale * grad, (2 * x * grad).sum()


class Modulated(nn.Module):
    """A network whose features something from elsewhere scales."""

    def __init__(self, scale: Callable[[], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.scale()))


def losses() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]]:
    """(a loss, what it reads)."""
    a, z, net = tensor(), tensor(3), LearnedLoss()
    hyper = nn.Linear(3, 2).double()
    v = hyper(z)  # made outside, once
    held, pieces = {"list": [tensor(seed=7)]}, z.unbind()
    module = LearnedLoss()
    return {
        "closure": (lambda o, y: a * MSE(o, y), [a]),
        "default": (lambda o, y, w=a: w.exp() * MSE(o, y), [a]),
        "partial": (partial(lambda w, o, y: w * MSE(o, y), a), [a]),
        "attribute": (Holder(a), [a]),
        "global": (lambda o, y: GLOBAL * MSE(o, y), [GLOBAL]),
        "container": (lambda o, y: held["list"][0] * MSE(o, y), held["list"]),
        "network behind a lambda": (lambda o, y: net(o, y), list(net.parameters())),
        "module": (module, list(module.parameters())),
        "made by a network": (lambda o, y: (o - y - v[0]).square().mean() * v[1], [z, *hyper.parameters()]),
        "pieces": (lambda o, y: (o * pieces[0] - y * pieces[1]).square().mean() * a, [z, a]),
        "made and made of": (lambda o, y: (o * v.sum() - y * z[0]).square().mean(), [z, *hyper.parameters()]),
        "function": (lambda o, y: MSE(Doubled.apply(o, a), y), [a]),
        "function of made and made of": (lambda o, y: MSE(Doubled.apply(o, z[0] * a), y * v[0]), [a, z, hyper.weight]),
        "transposed": (lambda o, y: MSE(o @ net.net[4].weight.mT[:1], y), [net.net[4].weight]),
        "list of tensors": (lambda o, y: torch.cat([o - y, a.expand(2, 1)]).square().mean(), [a]),
        "einsum": (lambda o, y: torch.einsum("nd,nd,k->", o, o - y, a.expand(1)), [a]),
        "argument by name": (lambda o, y: torch.square(o - y).mean().mul(other=a), [a]),
    }


def forwards() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """(a network, what it reads)."""
    a, z, hyper = tensor(3), tensor(2), nn.Linear(2, 3).double()
    film = hyper(z)
    attribute, buffer = Modulated(lambda: attribute.here), Modulated(lambda: buffer.there)
    attribute.here = a
    buffer.register_buffer("there", film)
    return {
        "closure": (Modulated(lambda: a), [a]),
        "computed inside": (Modulated(lambda: a.exp()), [a]),
        "made by a network": (Modulated(lambda: film), [z, *hyper.parameters()]),
        "another network": (Modulated(lambda: hyper(z)), [z, *hyper.parameters()]),
        "attribute": (attribute, [a]),
        "buffer": (buffer, [z, *hyper.parameters()]),
    }


def plain(
    net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], query: Callable[[Tensor, Tensor], Tensor], order: str
) -> Tensor:
    """The mean query loss, by a loop over tasks."""
    params = dict(net.named_parameters())
    values = []
    for support_x, support_y, query_x, query_y in zip(*episodes(), strict=True):
        theta = params
        for _ in range(STEPS):
            value = loss(torch.func.functional_call(net, theta, (support_x,)), support_y)
            grads = torch.autograd.grad(value, list(theta.values()), create_graph=order == "second", retain_graph=True)
            theta = {name: v - RATE * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        values.append(query(torch.func.functional_call(net, theta, (query_x,)), query_y))
    return torch.stack(values).mean()


def maml(net: nn.Module, **options: Any) -> fm.MAML:
    return fm.MAML(net, **{"loss": "mse", "inner_lr": RATE, "inner_steps": STEPS, **options})


def compare(value: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """`value.backward()` fills the gradients that `expected` has; where there is no dependence, None or zeros."""
    want = torch.autograd.grad(expected, leaves, retain_graph=True, materialize_grads=True)
    for leaf in leaves:
        leaf.grad = None
    value.backward()
    assert error(value.detach(), expected.detach()) < TOLERANCE
    for leaf, gradient in zip(leaves, want, strict=True):
        if gradient.count_nonzero():
            assert leaf.grad is not None
            assert error(leaf.grad, gradient) < TOLERANCE
        else:
            assert leaf.grad is None or not leaf.grad.count_nonzero()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", losses())
def test_captured_by_a_loss_matches_reference(name: str, order: str, backend: str) -> None:
    for where in ("loss", "query_loss"):
        loss, read = losses()[name]
        net = network(width=3)
        both = {"loss": MSE, "query_loss": MSE, where: loss}
        expected = plain(net, both["loss"], both["query_loss"], order)
        value = maml(net, order=order, backend=backend, **both)(*episodes()).loss
        compare(value, expected, [*net.parameters(), *read])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", forwards())
def test_captured_by_a_forward_matches_reference(name: str, order: str, backend: str) -> None:
    net, read = forwards()[name]
    value = maml(net, order=order, backend=backend)(*episodes()).loss
    compare(value, plain(net, MSE, MSE, order), [*net.parameters(), *read])
