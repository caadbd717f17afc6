"""What backends with kernels have to know of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.losses import Loss
from fastmeta.problem import Problem


def reads_channels(problem: Problem) -> bool:
    """Whether a loss of the problem's is over the channels of an output [C, d...]: one row of C for
    each position."""
    if problem.program is None or len(problem.program.output_shape) < 2:
        return False
    return any(
        loss is not None and loss.kind == "cross_entropy" for loss in (problem.loss, problem.query_loss)
    )


def refuses_loss(loss: Loss) -> str:
    """Why `csrc/shared/loss_example.inl` has no such loss, "" if it has."""
    if loss.kind == "custom":
        return f"the loss {loss.function!r} is a function of its own"
    if loss.kind == "bce_with_logits":
        if loss.weight is not None:
            return "bce_with_logits with `weight`"
        if loss.pos_weight is not None and any(size != 1 for size in loss.pos_weight.shape[:-1]):
            return "bce_with_logits with a `pos_weight` that differs along more than the last dimension"
    return ""


def class_weights(
    loss: Loss, out: tuple[int, ...], channels: bool, dtype: torch.dtype, device: torch.device | str
) -> Tensor | None:
    """Class weights [C], or pos_weight spread over the last dimension of an output [N, *out], over
    all positions of one that is read by channels; often a copy, which the caller has to hold."""
    if loss.kind == "bce_with_logits" and loss.pos_weight is not None:
        along = loss.pos_weight.to(device, dtype).reshape(-1)
        return along.expand(out[1:]).reshape(-1) if channels else along.expand(out[-1] if out else 1)
    return None if loss.weight is None else loss.weight.to(device, dtype)
