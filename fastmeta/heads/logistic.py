"""LR-D2: multinomial logistic regression by Newton's method, differentiated at its solution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.heads.checks import (
    check_classes,
    check_factor,
    check_features,
    check_logits,
    check_weights,
    tasks_where,
)
from fastmeta.models.check import positive, positive_number


def logistic(
    support_features: Tensor,
    support_y: Tensor,
    query_features: Tensor,
    *,
    penalty: float | Tensor = 1.0,
    ways: int | None = None,
    support_weights: Tensor | None = None,
    max_iterations: int = 50,
    tolerance: float | None = None,
) -> Tensor:
    """Multinomial logistic regression of the classes on the features, for all tasks at once.

    For each task W = argmin sum_n w_n cross_entropy(x_n W, y_n) + penalty / 2 ||W||^2, and the
    logits are query W. It is solved by Newton's method with damped steps, for C min(N, D) unknowns.
    W has no bias: append a feature of ones to have one.

    Args:
        support_features: [T, N, D], float32 or float64.
        support_y: [T, N], int64: classes in [0, C).
        query_features: [T, M, D].
        penalty: lambda > 0; a number, () or [T].
        ways: C; None: the largest class plus one.
        support_weights: [T, N], not negative; 0 leaves an example out.
        max_iterations: of Newton's method, for the slowest task.
        tolerance: a task has converged when Newton's step changes its support logits by no more
            than this, relative to the largest one if that is above 1; None: the square root of the
            dtype's epsilon. That step and two more are still taken, so the solution is better.

    Returns:
        Logits, [T, M, C].

    Derivatives: first and second, in everything that is float, by the implicit function theorem at
    the solution; they do not depend on the iterations. Third derivatives are wrong.

    Raises:
        TypeError, ValueError: bad input.
        RuntimeError: tasks that have not converged are named; the logits overflow.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form
    solvers" (2019), section 3.3 (there two classes, and unrolled). Damping and derivatives:
    docs/heads.md.
    """
    who = "logistic"
    check_features(who, support_features, query_features)
    targets = check_classes(who, support_y, support_features, ways)
    weights = check_weights(who, support_weights, support_features)
    penalty = check_factor(who, "penalty", penalty, support_features, above_zero=True)
    _check_newton(who, max_iterations, tolerance)
    tolerance = torch.finfo(support_features.dtype).eps ** 0.5 if tolerance is None else tolerance
    examples, width = support_features.shape[1:]
    with torch.autocast(support_features.device.type, enabled=False):
        if width <= examples:
            equation = _Equation(support_features, support_features, targets, weights, penalty)
            return check_logits(who, query_features @ _solve(who, equation, max_iterations, tolerance))
        # W = X^T V: as many unknowns as examples
        identity = torch.eye(examples, dtype=targets.dtype, device=targets.device).expand(
            len(targets), -1, -1
        )
        equation = _Equation(support_features @ support_features.mT, identity, targets, weights, penalty)
        solution = support_features.mT @ _solve(who, equation, max_iterations, tolerance)
        return check_logits(who, query_features @ solution)


class Logistic(nn.Module):
    """`logistic` with a learned penalty: parameter `log_penalty`.

    Args:
        penalty: where it starts.
        max_iterations, tolerance: as in `logistic`.

    Shapes: as `logistic`.

    Raises:
        TypeError, ValueError: one of them is no finite, positive number.

    Source: as `logistic`.
    """

    def __init__(
        self, *, penalty: float = 1.0, max_iterations: int = 50, tolerance: float | None = None
    ) -> None:
        super().__init__()
        _check_newton("Logistic", max_iterations, tolerance)
        self.log_penalty = nn.Parameter(
            torch.tensor(math.log(positive_number("Logistic", "penalty", penalty)))
        )
        self.max_iterations = max_iterations
        self.tolerance = tolerance

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
        return logistic(
            support_features,
            support_y,
            query_features,
            penalty=self.log_penalty.exp(),
            ways=ways,
            support_weights=support_weights,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )


def _check_newton(who: str, max_iterations: int, tolerance: float | None) -> None:
    """Check the options of Newton's method.

    Raises:
        TypeError, ValueError: names the option.
    """
    positive(who, "max_iterations", max_iterations)
    if tolerance is not None:
        positive_number(who, "tolerance", tolerance)


class _Equation(NamedTuple):
    """penalty V = basis^T (weights (targets - softmax(design V))), solved by V [T, R, C].

    Logits are design V. For W = V, design = basis = X; for W = X^T V, design = X X^T and basis = 1.
    """

    design: Tensor  # [T, N, R]
    basis: Tensor  # [T, N, R]
    targets: Tensor  # [T, N, C]
    weights: Tensor  # [T, N, 1]
    penalty: Tensor  # [1 or T, 1, 1]

    def residual(self, solution: Tensor) -> Tensor:
        """Left side minus right side, [T, R, C]."""
        others = (self.design @ solution).softmax(2) * (1 - self.targets)
        # targets - softmax, without the cancellation in 1 - p of an example that is fitted well
        errors = self.targets * others.sum(2, keepdim=True) - others
        return self.penalty * solution - self.basis.mT @ (self.weights * errors)

    def factors(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """LU factors of the residual's Jacobian, [T, R C, R C]."""
        p = (self.design @ solution).softmax(2)
        pairs = p[..., None] * p[..., None, :] * (1 - torch.eye(p.shape[2], dtype=p.dtype, device=p.device))
        curvature = pairs.sum(3).diag_embed() - pairs  # diag(p) - p p^T, [T, N, C, C]
        jacobian = torch.einsum("tnr,tncd,tnq->trcqd", self.weights * self.basis, curvature, self.design)
        jacobian = jacobian.flatten(3, 4).flatten(1, 2)
        jacobian.diagonal(dim1=1, dim2=2).add_(self.penalty[..., 0])
        factors, pivots, _ = torch.linalg.lu_factor_ex(jacobian)
        return factors, pivots


def _solve(who: str, equation: _Equation, max_iterations: int, tolerance: float) -> Tensor:
    """V, [T, R, C], with its first and second derivatives."""
    with torch.no_grad():
        solution = _newton(who, equation, max_iterations, tolerance)
        factors = equation.factors(solution)
    # Each step with the constant Jacobian makes one more order of derivatives right: docs/heads.md.
    for _ in range(2):
        solution = solution - _step(factors, equation.residual(solution))
    return solution


def _newton(who: str, equation: _Equation, max_iterations: int, tolerance: float) -> Tensor:
    """V, [T, R, C], within the tolerance.

    Raises:
        RuntimeError: names the tasks that are not.
    """
    solution = torch.zeros_like(equation.basis.mT @ equation.targets)
    residual = equation.residual(solution)
    length = solution.new_ones(len(solution), 1, 1)
    for _ in range(max_iterations):
        factors = equation.factors(solution)
        step = _step(factors, residual)
        # The step, not the residual: in an ill-conditioned task the residual is small long before
        # the error is.
        change = _largest(equation.design @ step)
        relative = change / _largest(equation.design @ solution).clamp(min=1)
        done = relative <= tolerance
        if done.all():
            return solution - step
        candidate = solution - length * step
        candidate_residual = equation.residual(candidate)
        # The step must shrink, judged with the same Jacobian. Converged tasks stay.
        better = (_largest(equation.design @ _step(factors, candidate_residual)) < change) & ~done
        solution = torch.where(better, candidate, solution)
        residual = torch.where(better, candidate_residual, residual)
        length = torch.where(better, (2 * length).clamp(max=1), length / 2)
    missed = tasks_where(~done.flatten())
    raise RuntimeError(
        f"{who}: tasks {missed} have not converged in {max_iterations} iterations: their logits still change "
        f"by {', '.join(f'{relative[task].item():.1e}' for task in missed)}, `tolerance` is {tolerance:.1e}; "
        "raise `penalty`, `max_iterations` or `tolerance`, or scale the features down"
    )


def _step(factors: tuple[Tensor, Tensor], residual: Tensor) -> Tensor:
    """Newton's step to subtract, [T, R, C]."""
    return torch.linalg.lu_solve(*factors, residual.flatten(1)[..., None]).reshape(residual.shape)


def _largest(logits: Tensor) -> Tensor:
    """The largest absolute value of each task, [T, 1, 1]."""
    return logits.abs().amax((1, 2), keepdim=True)
