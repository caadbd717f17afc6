"""What the kernels of losses share: how terms are weighted and summed, and what is written."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reduction(NamedTuple):
    """From the terms of examples to a value and its gradients, as one argument that is known when a
    kernel is compiled. Formulas: docs/losses.md."""

    sum: bool  # else a mean
    by_weights: bool  # the mean's denominator counts examples by their weights
    step: float  # what the value counts for
    scale: float  # what the gradients count for, beside the task's weight
    add_value: bool  # the value is added to what is there
    add: bool  # so are dy and dweights
    tiny: float  # weights below count as zero


class Results(NamedTuple):
    """What is written, as one argument; None where nobody wants it."""

    value: Tensor | None  # [T]
    dz: Tensor | None  # as the output, or with rz the tangent of its gradient
    dy: Tensor | None  # as the target
    dweights: Tensor | None  # [T, N]
