"""Weights of noisy training examples, learned on a few clean ones:
`python examples/reweighting.py [iterations]`.

Source: Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep Learning" (2018).
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import fastmeta as fm


def main(iterations: int = 200) -> tuple[float, float]:
    """Learn the weights, and return the mean weight of the examples with wrong labels and of the
    others."""
    torch.manual_seed(0)
    x, clean_x = torch.randn(1, 60, 2), torch.randn(1, 20, 2)  # one task
    y, clean_y = (points.sum(-1).gt(0).long() for points in (x, clean_x))
    wrong = torch.rand(1, 60) < 0.4
    y = torch.where(wrong, 1 - y, y)

    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2)).requires_grad_(False)
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=0.5, inner_steps=10, adapt="*", weight_norm="sum")
    logits = torch.zeros(1, 60, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(iterations):
        loss = maml(x, y, clean_x, clean_y, support_weights=logits.sigmoid()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = logits.detach().sigmoid()
    found = weights[wrong].mean().item(), weights[~wrong].mean().item()
    print(
        f"mean weight {found[0]:.2f} of wrong labels, {found[1]:.2f} of right ones; clean loss "
        f"{loss.item():.3f}"
    )
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
