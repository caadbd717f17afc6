"""The method of conjugate gradients on one linear system for each task, all tasks side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Solve A_t x_t = b_t for every task t, from x = 0.

    A task that has converged, or whose search direction p has <p, A p> <= 0, which a positive
    definite A_t excludes, stays where it is while the others go on.

    Args:
        product: [T, P] -> [T, P], A_t times the vector of task t; A_t symmetric.
        b: [T, P].
        steps: products at most.
        tolerance: of ||b - A x|| / ||b||, by the recursion's residual, which rounding parts from
            the true one.

    Returns:
        (x [T, P], which tasks met a direction of no or negative curvature [T]).

    Source: Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952),
    section 3.
    """
    x, r, p = torch.zeros_like(b), b, b
    square = (r * r).sum(1)  # [T]
    goal = tolerance**2 * square
    indefinite = torch.zeros_like(square, dtype=torch.bool)
    for _ in range(steps):
        active = (square > goal) & ~indefinite
        if not active.any():
            break
        ap = product(p)
        curvature = (p * ap).sum(1)
        indefinite |= active & (curvature <= 0)
        active &= ~indefinite
        # a task that rests gets a step of exactly zero, whatever became of its curvature
        step = torch.where(active, square / curvature, 0)[:, None]
        x, r = x + step * p, r - step * ap
        before, square = square, (r * r).sum(1)
        p = torch.where(active[:, None], r + (square / before)[:, None] * p, p)
    return x, indefinite
