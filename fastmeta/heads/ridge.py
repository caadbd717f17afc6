"""R2-D2: ridge regression in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmeta.heads.checks import (
    check_classes,
    check_factor,
    check_features,
    check_finite,
    check_like,
    check_logits,
    check_weights,
    tasks_where,
)
from fastmeta.models.check import finite_number, positive_number
from fastmeta.ops.options import argument


def ridge(
    support_features: Tensor,
    support_y: Tensor,
    query_features: Tensor,
    *,
    penalty: float | Tensor = 1.0,
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    ways: int | None = None,
    support_weights: Tensor | None = None,
) -> Tensor:
    """Ridge regression of the targets on the features, for all tasks at once.

    For each task W = argmin sum_n w_n ||x_n W - y_n||^2 + penalty ||W||^2, and the output is
    scale * query W + shift. The system that is solved has min(N, D) unknowns. W has no bias: append
    a feature of ones to have one.

    Args:
        support_features: [T, N, D], float32 or float64.
        support_y: classes [T, N], int64, which stand for one-hot rows; or targets [T, N, O] of the
            features' dtype.
        query_features: [T, M, D].
        penalty: lambda > 0; a number, () or [T].
        scale, shift: alpha and beta, which turn a regression on 0 and 1 into logits; numbers, () or
            [T].
        ways: C; None: the largest class plus one. For classes only.
        support_weights: [T, N], not negative; 0 leaves an example out.

    Returns:
        Logits, [T, M, C], or predictions, [T, M, O].

    Derivatives: any order, in everything that is float.

    Raises:
        TypeError, ValueError: bad input.
        RuntimeError: the system of a task is singular in the features' dtype, or the output
            overflows; names the tasks.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form
    solvers" (2019), section 3.2.
    """
    who = "ridge"
    check_features(who, support_features, query_features)
    targets = _check_targets(who, support_y, support_features, ways)
    weights = check_weights(who, support_weights, support_features)
    penalty = check_factor(who, "penalty", penalty, support_features, above_zero=True)
    scale = check_factor(who, "scale", scale, support_features)
    shift = check_factor(who, "shift", shift, support_features)
    with torch.autocast(support_features.device.type, enabled=False):
        solution = _solve(who, support_features, targets, weights, penalty)
        return check_logits(who, scale * (query_features @ solution) + shift)


class Ridge(nn.Module):
    """`ridge` with learned penalty, scale and shift: parameters `log_penalty`, `scale`, `shift`.

    Args:
        penalty, scale, shift: where they start.

    Shapes: as `ridge`.

    Raises:
        TypeError, ValueError: one of them is no finite number, or the penalty is not positive.

    Source: as `ridge`.
    """

    def __init__(self, *, penalty: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.log_penalty = nn.Parameter(torch.tensor(math.log(positive_number("Ridge", "penalty", penalty))))
        self.scale = nn.Parameter(torch.tensor(finite_number("Ridge", "scale", scale)))
        self.shift = nn.Parameter(torch.tensor(finite_number("Ridge", "shift", shift)))

    def forward(
        self,
        support_features: Tensor,
        support_y: Tensor,
        query_features: Tensor,
        *,
        ways: int | None = None,
        support_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits, [T, M, C], or predictions, [T, M, O]."""
        return ridge(
            support_features,
            support_y,
            query_features,
            penalty=self.log_penalty.exp(),
            scale=self.scale,
            shift=self.shift,
            ways=ways,
            support_weights=support_weights,
        )


def _check_targets(who: str, support_y: Tensor, support_features: Tensor, ways: int | None) -> Tensor:
    """The targets, [T, N, O]."""
    if not isinstance(support_y, Tensor) or not support_y.is_floating_point():
        return check_classes(who, support_y, support_features, ways)
    what, lead = argument(who, "support_y"), tuple(support_features.shape[:2])
    if support_y.dim() != 3 or tuple(support_y.shape[:2]) != lead or support_y.shape[2] == 0:
        raise ValueError(f"{what} must be [T, N, O] with {lead} in front, got {tuple(support_y.shape)}")
    if ways is not None:
        raise ValueError(
            f"{argument(who, 'ways')} is for classes, but `support_y` holds {support_y.dtype} targets"
        )
    check_like(what, support_y, support_features, "the features")
    check_finite(what, support_y)
    return support_y


def _solve(
    who: str,
    features: Tensor,  # [T, N, D]
    targets: Tensor,  # [T, N, O]
    weights: Tensor,  # [T, N, 1]
    penalty: Tensor,  # [1 or T, 1, 1]
) -> Tensor:
    """W, [T, D, O]."""
    examples, width = features.shape[1:]
    diagonal = penalty * torch.eye(min(examples, width), dtype=features.dtype, device=features.device)
    if width <= examples:
        system = features.mT @ (weights * features) + diagonal  # [T, D, D]
        _check_regular(who, system.detach())
        return torch.linalg.solve(system, features.mT @ (weights * targets))
    gram = features @ features.mT  # [T, N, N]
    roots = weights.detach().sqrt()
    _check_regular(who, (roots * gram * roots.mT + diagonal).detach())
    # Not the symmetric system: the root has no derivative at a weight of zero.
    return features.mT @ torch.linalg.solve(weights * gram + diagonal, weights * targets)


def _check_regular(
    who: str,
    system: Tensor,  # [T, R, R], symmetric, positive definite but for rounding
) -> None:
    """Refuse a system with a pivot no larger than the rounding errors of its elimination."""
    factor, info = torch.linalg.cholesky_ex(system)
    pivots, diagonal = factor.diagonal(dim1=1, dim2=2).square(), system.diagonal(dim1=1, dim2=2)  # [T, R]
    noise = system.shape[1] * torch.finfo(system.dtype).eps * diagonal
    singular = tasks_where((info != 0) | ~(pivots > noise).all(1))
    if singular:
        raise RuntimeError(
            f"{who}: the systems of tasks {singular} are singular in {system.dtype}; raise `penalty`, or "
            "scale the features down"
        )
