"""`prototypes` against class means and distances of one task at a time."""

from __future__ import annotations

import pytest
import torch
from plain_autograd import error
from torch import Tensor
from torch.nn import functional as F

from fastmeta.heads import Prototypes, prototypes

T, N, M, D, C = 3, 7, 5, 13, 3
TOLERANCE = 1e-9
METRICS = pytest.mark.parametrize("metric", ["squared_euclidean", "cosine"])


def _features(
    tasks: int = T, support: int = N, query: int = M, width: int = D
) -> tuple[Tensor, Tensor, Tensor]:
    """support_features, support_y with every class below min(C, N), query_features."""
    random = torch.Generator().manual_seed(0)
    x, q = (torch.randn(tasks, n, width, generator=random, dtype=torch.float64) for n in (support, query))
    y = torch.stack([torch.randperm(support, generator=random) for _ in range(tasks)]) % C
    return x, y, q


def _plain(x: Tensor, y: Tensor, q: Tensor, w: Tensor, scale: Tensor, metric: str) -> Tensor:
    rows = []
    for task in range(len(x)):
        means = []
        for label in range(int(y.max()) + 1):
            chosen = y[task] == label
            means.append((w[task, chosen, None] * x[task, chosen]).sum(0) / w[task, chosen].sum())
        pairs = (q[task][:, None], torch.stack(means)[None])
        similarity = (
            F.cosine_similarity(*pairs, dim=2) if metric == "cosine" else -(pairs[0] - pairs[1]).pow(2).sum(2)
        )
        rows.append(scale * similarity)
    return torch.stack(rows)


@METRICS
@pytest.mark.parametrize(("tasks", "support", "query", "width"), [(T, N, M, D), (1, 1, 1, 1), (2, 3, 1, 2)])
def test_prototypes_match_reference(metric: str, tasks: int, support: int, query: int, width: int) -> None:
    x, y, q = _features(tasks, support, query, width)
    w = torch.rand(tasks, support, dtype=torch.float64) + 0.1
    scale = torch.tensor(0.7, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (x, q, w, scale)]
    got = prototypes(x, y, q, metric=metric, scale=scale, support_weights=w)
    want = _plain(x, y, q, w, scale, metric)
    assert got.shape == (tasks, query, int(y.max()) + 1)
    assert error(got.detach(), want.detach()) < TOLERANCE
    along = torch.randn_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, along) for out in (got, want)), strict=True):
        assert float((ours - theirs).norm()) < TOLERANCE * max(1.0, float(theirs.norm()))


@METRICS
def test_derivatives_match_finite_differences(metric: str) -> None:
    x, y, q = _features(2, 4, 2, 3)
    w, scale = torch.rand(2, 4, dtype=torch.float64) + 0.1, torch.tensor([0.7, 1.3], dtype=torch.float64)
    inputs = tuple(value.requires_grad_() for value in (x, q, w, scale))

    def head(x: Tensor, q: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return prototypes(x, y, q, metric=metric, scale=scale, support_weights=w)

    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradgradcheck(head, inputs)


@METRICS
def test_a_weight_of_zero_leaves_the_example_out(metric: str) -> None:
    x, y, q = _features()
    y[:, :C] = torch.arange(C)  # the first examples have every class
    w = torch.ones(T, N, dtype=torch.float64)
    w[0, 4:] = 0
    got = prototypes(x, y, q, metric=metric, support_weights=w)
    assert error(got[:1], prototypes(x[:1, :4], y[:1, :4], q[:1], metric=metric)) < TOLERANCE
    assert error(got[1:], prototypes(x[1:], y[1:], q[1:], metric=metric)) < TOLERANCE


def test_features_far_from_the_origin_keep_their_distances() -> None:
    x, y, q = _features()
    x, q = x.float() + 1000, q.float() + 1000
    want = prototypes(x.double(), y, q.double())
    plain = _plain(x, y, q, torch.ones(T, N), torch.tensor(1.0), "squared_euclidean")
    assert error(prototypes(x, y, q), want) < 2 * error(plain, want) + 1e-6


def test_module_learns_its_scale() -> None:
    x, y, q = _features()
    head = Prototypes(metric="cosine", scale=10.0).double()
    got = head(x, y, q)
    assert torch.equal(got, prototypes(x, y, q, metric="cosine", scale=10.0))
    got.sum().backward()
    assert head.scale.grad is not None
    assert torch.isfinite(head.scale.grad)


def test_rejects_a_class_without_an_example() -> None:
    x, y, q = _features()
    with pytest.raises(ValueError, match=r"prototypes: every class must have .* task 0 has none of class 3"):
        prototypes(x, y, q, ways=4)
    w = torch.ones(T, N, dtype=torch.float64)
    w[2] = (y[2] != 1).double()
    with pytest.raises(ValueError, match="task 2 has none of class 1"):
        prototypes(x, y, q, support_weights=w)


def test_rejects_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match="`metric` must be one of 'squared_euclidean', 'cosine', got 'l1'"):
        prototypes(*_features(), metric="l1")
    with pytest.raises(ValueError, match="`metric`"):
        Prototypes(metric="l1")
    for scale, problem in (("a", "a number, got 'a'"), (float("inf"), "finite, got inf")):
        with pytest.raises((TypeError, ValueError), match=f"Prototypes: `scale` must be {problem}"):
            Prototypes(scale=scale)
