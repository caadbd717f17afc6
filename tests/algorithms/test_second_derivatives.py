"""Gradients with `create_graph=True` can be differentiated again, or refuse to be; nothing is
answered with zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured import RATE, STEPS, TOLERANCE, maml
from plain_autograd import MSE, adapt, episodes, error, leaves, meta_losses, network
from torch import Tensor, nn

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

BACKENDS = ("auto", "torch", "reference")


FEW = episodes(tasks=2, shots=3, queries=3)


def twice(value: Tensor, by: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by `by`, and the gradients of a function of those."""
    first = torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), by, materialize_grads=True)
    return [*[g.detach() for g in first], *second]


def compare(value: Tensor, expected: Tensor, by: Sequence[Tensor]) -> None:
    for got, want in zip(twice(value, by), twice(expected, by), strict=True):
        if want.count_nonzero():
            assert error(got, want) < TOLERANCE
        else:
            assert not got.count_nonzero()


def compare_with_differences(value: Callable[[], Tensor], by: Sequence[Tensor]) -> None:
    """A Hessian-vector product against differences of gradients without a graph."""
    generator, step = torch.Generator().manual_seed(0), 1e-4
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in by]
    first = torch.autograd.grad(value(), by, create_graph=True, materialize_grads=True)
    plain = torch.autograd.grad(value(), by, materialize_grads=True)
    assert all(
        (g - want).norm() <= TOLERANCE * want.norm() + 1e-12 for g, want in zip(first, plain, strict=True)
    )
    got = torch.autograd.grad(first, by, directions, materialize_grads=True)

    def moved(change: float) -> list[Tensor]:
        for x, start, direction in zip(by, starts, directions, strict=True):
            x.data = start + change * step * direction
        return list(torch.autograd.grad(value(), by, materialize_grads=True))

    starts = [x.data for x in by]
    weights = {1: 8.0, -1: -8.0, 2: -1.0, -2: 1.0}  # exact for polynomials of degree four
    around = {change: moved(change) for change in weights}
    for at, mine in enumerate(got):
        want = sum(weight * around[change][at] for change, weight in weights.items()) / (12 * step)
        assert (mine - want).norm() < 1e-7 * want.norm() + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["first", "second"])
def test_outer_loss_matches_reference(order: str, backend: str) -> None:
    net, episode = network(width=3), [x.requires_grad_() for x in episodes()]
    module = maml(net, order=order, backend=backend, learn_lr="tensor", lr_per_step=True)
    rates = dict(module.inner_lrs.named_parameters())

    def rate(name: str, k: int) -> Tensor:
        return rates[name.replace(".", "__")][k][0]

    expected = meta_losses(
        net, dict(net.named_parameters()), episode, rate, STEPS, first_order=order == "first"
    ).mean()
    compare(module(*episode).loss.square(), expected.square(), [*net.parameters(), *rates.values(), *episode])


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_parameters_and_weights_match_reference(backend: str) -> None:
    net, episode = network(width=3), episodes()
    weights = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    losses = meta_losses(net, dict(net.named_parameters()), episode, RATE, STEPS)
    want = twice(torch.dot(losses, weights) / 3, [*net.parameters(), weights])
    module = maml(net, backend=backend)
    flat = fm.flatten(module)
    got = twice(module(*episode, task_weights=weights).loss, [flat, weights])
    count = len(want) // 2
    for half, (mine, by_weights) in zip((want[:count], want[count:]), (got[:2], got[2:]), strict=True):
        assert error(mine, torch.cat([g.flatten() for g in half[:-1]])) < TOLERANCE
        assert error(by_weights, half[-1]) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_match_reference(backend: str) -> None:
    net, episode = network(width=3), episodes()
    params, rate = leaves(net), torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    x, y = episode[0].requires_grad_(), episode[1]
    by = [*params.values(), x]
    moved = fm.inner_sgd(net, params, x, y, loss="mse", lr=rate, steps=STEPS, backend=backend)
    tasks = [adapt(net, params, *task, lambda name, k: rate, STEPS) for task in zip(x, y, strict=True)]
    expected = sum(value.sin().sum() for theta in tasks for value in theta.values())
    compare(sum(value.sin().sum() for value in moved.values()), expected, [*by, rate])

    output = torch.stack([torch.func.functional_call(net, params, (one,)) for one in x])
    compare(fm.task_forward(net, params, x, backend=backend).sin().sum(), output.sin().sum(), by)

    found = fm.task_gradient(net, params, x, y, loss="mse", backend=backend)
    losses = [MSE(torch.func.functional_call(net, params, (one,)), t) for one, t in zip(x, y, strict=True)]
    grads = [torch.autograd.grad(loss, list(params.values()), create_graph=True) for loss in losses]
    compare(
        sum(g.sin().sum() for g in found.values()), sum(g.sin().sum() for task in grads for g in task), by
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_captured_tensors_match_reference(backend: str) -> None:
    net, episode = network(width=3), episodes()
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    other = weight.exp()
    loss = lambda o, y: other * MSE(o, y) * weight  # noqa: E731
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(STEPS):
            value = loss(torch.func.functional_call(net, theta, (support_x,)), support_y)
            grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            theta = {name: v - RATE * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        losses.append(loss(torch.func.functional_call(net, theta, (query_x,)), query_y))
    value = maml(net, loss=loss, backend=backend)(*episode).loss
    by, expected = [*net.parameters(), weight], torch.stack(losses).mean()
    first = [torch.autograd.grad(x, by, create_graph=True) for x in (value, expected)]
    second = [torch.autograd.grad(sum(g.sin().sum() for g in f), by, retain_graph=True) for f in first]
    for got, want in zip(zip(*first, strict=True), zip(*second, strict=True), strict=True):
        assert error(got[0].detach(), got[1].detach()) < TOLERANCE
        assert error(*want) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{}, {"task_chunk": 2}, {"backend": "reference"}, {"memory": "recompute"}]
)
def test_random_draws_match_finite_differences(options: dict[str, Any]) -> None:
    net = nn.Sequential(
        nn.Linear(2, 3), nn.LayerNorm(3, eps=0.1), nn.Dropout(0.4), nn.Tanh(), nn.Linear(3, 1)
    ).double()
    module = maml(net, step_weights=(0.2, 0.0, 0.8), **options)

    def value() -> Tensor:
        torch.manual_seed(5)
        return module(*FEW).loss

    compare_with_differences(value, list(net.parameters()))


def relatives() -> dict[str, fm.MAML]:
    normed = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)).double()
    context = nn.Sequential(fm.Context(2), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    given = {"loss": "mse", "inner_lr": RATE, "inner_steps": STEPS}
    return {
        "MAML++": fm.MAMLPlusPlus(normed, multi_step_epochs=2, first_order_epochs=0, **given),
        "MetaCurvature": fm.MetaCurvature(network(width=3), **given),
        "MetaSGD": fm.MetaSGD(network(width=3), **given),
        "ANIL": fm.ANIL(network(width=3), **given),
        "CAVIA": fm.CAVIA(context, **given),
    }


@pytest.mark.parametrize("name", ["MAML++", "MetaCurvature", "MetaSGD", "ANIL", "CAVIA"])
def test_relatives_match_finite_differences(name: str) -> None:
    module = relatives()[name]
    by = [value for value in module.parameters() if value.requires_grad]
    compare_with_differences(lambda: module(*FEW).loss, by)


class NormedLoss(nn.Module):
    """A loss network with a norm, whose fused form has no right third derivative."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 1)).double()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.net(torch.cat([output, target], -1)).square().mean()


@pytest.mark.parametrize(
    ("norm", "backend"),
    [
        (nn.LayerNorm(3), "torch"),
        (nn.GroupNorm(1, 3), "torch"),
        (nn.BatchNorm1d(3), "torch"),
        (nn.LayerNorm(3), "reference"),
    ],
)
def test_norms_match_finite_differences(norm: nn.Module, backend: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 1)).double()
    loss = NormedLoss(copy.deepcopy(norm))  # the loss's own batch norm counts its batches
    module = maml(net, loss=loss, query_loss="mse", backend=backend)
    compare_with_differences(
        lambda: module(*FEW).loss, [net[0].weight, net[3].weight, *loss.net[0].parameters()]
    )


@pytest.mark.parametrize("options", [{}, {"materialize_grads": True}, {"allow_unused": True}])
@pytest.mark.parametrize("name", ["IMAML", "Reptile"])
def test_rejects_second_derivatives_that_are_not_offered(name: str, options: dict[str, bool]) -> None:
    net, episode = network(width=3), episodes()
    given = {"loss": "mse", "inner_lr": RATE, "inner_steps": 50}
    if name == "IMAML":
        loss = fm.IMAML(net, proximal=2.0, **given)(*episode).loss
    else:
        loss = fm.Reptile(net, **given)(*episode[:2]).loss
    params = list(net.parameters())
    first = torch.autograd.grad(loss, params, create_graph=True)
    value = sum(g.sum() for g in first)
    for by in (params, params[2:3]):
        with pytest.raises(RuntimeError, match="once differentiable"):
            torch.autograd.grad(value, by, retain_graph=True, **options)
    with pytest.raises(RuntimeError, match="once differentiable"):
        value.backward()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", ["parameter", "rate", "input"])
def test_rejects_changes_between_forward_and_backward(changed: str, backend: str, flat: bool) -> None:
    net, episode = network(width=3), episodes()
    module = maml(net, backend=backend, learn_lr="scalar")
    vector = fm.flatten(module) if flat else None
    loss = module(*episode).loss
    with torch.no_grad():
        if changed == "input":
            episode[2].add_(1)
        elif vector is not None:
            vector.add_(1)
        else:
            (net[2].weight if changed == "parameter" else module.inner_lrs["all"]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
