"""An L2 coefficient for every parameter, learned with MAML:
`python examples/learned_l2.py [iterations]`.

The support loss is L(theta) + sum_l omega_l / 2 ||theta_l||^2. Its gradient is that of L, from the
kernels, plus
omega_l theta_l, from autograd: what `fastmeta.task_gradient` is for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm


def inner_loop(
    net: nn.Module,
    l2: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    lr: float,
    steps: int,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The parameters of every task, name -> [T, *shape], differentiable in the network's and in the
    coefficients."""
    theta = dict(net.named_parameters())
    for _ in range(steps):
        g = fm.task_gradient(net, theta, x, y, loss="mse", backend=backend)
        theta = {name: value - lr * (g[name] + l2[name] * value) for name, value in theta.items()}
    return theta


def main(iterations: int = 1_000) -> tuple[float, float]:
    """Train, and return the mean loss over the first and the last hundred meta-batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    raw = {name: torch.full((), -5.0, requires_grad=True) for name, _ in net.named_parameters()}
    optimizer = torch.optim.Adam(
        [{"params": net.parameters()}, {"params": raw.values(), "lr": 1e-2}], lr=1e-3
    )
    losses = []
    for support_x, support_y, query_x, query_y in fm.data.Sinusoid(tasks=25, shots=5, iterations=iterations):
        l2 = {name: F.softplus(value) for name, value in raw.items()}
        theta = inner_loop(net, l2, support_x, support_y, lr=0.02, steps=3)
        loss = F.mse_loss(fm.task_forward(net, theta, query_x), query_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    part = max(1, min(100, iterations // 2))
    first, last = torch.stack(losses[:part]).mean().item(), torch.stack(losses[-part:]).mean().item()
    learned = ", ".join(f"{name} {F.softplus(value).item():.4f}" for name, value in raw.items())
    print(f"loss {first:.3f} -> {last:.3f} in {iterations} iterations; L2 coefficients: {learned}")
    return first, last


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
