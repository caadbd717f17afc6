"""Meta-SGD: a learned inner learning rate for each weight and step:
`python examples/learned_rates.py [iterations]`."""

from __future__ import annotations

import sys

import torch
from torch import nn

import fastmeta as fm


def main(iterations: int = 2_000) -> tuple[float, float]:
    """Train, and return the mean loss over the first and the last hundred meta-batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = fm.MetaSGD(net, loss="mse", inner_lr=0.01, inner_steps=2, lr_per_step=True)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    losses = []
    for episode in fm.data.Sinusoid(tasks=25, shots=10, iterations=iterations):
        out = maml(*episode)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.detach())
    part = max(1, min(100, iterations // 2))
    first, last = torch.stack(losses[:part]).mean().item(), torch.stack(losses[-part:]).mean().item()
    print(f"loss {first:.3f} -> {last:.3f} in {iterations} iterations")
    return first, last


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
