"""Tasks that diverged are counted and named."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_diverged(who: str, what: str, values: Iterable[Tensor]) -> None:
    """Refuse tasks whose values are not finite; reads them.

    Args:
        who: the algorithm, for messages.
        what: the values, for messages.
        values: tensors [T, ...].

    Raises:
        FloatingPointError: counts and names the tasks.
    """
    finite = torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in values]).all(0)  # [T]
    if not finite.all():
        tasks = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{who}: {len(tasks)} of {len(finite)} tasks diverged, their {what} not finite: {named(tasks)}"
        )


def named(tasks: list[int]) -> str:
    """Tasks by their numbers, those beyond sixteen as their count."""
    rest = f" and {len(tasks) - 16} more" if len(tasks) > 16 else ""
    return f"task{'s' * (len(tasks) > 1)} {', '.join(map(str, tasks[:16]))}{rest}"
