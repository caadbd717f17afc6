"""An encoder in plain PyTorch before a head that adapts:
`python examples/features.py [iterations]`."""

from __future__ import annotations

import sys

import torch
from torch import nn

import fastmeta as fm


def main(iterations: int = 2_000) -> tuple[float, float]:
    """Train, and return the mean loss over the first and the last hundred meta-batches."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()
    )  # any module, run by PyTorch
    head = fm.MAML(nn.Linear(40, 1), loss="mse", inner_lr=0.05, inner_steps=3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for support_x, support_y, query_x, query_y in fm.data.Sinusoid(tasks=25, shots=10, iterations=iterations):
        # gradients reach the encoder through the support and the query features alike
        out = head(encoder(support_x), support_y, encoder(query_x), query_y)
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
