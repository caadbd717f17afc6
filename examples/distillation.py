"""Four examples with soft labels that stand for a data set:
`python examples/distillation.py [iterations]`.

A task is a fresh initialisation of the network, so that the examples serve all of them.

Source: Wang, Zhu, Torralba, Efros, "Dataset Distillation" (2018); soft labels: Sucholutsky,
Schonlau, "Soft-Label Dataset Distillation and Text Dataset Distillation" (2019).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

TASKS, STEPS = 8, 5


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 3))


def initialisations() -> dict[str, Tensor]:
    """name -> [T, *shape]."""
    drawn = [dict(network().named_parameters()) for _ in range(TASKS)]
    return {name: torch.stack([params[name].detach() for params in drawn]) for name in drawn[0]}


def main(iterations: int = 400) -> tuple[float, float]:
    """Distil, and return the mean loss on the data set over the first and the last tenth of the
    iterations."""
    torch.manual_seed(0)
    angle = 6.28 * torch.rand(300)
    x = torch.stack((angle.cos(), angle.sin()), -1) + 0.2 * torch.randn(300, 2)
    y = (3 * angle / 6.29).long()  # three sectors of a ring

    net = network()
    points = torch.randn(4, 2, requires_grad=True)
    labels = torch.zeros(4, 3, requires_grad=True)
    log_lr = torch.tensor(-1.0, requires_grad=True)
    optimizer = torch.optim.Adam([points, labels, log_lr], lr=0.03)
    losses = []
    for _ in range(iterations):
        sets = points.expand(TASKS, 4, 2), labels.softmax(-1).expand(TASKS, 4, 3)
        trained = fm.inner_sgd(
            net, initialisations(), *sets, loss="cross_entropy", lr=log_lr.exp(), steps=STEPS
        )
        output = fm.task_forward(net, trained, x.expand(TASKS, 300, 2))
        loss = F.cross_entropy(output.flatten(0, 1), y.repeat(TASKS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    part = max(1, iterations // 10)
    first, last = torch.stack(losses[:part]).mean().item(), torch.stack(losses[-part:]).mean().item()
    print(f"loss on the data set after training on four examples {first:.3f} -> {last:.3f}")
    return first, last


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
