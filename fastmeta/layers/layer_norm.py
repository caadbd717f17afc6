"""The layer kind `layer_norm`: normalised over the last dimensions of each example."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import (
    Builder,
    Functions,
    Methods,
    Modules,
    Refused,
    Value,
    batched,
    integer,
    number,
)
from fastmeta.layers.norms import affine, normalised


def layer_norm(
    build: Builder, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Value:
    """[N, ..., *normalized_shape] with weight and bias of that shape -> the same shape."""
    normalised(input)
    given = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    shape = tuple(map(integer, given))
    if not shape or input.shape[-len(shape) :] != shape:
        raise Refused(f"it takes [N, ..., {', '.join(map(str, shape))}], got {batched(input.shape)}")
    size = float(prod(shape))
    return build.layer(
        "layer_norm", (input,), input.shape, affine(weight, bias, shape), constants=(size, number(eps))
    )


MODULES: Modules = {nn.LayerNorm: (layer_norm, ("normalized_shape", "weight", "bias", "eps"))}
FUNCTIONS: Functions = {F.layer_norm: layer_norm}
METHODS: Methods = {}
