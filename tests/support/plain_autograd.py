"""MAML written out in plain PyTorch, for the tests of the public interface; it shares no code with
the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from tensors import drawn
from torch import Tensor, nn
from torch.func import functional_call

MSE = nn.functional.mse_loss


def network(seed: int = 0, width: int = 13, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A smooth 2 -> 1 MLP with six parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
        return nn.Sequential(*layers).to(dtype)


def episodes(
    tasks: int = 3, shots: int = 5, queries: int = 7, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """support_x [T, N, 2], support_y [T, N, 1], query_x [T, M, 2], query_y [T, M, 1]."""
    shapes = (tasks, shots, 2), (tasks, shots, 1), (tasks, queries, 2), (tasks, queries, 1)
    return drawn(*shapes, seed=seed, dtype=dtype)


def adapt(
    net: nn.Module,
    params: dict[str, Tensor],
    x: Tensor,  # [N, *in], one task
    y: Tensor,
    rate: Callable[[str, int], Tensor | float],  # of a parameter at a step
    steps: int,
    weights: Tensor | None = None,  # [N]
    first_order: bool = False,
) -> dict[str, Tensor]:
    """theta_K of one task."""
    theta = dict(params)
    for k in range(steps):
        error = (functional_call(net, theta, (x,)) - y).square().mean(-1)
        loss = error.mean() if weights is None else (weights * error).mean()
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
        theta = {
            name: value - rate(name, k) * g for (name, value), g in zip(theta.items(), grads, strict=True)
        }
    return theta


def meta_losses(
    net: nn.Module,
    params: dict[str, Tensor],
    episode: list[Tensor],
    lr: float | Callable[[str, int], Tensor | float],
    steps: int,
    first_order: bool = False,
) -> Tensor:
    """Query losses [T], with their graph."""
    rate = lr if callable(lr) else lambda name, k: lr
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta = adapt(net, params, support_x, support_y, rate, steps, first_order=first_order)
        losses.append(MSE(functional_call(net, theta, (query_x,)), query_y))
    return torch.stack(losses)


def leaves(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that require grad."""
    return {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}


def all_near(got: Iterable[Tensor | None], want: Iterable[Tensor], tolerance: float = 1e-9) -> bool:
    """Whether all of `got` are there and within a relative tolerance."""
    return all(g is not None and error(g, w) < tolerance for g, w in zip(got, want, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite where anything is not finite or the shapes differ."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-300))
