"""Networks of graphs and of sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.architectures.small import small

NODES, INPUTS, WIDTH = 5, 3, 4
#: A constant graph: from, to.
EDGES = ((0, 1, 1, 2, 3, 4, 4, 0), (1, 0, 2, 3, 1, 0, 2, 4))


class ConstantGcn(nn.Module):
    """Two graph convolutions over a constant, normalised adjacency (Kipf, Welling, 2017)."""

    adjacency: Tensor

    def __init__(self) -> None:
        super().__init__()
        adjacency = torch.eye(NODES)
        adjacency[EDGES[1], EDGES[0]] = 1
        degree = adjacency.sum(1).rsqrt()
        self.register_buffer("adjacency", degree[:, None] * adjacency * degree)
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.adjacency @ self.first(x))
        return (self.adjacency @ self.second(h)).mean(1)


class OwnGcn(nn.Module):
    """Graph convolutions over a weighted adjacency that comes with every example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        adjacency = weights.abs() / weights.abs().sum(-1, keepdim=True)
        h = F.elu(torch.bmm(adjacency, self.first(x)))
        return self.second(torch.bmm(adjacency, h)).sum(1)


class Gat(nn.Module):
    """Attention along the edges of a constant graph (Velickovic et al., 2018)."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        mask = torch.eye(NODES, dtype=torch.bool)
        mask[EDGES[1], EDGES[0]] = True
        self.register_buffer("mask", mask)
        self.weight = nn.Linear(INPUTS, WIDTH, bias=False)
        self.source, self.target = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.weight(x)
        scores = F.leaky_relu((h @ self.target)[:, :, None] + (h @ self.source)[:, None, :], 0.2)
        weights = torch.where(self.mask, scores, -1e9).softmax(-1)
        return self.head(F.elu(weights @ h).mean(1))


class EdgeMessages(nn.Module):
    """A message for each edge of a constant list, by `index_select` and `index_add` (Gilmer et al.,
    2017)."""

    sources: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sources", torch.tensor(EDGES[0]))
        self.register_buffer("targets", torch.tensor(EDGES[1]))
        self.message, self.update = nn.Linear(2 * INPUTS, WIDTH), nn.Linear(INPUTS + WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        ends = [x.index_select(1, self.sources), x.index_select(1, self.targets)]
        messages = torch.tanh(self.message(torch.cat(ends, -1)))
        total = x.new_zeros(len(x), NODES, WIDTH).index_add(1, self.targets, messages)
        return self.update(torch.cat([x, total], -1)).mean(1)


class ScatterMessages(nn.Module):
    """The same by `gather` and `scatter_add`, twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        source, target = (
            torch.tensor(ends, device=x.device)[None, :, None].expand(len(x), -1, WIDTH) for ends in EDGES
        )
        for _ in range(2):
            messages = torch.gather(self.message(h), 1, source)
            h = torch.tanh(h + torch.zeros_like(h).scatter_add(1, target, messages))
        return self.head(h.sum(1))


class DeepSets(nn.Module):
    """A network of each element, a sum, a network of the sum (Zaheer et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ELU(), nn.Linear(WIDTH, WIDTH))
        self.all = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ELU(), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).sum(dim=1))


class PointNet(nn.Module):
    """A network of each point, the maximum over points (Qi et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Conv1d(INPUTS, WIDTH, 1), nn.GELU(), nn.Conv1d(WIDTH, WIDTH, 1))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(x.transpose(1, 2)).max(2)[0])


class AttentionPool(nn.Module):
    """A set pooled by a learned query (Lee et al., "Set Transformer", 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.randn(WIDTH))
        self.key, self.value = nn.Linear(INPUTS, WIDTH), nn.Linear(INPUTS, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.key(x) @ self.seed / WIDTH**0.5, dim=1)
        return self.head(torch.einsum("ns,nsh->nh", weights, self.value(x)))


class LargestTwo(nn.Module):
    """The two largest values of each feature over the set (Kalchbrenner et al., 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(INPUTS, WIDTH), nn.Linear(2 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.each(x).topk(2, dim=1).values).flatten(1))


class SortedPool(nn.Module):
    """Every feature sorted over the set, then weighted by rank (Zhang et al., "FSPool", 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 2)
        self.ranks = nn.Parameter(torch.randn(NODES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        ordered, _ = torch.sort(self.each(x), dim=1, descending=True)
        return self.head(F.elu((ordered * self.ranks).sum(1)))


class Relations(nn.Module):
    """A network of every pair of elements, the pairs by constant indices (Santoro et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(2 * INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        i, j = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
        return self.head(self.pair(torch.cat([x[:, i], x[:, j]], -1)).mean(1))


_SET = (NODES, INPUTS)

CASES = (
    small("gcn", ConstantGcn, _SET, loss="ce", kinks=True),
    small("gcn_own_graph", OwnGcn, _SET, more_inputs=((NODES, NODES),), kinks=True),
    small("gat", Gat, _SET, kinks=True),
    small("edge_messages", EdgeMessages, _SET),
    small("scatter_messages", ScatterMessages, _SET),
    small("deep_sets", DeepSets, _SET, kinks=True),
    small("point_net", PointNet, _SET, loss="ce", kinks=True),
    small("attention_pool", AttentionPool, _SET),
    small("largest_two", LargestTwo, _SET, kinks=True),
    small("sorted_pool", SortedPool, _SET, kinks=True),
    small("relations", Relations, _SET),
)
