"""Prototypical networks: the class whose mean is nearest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.heads.checks import check_classes, check_factor, check_features, check_logits, check_weights
from fastmeta.models.check import finite_number

METRICS = ("squared_euclidean", "cosine")


def prototypes(
    support_features: Tensor,
    support_y: Tensor,
    query_features: Tensor,
    *,
    metric: str = "squared_euclidean",
    scale: float | Tensor = 1.0,
    ways: int | None = None,
    support_weights: Tensor | None = None,
) -> Tensor:
    """Classify by the distance to the mean of each class, for all tasks at once.

    Args:
        support_features: [T, N, D], float32 or float64.
        support_y: [T, N], int64: classes in [0, C).
        query_features: [T, M, D].
        metric: "squared_euclidean": logits are -scale * ||query - mean||^2; "cosine": scale *
            cos(query, mean).
        scale: the inverse temperature; a number, () or [T].
        ways: C; None: the largest class plus one.
        support_weights: [T, N], not negative: the means are weighted ones; 0 leaves an example out.

    Returns:
        Logits, [T, M, C].

    Derivatives: any order, in both features, `scale` and `support_weights`.

    Raises:
        TypeError, ValueError: bad input; a class without a support example, with task and class.
        RuntimeError: the logits overflow.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning" (2017), sections
        2.2 and 2.3; the scaled cosine: Gidaris, Komodakis, "Dynamic Few-Shot Visual Learning
        without Forgetting" (2018), section 3.2.
    """
    who = "prototypes"
    check_metric(metric)
    check_features(who, support_features, query_features)
    one_hot = check_classes(who, support_y, support_features, ways)
    weights = check_weights(who, support_weights, support_features) * one_hot  # [T, N, C]
    factor = check_factor(who, "scale", scale, support_features)
    totals = weights.sum(1)[..., None]  # [T, C, 1]
    empty = (totals[..., 0] <= 0).nonzero().tolist()
    if empty:
        task, label = empty[0]
        raise ValueError(
            f"{who}: every class must have a support example, task {task} has none of class {label}"
        )
    with torch.autocast(support_features.device.type, enabled=False):
        means = weights.mT @ support_features / totals  # [T, C, D]
        similarity = _cosine if metric == "cosine" else _minus_squared_distance
        return check_logits(who, factor * similarity(query_features, means))


class Prototypes(nn.Module):
    """`prototypes` with a learned scale, `scale`, the inverse temperature.

    Args:
        metric: as in `prototypes`.
        scale: where it starts.

    Shapes: as `prototypes`.

    Raises:
        TypeError, ValueError: an unknown metric, or a scale that is no finite number.
    """

    def __init__(self, *, metric: str = "squared_euclidean", scale: float = 1.0) -> None:
        super().__init__()
        check_metric(metric)
        self.metric = metric
        self.scale = nn.Parameter(torch.tensor(finite_number("Prototypes", "scale", scale)))

    def forward(
        self,
        support_features: Tensor,
        support_y: Tensor,
        query_features: Tensor,
        *,
        ways: int | None = None,
        support_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits, [T, M, C]."""
        return prototypes(
            support_features,
            support_y,
            query_features,
            metric=self.metric,
            scale=self.scale,
            ways=ways,
            support_weights=support_weights,
        )


def check_metric(metric: str) -> None:
    """Check the name of a metric.

    Raises:
        ValueError: there is none of that name.
    """
    if metric not in METRICS:
        raise ValueError(
            f"prototypes: `metric` must be one of {', '.join(map(repr, METRICS))}, got {metric!r}"
        )


def _minus_squared_distance(
    query: Tensor,  # [T, M, D]
    means: Tensor,  # [T, C, D]
) -> Tensor:
    # |q|^2 - 2 qm + |m|^2 cancels least if the origin is among the means. Distances do not depend
    # on the origin, so it needs no gradient.
    origin = means.detach().mean(1, keepdim=True)
    query, means = query - origin, means - origin
    return 2 * query @ means.mT - query.square().sum(2)[..., None] - means.square().sum(2)[:, None]


def _cosine(
    query: Tensor,  # [T, M, D]
    means: Tensor,  # [T, C, D]
) -> Tensor:
    return F.normalize(query, dim=2) @ F.normalize(means, dim=2).mT
