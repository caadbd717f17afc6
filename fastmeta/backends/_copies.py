"""Copies of many tensors in few launches."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_together(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target; all that need no conversion in a few launches."""
    to, given = [], []
    for target, source in zip(targets, sources, strict=True):
        source = source.detach()
        alike = (target.dtype, target.device, target.shape) == (source.dtype, source.device, source.shape)
        if alike and target.is_contiguous() and source.is_contiguous() and not source.is_neg():
            to.append(target)
            given.append(source)
        else:
            target.copy_(source)
    if to:
        torch._foreach_copy_(to, given)
