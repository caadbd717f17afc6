"""An encoder trained through a head:
`python examples/closed_form_heads.py [--head logistic] [--iterations 400]`."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmeta as fm

HEADS = {"ridge": fm.heads.Ridge, "logistic": fm.heads.Logistic, "prototypes": fm.heads.Prototypes}


def points(classes: int = 60, examples: int = 30, width: int = 16) -> Tensor:
    """Noise around the centre of each class in 3 of the dimensions, noise alone in the others."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(classes, examples, width, generator=random)
    x[..., :3] = 0.3 * x[..., :3] + torch.randn(classes, 1, 3, generator=random)
    return x


def main(head: str = "ridge", iterations: int = 400) -> tuple[float, float]:
    """Train, and return the mean loss over the first and the last tenth of the meta-batches."""
    torch.manual_seed(0)
    encoder, solver = fm.models.MLP((16, 64, 32)), HEADS[head]()
    optimizer = torch.optim.Adam([*encoder.parameters(), *solver.parameters()], lr=1e-3)
    losses = []
    for episode in fm.data.Episodes(points(), ways=5, shots=3, query=5, tasks=8, iterations=iterations):
        support, query = (
            encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (episode.support_x, episode.query_x)
        )
        logits = solver(support, episode.support_y, query, ways=5)  # [T, M, 5]
        loss = F.cross_entropy(logits.flatten(0, 1), episode.query_y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    part = max(1, iterations // 10)
    first, last = torch.stack(losses[:part]).mean().item(), torch.stack(losses[-part:]).mean().item()
    print(f"{head}: loss {first:.3f} -> {last:.3f} in {iterations} iterations")
    return first, last


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", choices=HEADS, default="ridge")
    parser.add_argument("--iterations", type=int, default=400)
    main(**vars(parser.parse_args()))
