"""PyTorch operators in pieces that it runs on one thread: awake, its threads fight with the
engine's for the cores."""

from __future__ import annotations

import torch
from torch import Tensor

#: PyTorch runs an operator of fewer elements on one thread.
_PIECE = 1 << 14


def zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    for piece in tensor.view(-1).split(_PIECE):
        piece.zero_()
    return tensor


def add(to: Tensor, what: Tensor) -> Tensor:
    """to += what."""
    if to.device.type != "cpu" or to.numel() < _PIECE:
        return to.add_(what)
    for piece, more in zip(to.view(-1).split(_PIECE), what.reshape(-1).split(_PIECE), strict=True):
        piece.add_(more)
    return to
