"""Norms, attention and embeddings out of elementary operators, where vmap and double backward are
right together.

Signatures are those of `torch.nn.functional`; variances are biased and two-pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _standardise(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def _scale_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias with one weight and bias per channel of x [N, C, ...]."""
    along_channels = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        x = x * weight.reshape(along_channels)
    return x if bias is None else x + bias.reshape(along_channels)


def _normalise(
    x: Tensor,  # [N, C, ...]
    dims: list[int],
    mean: Tensor | None,  # [C]
    var: Tensor | None,  # [C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:
    if mean is None or var is None:
        return _scale_channels(_standardise(x, dims, eps), weight, bias)
    return _scale_channels(
        _scale_channels(_scale_channels(x, None, -mean), torch.rsqrt(var + eps), None), weight, bias
    )


def batch_norm(
    x: Tensor,  # [N, C, ...]
    mean: Tensor | None,  # [C]; None: the batch's own statistics
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm by the given statistics or by those of x."""
    return _normalise(x, [0, *range(2, x.dim())], mean, var, weight, bias, eps)


def instance_norm(
    x: Tensor,  # [N, C, ...]
    mean: Tensor | None,  # [C]; None: every instance's own statistics
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Instance norm by the given statistics or by those of every instance of x."""
    # Refused as PyTorch refuses it: the result would be the bias alone.
    if mean is None and math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"instance norm needs more than one value per channel, got an input of shape {tuple(x.shape)}"
        )
    return _normalise(x, [*range(2, x.dim())], mean, var, weight, bias, eps)


def layer_norm(
    x: Tensor,  # [..., *normalized_shape]
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm over the last dimensions."""
    x = _standardise(x, [*range(-len(normalized_shape), 0)], eps)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def group_norm(
    x: Tensor,  # [N, C, ...]
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm: one mean and variance for every example and group of channels."""
    grouped = _standardise(x.reshape(x.shape[0], num_groups, -1), [-1], eps)
    return _scale_channels(grouped.reshape(x.shape), weight, bias)


def rms_norm(
    x: Tensor,  # [..., *normalized_shape]
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root-mean-square norm over the last dimensions."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    x = x * torch.rsqrt((x * x).mean([*range(-len(normalized_shape), 0)], keepdim=True) + eps)
    return x if weight is None else x * weight


def scaled_dot_product_attention(
    query: Tensor,  # [..., L, E]
    key: Tensor,  # [..., S, E]
    value: Tensor,  # [..., S, V]
    attn_mask: Tensor
    | None = None,  # [..., L, S]: bool, True where attended to, or float, added to the scores
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention; a query whose keys are all masked gets zeros."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query @ key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    hidden = None
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = ~attn_mask
    elif attn_mask is not None:
        hidden = attn_mask == -math.inf
        scores = scores + attn_mask.masked_fill(hidden, 0.0)
    if hidden is None:
        attention = torch.softmax(scores, -1)
    else:
        # The lowest finite number instead of -inf: a row that is hidden as a whole must not turn
        # into NaN.
        lowest = torch.finfo(scores.dtype).min
        attention = torch.softmax(scores.masked_fill(hidden, lowest), -1).masked_fill(hidden, 0.0)
    return F.dropout(attention, dropout_p) @ value


def embedding(
    input: Tensor,  # [...], int
    weight: Tensor,  # [E, D]
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    fused: bool = False,
) -> Tensor:
    """Rows of `weight`, [..., D]; with `fused` by PyTorch's own function where that has a second
    derivative, which under vmap takes an index out of range for a row of another task.

    Rows whose norm is above `max_norm` are renormalised; as PyTorch, which does so in place
    beforehand, this has the derivative one. The gradient is never sparse.
    """
    if fused and max_norm is None and not scale_grad_by_freq:
        return F.embedding(input, weight, padding_idx)
    index = input.long().reshape(-1, 1).expand(-1, weight.shape[1])
    rows = weight.gather(0, index)
    if max_norm is not None:
        sizes = rows.detach().norm(norm_type, 1, keepdim=True)
        scale = torch.where(sizes > max_norm, max_norm / (sizes + 1e-7), 1.0)
        rows = rows + (rows * scale - rows).detach()
    if scale_grad_by_freq:
        places = index[:, 0]
        counts = (
            torch.zeros_like(weight[:, 0])
            .detach()
            .scatter_add(0, places, torch.ones_like(rows[:, 0]).detach())
        )
        share = rows / counts.gather(0, places).unsqueeze(1)
        rows = share + (rows - share).detach()
    rows = rows.reshape(*input.shape, weight.shape[1])
    if padding_idx is None:
        return rows
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)
