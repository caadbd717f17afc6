"""The layer kind `avg_pool2d`: the mean of every window; adaptive windows and the mean over all of
an image too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Refused, Value, integer
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import conv, image_case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind
from fastmeta.layers.reshape import reshaped
from fastmeta.layers.windows import as_image, constants, image, pooling, positions, two


def _avg_pool(
    dimensions: int,
    build: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> Value:
    """[N, C, H, W] -> [N, C, H', W']."""
    image(input, dimensions)
    kernel, strides, paddings = pooling(kernel_size, stride, padding, dimensions)
    divisor = 0 if divisor_override is None else integer(divisor_override)
    if divisor_override is not None and divisor < 1:
        raise Refused(f"divisor_override must be positive, got {divisor}")
    shape = (input.shape[0], *positions(input.shape, kernel, strides, paddings, bool(ceil_mode)))
    extra = (float(bool(count_include_pad)), float(divisor))
    return build.layer(
        "avg_pool2d", (input,), shape, constants=(*constants(kernel, strides, paddings), *extra)
    )


def _adaptive(dimensions: int, build: Builder, input: Any, output_size: Any) -> Value:
    """[N, C, H, W] -> [N, C, *output_size]; None keeps a size."""
    image(input, dimensions)
    given = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * dimensions
    if len(given) != dimensions:
        raise Refused(f"output_size must be {dimensions} sizes, got {output_size!r}")
    sizes = tuple(
        old if new is None else integer(new) for old, new in zip(input.shape[1:], given, strict=True)
    )
    if min(sizes) < 1:
        raise Refused(f"output_size must be positive, got {output_size!r}")
    return build.layer("avg_pool2d", (input,), (input.shape[0], *sizes), function="adaptive")


def mean(build: Builder, input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> Any:
    """[N, C, H, W] -> [N, C], the mean over all of an image; other means are refused."""
    dimensions = len(getattr(input, "shape", ())) - 1
    if dimensions not in (1, 2):
        raise Refused("only means over height and width are captured")
    image(input, dimensions)
    rank = dimensions + 2
    dims = {integer(d) % rank for d in (dim if isinstance(dim, (tuple, list)) else (dim,)) if d is not None}
    if dims != set(range(2, rank)):
        raise Refused(f"only means over height and width are captured, got dim={dim!r}")
    if dtype is not None:
        raise Refused("it converts to another dtype")
    pooled = _adaptive(dimensions, build, input, 1)
    return pooled if keepdim else reshaped(build, pooled, input.shape[:1])


avg_pool1d, avg_pool2d = partial(_avg_pool, 1), partial(_avg_pool, 2)
adaptive_avg_pool1d, adaptive_avg_pool2d = partial(_adaptive, 1), partial(_adaptive, 2)

_ATTRIBUTES = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, L] -> [N, C, H', W'] or [N, C, L']."""
    windows = two(layer.shape[1:], 1)
    shape = (len(x), *layer.shape)
    if layer.function == "adaptive":
        return F.adaptive_avg_pool2d(as_image(x), windows).reshape(shape)
    kh, kw, sh, sw, ph, pw, padded, divisor = map(int, layer.constants)
    for ceil in (False, True):
        out = F.avg_pool2d(as_image(x), (kh, kw), (sh, sw), (ph, pw), ceil, bool(padded), divisor or None)
        if tuple(out.shape[2:]) == windows:
            return out.reshape(shape)
    raise ValueError(f"avg_pool2d: no {list(windows)} windows fit into {list(x.shape)}: {layer}")


def cases() -> Iterator[Case]:
    """Windows side by side, overlapping, padded, with a divisor of their own, and adaptive."""
    first = (conv(2, 5, 3, padding=1), nn.Tanh)
    yield image_case("avg_pool", (2, 6, 7), *first, partial(nn.AvgPool2d, 2))
    last = (conv(2, 5, 2), nn.Tanh)
    up = partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True)
    yield image_case("avg_pool_3_2", (2, 6, 7), up, *last)
    inside = partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False)
    yield image_case("avg_pool_inside", (2, 5, 5), inside, *last)
    divided = partial(nn.AvgPool2d, 3, 1, divisor_override=7)
    yield image_case("avg_pool_divisor", (2, 5, 5), *last, divided)
    yield image_case("adaptive", (2, 7, 5), *first, partial(nn.AdaptiveAvgPool2d, (3, 2)))


KIND = LayerKind(
    name="avg_pool2d",
    family="linear_map",
    forward=forward,
    constants=(0, 8),
    order="image",
    modules={
        nn.AvgPool1d: (avg_pool1d, _ATTRIBUTES),
        nn.AvgPool2d: (avg_pool2d, (*_ATTRIBUTES, "divisor_override")),
        nn.AdaptiveAvgPool1d: (adaptive_avg_pool1d, ("output_size",)),
        nn.AdaptiveAvgPool2d: (adaptive_avg_pool2d, ("output_size",)),
    },
    functions={
        F.avg_pool1d: avg_pool1d,
        F.avg_pool2d: avg_pool2d,
        F.adaptive_avg_pool1d: adaptive_avg_pool1d,
        F.adaptive_avg_pool2d: adaptive_avg_pool2d,
        torch.adaptive_avg_pool1d: adaptive_avg_pool1d,
        torch.mean: mean,
    },
    methods={"mean": mean},
    examples=(
        Example("side by side", partial(nn.AvgPool2d, 2), ((3, 6, 5),)),
        Example("overlapping, padded", partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True), ((2, 6, 7),)),
        Example("without padding", partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False), ((2, 5, 5),)),
        Example("divisor", partial(nn.AvgPool2d, 3, 1, divisor_override=7), ((2, 4, 5),)),
        Example("adaptive", partial(nn.AdaptiveAvgPool2d, (3, 2)), ((2, 7, 5),)),
        Example("signal", partial(nn.AvgPool1d, 4, 3, 2), ((3, 9),)),
    ),
    cases=cases,
)
