"""PyTorch's element-wise losses, from operators that differentiate many times and under vmap.

Every function takes output and target of one shape, [N, *out], and returns the loss of each element
in that shape. The first and second derivatives that the kernels use are in docs/losses.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(output: Tensor, target: Tensor) -> Tensor:
    """The squared difference."""
    return (output - target).square()


def l1(output: Tensor, target: Tensor) -> Tensor:
    """The absolute difference; its derivative at zero is zero."""
    return (output - target).abs()


def huber(output: Tensor, target: Tensor, delta: float) -> Tensor:
    """Half the squared difference below `delta`, a line of slope `delta` from there on."""
    difference = output - target
    # As in PyTorch: the second derivative is 1 at zero (abs() would make it 0) and 0 at the joint.
    clipped = torch.where(difference.abs() < delta, difference, delta * difference.sign())
    return clipped * (difference - 0.5 * clipped)


def smooth_l1(output: Tensor, target: Tensor, beta: float) -> Tensor:
    """`huber` divided by its threshold: a line of slope 1 from `beta` > 0 on."""
    return huber(output, target, beta) / beta


def bce_with_logits(
    output: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """Binary cross-entropy of logits; `weight` and `pos_weight` broadcast to one output [*out]."""
    # logsigmoid is exact everywhere; softplus turns into a line at 20
    log_sigmoid = F.logsigmoid(output)
    if pos_weight is not None:
        log_sigmoid = (1 + (pos_weight - 1) * target) * log_sigmoid
    values = (1 - target) * output - log_sigmoid
    return values if weight is None else weight * values
