"""The layer kind `layer_norm`: normalised over the last dimensions of each example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Value, number
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import image_case
from fastmeta.cases.networks import mlp
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind, tanh_around
from fastmeta.layers.norms import affine, image_cases, last_dimensions, row_cases


def layer_norm(
    build: Builder, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Value:
    """[N, ..., *normalized_shape] with weight and bias of that shape -> the same shape."""
    shape = last_dimensions(input, normalized_shape)
    size = float(prod(shape))
    return build.layer(
        "layer_norm", (input,), input.shape, affine(weight, bias, shape), constants=(size, number(eps))
    )


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ..., *normalized_shape] -> the same shape."""
    size, eps = int(layer.constants[0]), layer.constants[1]
    weight, bias = (params[name].reshape(-1) if name else None for name in layer.params)
    return F.layer_norm(x.reshape(-1, size), (size,), weight, bias, eps).reshape(x.shape)


def cases() -> Iterator[Case]:
    """Over one dimension and over several, of rows, of images and of the input."""
    yield from row_cases("ln", (3, 15, 13, 5))
    yield Case("ln_mlp", partial(mlp, (3, 15, 13, 5), "tanh", norm="ln"), (3,), shots=1, queries=1)
    yield from image_cases("ln", partial(nn.LayerNorm, (6, 4, 9)))
    yield from image_cases("ln_last", partial(nn.LayerNorm, 9))
    first, second = partial(nn.LayerNorm, (2, 21)), partial(nn.LayerNorm, 7)
    yield image_case("ln_input", (2, 21), first, partial(nn.Linear, 21, 7), second)


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
    groups=lambda constants, size: size // int(constants[0]),
    examples=(
        Example("rows", partial(nn.LayerNorm, 7), ((3, 7),)),
        Example("one row", partial(nn.LayerNorm, 13), ((13,),)),
        Example("several dimensions", partial(nn.LayerNorm, (3, 5)), ((2, 3, 5),)),
        Example("no bias", partial(nn.LayerNorm, 5, bias=False), ((2, 5),)),
        Example("plain", partial(nn.LayerNorm, 9, elementwise_affine=False), ((9,),)),
        Example("between tanh", partial(tanh_around, partial(nn.LayerNorm, 7)), ((3, 7),)),
    ),
    cases=cases,
)
