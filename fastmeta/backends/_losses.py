"""What the two backends that compile csrc/engine/loss_example.inl have to know of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.losses import Loss


def refuses_loss(loss: Loss, out: tuple[int, ...]) -> str:
    """Why `csrc/engine/loss_example.inl` has no such loss of an output [N, *out], "" if it has."""
    if loss.kind == "custom":
        return f"the loss {loss.function!r} is a function of its own"
    if loss.kind == "cross_entropy" and len(out) != 1:
        return f"cross_entropy needs an output [N, C] here, got [N, {', '.join(map(str, out))}]"
    if loss.kind == "bce_with_logits":
        if loss.weight is not None:
            return "bce_with_logits with `weight`"
        if loss.pos_weight is not None and any(size != 1 for size in loss.pos_weight.shape[:-1]):
            return "bce_with_logits with a `pos_weight` that differs along more than the last dimension"
    return ""


def class_weights(loss: Loss, out: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
    """Class weights [C], or pos_weight spread over the last dimension of an output [N, *out]; often a copy, which the
    caller has to hold."""
    if loss.kind == "bce_with_logits" and loss.pos_weight is not None:
        return loss.pos_weight.to(device, dtype).reshape(-1).expand(out[-1] if out else 1)
    return None if loss.weight is None else loss.weight.to(device, dtype)
