"""The layer kind `layer_norm`: normalised over the last dimensions of each example."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Refused, Value, batched, integer, number
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind
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


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ..., *normalized_shape] -> the same shape."""
    size, eps = int(layer.constants[0]), layer.constants[1]
    weight, bias = (params[name].reshape(-1) if name else None for name in layer.params)
    return F.layer_norm(x.reshape(-1, size), (size,), weight, bias, eps).reshape(x.shape)


KIND = LayerKind(
    name="layer_norm",
    family="norm",
    forward=forward,
    params=("weight", "bias"),
    constants=(2, 2),
    order="rows",
    modules={nn.LayerNorm: (layer_norm, ("normalized_shape", "weight", "bias", "eps"))},
    functions={F.layer_norm: layer_norm},
    epilogue=True,
)
