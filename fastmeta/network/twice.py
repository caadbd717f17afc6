"""Functions of PyTorch whose second derivative is missing, or fails on some inputs, and what is
called in their place.

Values and first derivatives are PyTorch's own; these stand wherever fastmeta calls a module, under
vmap and outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.network import elementary


def embedding_bag(
    input: Tensor,  # [B, N] or [n], int
    weight: Tensor,  # [E, D]
    offsets: Tensor | None = None,  # [B], or [B + 1] with include_last_offset: where each bag of [n] begins
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,  # as input
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima over bags of rows, [B, D]; an empty bag gives zeros."""
    if weight.dim() != 2 and input.dim() == 2:  # the arguments in the order of old
        input, weight = weight, input
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"embedding_bag: `mode` must be 'sum', 'mean' or 'max', got {mode!r}")
    if per_sample_weights is not None and mode != "sum":
        raise NotImplementedError(f"embedding_bag: `per_sample_weights` needs mode='sum', got {mode!r}")
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ValueError(
            f"embedding_bag: `per_sample_weights` must be {tuple(input.shape)}, got "
            f"{tuple(per_sample_weights.shape)}"
        )
    rows = elementary.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    used = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        used = input != padding_idx % weight.shape[0]
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("embedding_bag: `offsets` are for an input of one dimension, got one of two")
        member = None
    else:
        if offsets is None:
            raise ValueError("embedding_bag: an input of one dimension needs `offsets`")
        starts = offsets[:-1] if include_last_offset else offsets
        place = torch.arange(input.shape[0], device=input.device)
        bag = (place.unsqueeze(1) >= starts).sum(1) - 1  # [n]
        member = bag == torch.arange(starts.shape[0], device=input.device).unsqueeze(1)  # [B, n]
        rows = rows.unsqueeze(0)  # [1, n, D]
        used = member & used
    if mode == "max":
        return _maxima(rows, used)
    shares = used.to(rows.dtype) if per_sample_weights is None else used * per_sample_weights
    sums = (shares.unsqueeze(-1) * rows).sum(1)
    return sums if mode == "sum" else sums / used.sum(1, keepdim=True).clamp_min(1)


def _maxima(rows: Tensor, used: Tensor) -> Tensor:
    """The largest of the rows that are used; [B, D]."""
    hidden = ~used.unsqueeze(-1)
    largest = rows.masked_fill(hidden, -math.inf).max(1).values
    return largest.masked_fill(~used.any(1, keepdim=True), 0.0)


def cdist(
    x1: Tensor,  # [..., P, D]
    x2: Tensor,  # [..., R, D]
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """Distances between all pairs of rows, [..., P, R]; where one is zero so is its gradient, as in
    PyTorch."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 0:
        return torch.cdist(x1, x2, p)
    if p == math.inf:
        return difference.abs().amax(-1)
    if p == 1:
        return difference.abs().sum(-1)
    # a power of zero has no derivative: it is kept out of what is differentiated
    size = difference.abs()
    apart = size > 0
    powers = torch.where(apart, torch.where(apart, size, 1.0) ** p, 0.0).sum(-1)
    some = powers > 0
    return torch.where(some, torch.where(some, powers, 1.0) ** (1 / p), 0.0)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`; its weight lies as it was made: the gradient of one that is strided otherwise may
    be refused."""

    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return function(input, weight.contiguous(), bias, *args, **kwargs)

    return convolution


REPLACED: dict[Any, Callable[..., Any]] = {
    # dense gradients, and nothing is renormalised in place
    F.embedding: partial(elementary.embedding, fused=True),
    F.embedding_bag: embedding_bag,
    torch.cdist: cdist,
    # nn.TransformerEncoder asks whether it may pack its input, for a path without derivatives
    torch._nested_tensor_from_mask_left_aligned: lambda *_: False,
} | {
    function: _convolution(function)
    for function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
}
