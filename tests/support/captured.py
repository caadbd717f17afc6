"""Tensors that a loss or a network reads past its arguments: how tests make them, and MAML by a
loop of plain autograd over functions that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain_autograd import MSE, episodes, error
from torch import Tensor, nn

import fastmeta as fm

STEPS, RATE = 2, 0.1


TOLERANCE = 1e-9


def tensor(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()


def learned(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: weight * MSE(output, target)


def plain(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    query: Callable[[Tensor, Tensor], Tensor],
    order: str,
    episode: list[Tensor] | None = None,
) -> Tensor:
    """The mean query loss, by a loop over tasks."""
    # copies: what a loss reads of the module itself is a constant of the inner loop
    params = {name: value.clone() for name, value in net.named_parameters()}
    values = []
    for support_x, support_y, query_x, query_y in zip(*(episode or episodes()), strict=True):
        theta = params
        for _ in range(STEPS):
            value = loss(torch.func.functional_call(net, theta, (support_x,)), support_y)
            second = order == "second"
            grads = torch.autograd.grad(
                value, list(theta.values()), create_graph=second, retain_graph=True, materialize_grads=True
            )
            theta = {name: v - RATE * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        values.append(query(torch.func.functional_call(net, theta, (query_x,)), query_y))
    return torch.stack(values).mean()


def inner(
    net: nn.Module, params: dict[str, Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """theta_K of all tasks, by a loop."""
    tasks = []
    for x, y, *_ in zip(*episodes(), strict=True):
        theta = params
        for _ in range(STEPS):
            value = loss(torch.func.functional_call(net, theta, (x,)), y)
            grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            theta = {name: v - RATE * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        tasks.append(list(theta.values()))
    return [torch.stack(values) for values in zip(*tasks, strict=True)]


def maml(net: nn.Module, **options: Any) -> fm.MAML:
    return fm.MAML(net, **{"loss": "mse", "inner_lr": RATE, "inner_steps": STEPS, **options})


def compare(value: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """`value.backward()` fills the gradients that `expected` has; where there is no dependence,
    None or zeros."""
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
