"""MAML on networks that few people bring: by the library, and by a loop of plain autograd."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import fastmeta as fm


def tensors(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(net, sx, sy, qx, qy, loss=F.mse_loss, order="second", steps=2, swap=torch.func.functional_call):
    """The mean query loss and its gradients, by a loop."""
    losses = []
    for task in zip(sx, sy, qx, qy, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(steps):
            inner = loss(swap(net, theta, (task[0],)), task[1])
            gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=order == "second")
            theta = {k: v - 0.1 * g for (k, v), g in zip(theta.items(), gradient, strict=True)}
        losses.append(loss(swap(net, theta, (task[2],)), task[3]))
    mean = torch.stack(losses).mean()
    return [mean.detach(), *torch.autograd.grad(mean, list(net.parameters()))]


def ours(net, episode, backend, **options):
    net.zero_grad()
    maml = fm.MAML(net, **{"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, "backend": backend, **options})
    loss = maml(*episode).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def check(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


class Through(nn.Module):
    """A linear layer and a function of what it gives."""

    def __init__(self, function, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(4, width).double(), function

    def forward(self, x):
        return self.function(self.linear(x)).flatten(1).mean(1, keepdim=True)


def episode_of(*shape, seed=0):
    x = tensors(2, 2, 4, *shape, seed=seed)
    y = tensors(2, 2, 4, 1, seed=seed + 1)
    return x[0], y[0], x[1], y[1]
