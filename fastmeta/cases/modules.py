"""The networks of the workloads that are more than layers in a row: recurrent, graph, low-rank
updates and embeddings, written as a user would write them. How JAX computes them stands in
`fastmeta.benchmark.peers.jax_modules`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """A sequence [N, S, I] through a recurrent layer, its last state through a linear head.

    Args:
        core: `nn.LSTM` or `nn.GRU`.
        inputs: I.
        width: of the state.
        outputs: of the head.
    """

    def __init__(self, core: type[nn.LSTM] | type[nn.GRU], inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.core = core(inputs, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, I] -> [N, outputs]."""
        states: Any = self.core(x)[0]
        return self.head(states[:, -1])


class GraphNet(nn.Module):
    """Rounds of messages between the nodes of a graph, then the mean over nodes through a linear
    head.

    Args:
        inputs: I, features of a node.
        width: of a node's state.
        outputs: of the head.
        rounds: of messages.
    """

    def __init__(self, inputs: int, width: int, outputs: int, rounds: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(rounds))
        self.message = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(rounds))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """[N, nodes, I] and [N, nodes, nodes] -> [N, outputs]."""
        h = torch.relu(self.embed(x))
        for own, message in zip(self.own, self.message, strict=True):
            h = torch.relu(own(h) + adjacency @ message(h) / x.shape[1])
        return self.head(h.mean(1))


class LowRank(nn.Module):
    """A linear layer whose weight is W + A B, of which A and B are what adapts."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.a = nn.Parameter(0.1 * torch.randn(outputs, rank))
        self.b = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        return x @ (self.weight + self.a @ self.b).T


class Lora(nn.Module):
    """Two linear layers with low-rank updates (Hu et al., "LoRA", 2021), a tanh between."""

    def __init__(self, inputs: int, width: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.first = LowRank(inputs, width, rank)
        self.second = LowRank(width, outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        return self.second(torch.tanh(self.first(x)))


class Melu(nn.Module):
    """An embedding for each field of a user and an item, then an MLP (Lee et al., "MeLU", 2019)."""

    def __init__(self, fields: int, entries: int, size: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(entries, size) for _ in range(fields))
        self.hidden = nn.Linear(fields * size, width)
        self.rating = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers [N, fields] -> [N, 1]."""
        rows = [embedding(ids[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.rating(F.relu(self.hidden(torch.cat(rows, -1))))
