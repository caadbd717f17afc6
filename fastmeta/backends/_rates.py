"""How the learning rates of a parameter are laid out in a `Problem`: what operators make, and what
kernels are told."""

from __future__ import annotations

from typing import NamedTuple

from fastmeta.problem import Problem


class RateForm(NamedTuple):
    """Along what the rates of an adapted parameter differ."""

    element: bool
    per_task: bool
    per_step: bool

    def shape(self, steps: int, tasks: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[K or 1, T or 1, *S or *1s], K counted at least 1.

        Args:
            steps, tasks: K and T.
            shape: S, that of the parameter in one task.
        """
        rows, columns = max(steps, 1) if self.per_step else 1, tasks if self.per_task else 1
        return (rows, columns, *(shape if self.element else (1,) * len(shape)))


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
    given = tuple(rate.shape)
    form = form_of(given)
    if given != form.shape(problem.steps, problem.tasks, shape):
        raise ValueError(
            f"the rates of {name!r} must be [K or 1, T or 1, *S] or [K or 1, T or 1, *1s] with K, T, *S = "
            f"{(problem.steps, problem.tasks, *shape)}, got {given}"
        )
    return form


def form_of(rate: tuple[int, ...]) -> RateForm:
    """The form that rates of this shape have, if they have one."""
    steps, tasks, *rest = rate if len(rate) > 1 else (1, 1)
    return RateForm(any(size != 1 for size in rest), tasks > 1, steps > 1)
