"""Embeddings, in all of their options, match products with one-hot vectors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from odd_networks import check, ours, plain, tensors
from torch import nn
from torch.nn import functional as F

BACKENDS = ("torch", "reference")


class _Looked(nn.Module):
    def __init__(self, table, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.options = table(5, 3, **options).double(), options
        self.linear = nn.Linear(3, 1).double()

    def forward(self, x):
        return self.linear(self.table(x).reshape(len(x), -1, 3).mean(1)).tanh()


def _indices():
    x = torch.randint(0, 5, (2, 2, 4, 3), generator=torch.Generator().manual_seed(0))
    y = tensors(2, 2, 4, 1)
    return x[0], y[0], x[1], y[1]


def _one_hot_swap(net, theta, x):
    """The network by products with one-hot matrices, without any embedding."""
    (x,) = x
    weight, options = theta["table.weight"], net.options
    one_hot = F.one_hot(x, 5).double()
    if "max_norm" in options:
        sizes = weight.detach().norm(2, 1, keepdim=True)
        scale = torch.where(sizes > options["max_norm"], options["max_norm"] / (sizes + 1e-7), 1.0)
        weight = weight + (weight * scale - weight).detach()
    if options.get("scale_grad_by_freq"):
        share = weight / one_hot.sum((0, 1)).clamp_min(1).unsqueeze(1)
        weight = share + (weight - share).detach()
    if isinstance(net.table, nn.Embedding):
        if options.get("padding_idx") is not None:
            keep = torch.arange(5).ne(options["padding_idx"]).unsqueeze(1)
            weight = torch.where(keep, weight, weight.detach())
        rows = (one_hot @ weight).mean(1)
    else:
        used = x.ne(options.get("padding_idx", -1)).double()
        rows = one_hot @ weight
        if options["mode"] == "max":
            rows = rows.masked_fill(used.unsqueeze(-1) == 0, -math.inf).amax(1)
            rows = rows.masked_fill(used.sum(1, keepdim=True) == 0, 0.0)
        else:
            rows = (used.unsqueeze(-1) * rows).sum(1)
            rows = rows / used.sum(1, keepdim=True).clamp_min(1) if options["mode"] == "mean" else rows
    return torch.tanh(rows @ theta["linear.weight"].T + theta["linear.bias"])


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("table", "options"),
    [
        (nn.Embedding, {"sparse": True}),
        (nn.Embedding, {"scale_grad_by_freq": True}),
        (nn.Embedding, {"padding_idx": 1, "scale_grad_by_freq": True}),
        (nn.EmbeddingBag, {"mode": "sum"}),
        (nn.EmbeddingBag, {"mode": "mean", "padding_idx": 1}),
        (nn.EmbeddingBag, {"mode": "max", "padding_idx": 1}),
        (nn.EmbeddingBag, {"mode": "mean", "sparse": True}),
        (nn.EmbeddingBag, {"mode": "sum", "scale_grad_by_freq": True}),
    ],
    ids=str,
)
def test_embedding_matches_one_hot_products(table, options, backend, tasks):
    net, episode = _Looked(table, **options), [t[:tasks] for t in _indices()]
    wanted = plain(net, *episode, swap=_one_hot_swap)
    check(ours(net, episode, backend), wanted)
    assert not any(p.grad.is_sparse for p in net.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("table", "options"), [(nn.Embedding, {}), (nn.EmbeddingBag, {"mode": "sum"})], ids=str
)
def test_renormalised_embedding_that_is_not_adapted_matches_one_hot_products(table, options, backend):
    net, episode = _Looked(table, max_norm=0.5, **options), _indices()
    before = copy.deepcopy(net.state_dict())
    losses = []
    for sx, sy, qx, qy in zip(*episode, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(2):
            head = [theta["linear.weight"], theta["linear.bias"]]
            inner = F.mse_loss(_one_hot_swap(net, theta, (sx,)), sy)
            weight, bias = torch.autograd.grad(inner, head, create_graph=True)
            theta = {**theta, "linear.weight": head[0] - 0.1 * weight, "linear.bias": head[1] - 0.1 * bias}
        losses.append(F.mse_loss(_one_hot_swap(net, theta, (qx,)), qy))
    mean = torch.stack(losses).mean()
    wanted = [mean.detach(), *torch.autograd.grad(mean, list(net.parameters()))]
    check(ours(net, episode, backend, adapt="head"), wanted)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_rejects_adapting_a_renormalised_embedding(table, backend):
    net = _Looked(table, max_norm=0.5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"`adapt` has 'table\.weight', which \w+\(max_norm=0\.5\).*adapt the other"
    ):
        ours(net, _indices(), backend)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_offsets_match_torch(mode, last):
    from fastmeta.network.twice import embedding_bag

    weight, indices = tensors(5, 3).requires_grad_(), torch.tensor([0, 1, 1, 4, 2, 3, 1])
    offsets = torch.tensor([0, 2, 2, 5, *([7] if last else [])])
    options = {"mode": mode, "include_last_offset": last, "padding_idx": 1}
    if mode == "sum":
        options["per_sample_weights"] = tensors(7, seed=1).requires_grad_()
    leaves = [weight, *([options["per_sample_weights"]] if mode == "sum" else [])]
    answers = []
    for function in (embedding_bag, F.embedding_bag):
        output = function(indices, weight, offsets, **options)
        gradient = torch.autograd.grad(output.square().sum(), leaves)
        answers.append([output.detach(), *gradient])
    check(*answers)
