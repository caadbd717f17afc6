"""What kernels are told about a parameter's learning rates."""

from __future__ import annotations

from typing import NamedTuple

from fastmeta.problem import Problem


class RateForm(NamedTuple):
    """Along what the rates of an adapted parameter differ."""

    element: bool
    per_task: bool
    per_step: bool


def rate_form(problem: Problem, name: str, shape: tuple[int, ...]) -> RateForm | None:
    """How the rates of a parameter are laid out; None where it is not adapted.

    A kernel reads, and for the gradient writes, as many numbers as this says: a shape in between is
    never let through.

    Args:
        problem: holds the rates.
        name: the parameter.
        shape: S, its shape in one task.

    Raises:
        ValueError: the rates are none of [K or 1, T or 1, *1s] and [K or 1, T or 1, *S].
    """
    rate = problem.rates.get(name)
    if rate is None:
        return None
    ones = (1,) * len(shape)
    steps, tasks, *rest = rate.shape if rate.dim() > 1 else (0, 0)
    fits = steps in (1, max(problem.steps, 1)) and tasks in (1, problem.tasks)
    if not fits or tuple(rest) not in (ones, shape):
        raise ValueError(
            f"the rates of {name!r} must be [K or 1, T or 1, *S] or [K or 1, T or 1, *1s] with K, T, *S = "
            f"{(problem.steps, problem.tasks, *shape)}, got {tuple(rate.shape)}"
        )
    return RateForm(tuple(rest) != ones, tasks > 1, steps > 1)
