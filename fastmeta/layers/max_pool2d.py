"""The layer kind `max_pool2d`: the largest value of every window, of images or of signals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Refused, Value
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import conv, image_case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind
from fastmeta.layers.windows import as_image, constants, image, numbers, pooling, positions, two


def _max_pool(
    dimensions: int,
    build: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> Value:
    """[N, C, H, W] -> [N, C, H', W']."""
    image(input, dimensions)
    kernel, strides, paddings = pooling(kernel_size, stride, padding, dimensions)
    if set(numbers("dilation", dilation, dimensions)) != {1}:
        raise Refused(f"its dilation is {dilation}")
    if return_indices:
        raise Refused("it returns indices")
    shape = (input.shape[0], *positions(input.shape, kernel, strides, paddings, bool(ceil_mode)))
    return build.layer("max_pool2d", (input,), shape, constants=constants(kernel, strides, paddings))


max_pool1d, max_pool2d = partial(_max_pool, 1), partial(_max_pool, 2)

_ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _windows(layer: Layer, x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H', W', kh * kw]: what each window sees, -inf in the padding."""
    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    rows, cols = two(layer.shape[1:], 1)
    image = as_image(x)
    # the last window may reach beyond the padding, where the number of windows is rounded up
    below = max(0, (rows - 1) * sh + kh - image.shape[2] - ph)
    right = max(0, (cols - 1) * sw + kw - image.shape[3] - pw)
    padded = F.pad(image, (pw, right, ph, below), value=-math.inf)
    return padded.unfold(2, kh, sh)[:, :, :rows].unfold(3, kw, sw)[:, :, :, :cols].flatten(4)


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, L] -> [N, C, H', W'] or [N, C, L']."""
    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    windows = two(layer.shape[1:], 1)
    for ceil in (False, True):
        out = F.max_pool2d(as_image(x), (kh, kw), (sh, sw), (ph, pw), ceil_mode=ceil)
        if tuple(out.shape[2:]) == windows:
            return out.reshape(len(x), *layer.shape)
    raise ValueError(f"max_pool2d: no {list(windows)} windows fit into {list(x.shape)}: {layer}")


def kinks(layer: Layer, x: Tensor) -> Tensor:
    """The distance between the two largest values of a window, the least of all."""
    windows = _windows(layer, x)
    if windows.shape[-1] < 2 or not windows.numel():
        return x.new_tensor(math.inf)
    largest = windows.topk(2, dim=-1).values
    return (largest[..., 0] - largest[..., 1]).min()


def cases() -> Iterator[Case]:
    """Windows side by side, overlapping, padded and rounded up, of images and of signals; those of
    a smooth network have no ties."""
    net = partial(image_case, kinks=True)
    yield net("max_pool", (2, 6, 7), conv(2, 5, 3, padding=1), nn.Tanh, partial(nn.MaxPool2d, 2))
    overlapping = partial(nn.MaxPool2d, 3, 2, 1)
    yield net("max_pool_3_2", (2, 7, 7), conv(2, 5, 3, padding=1), overlapping, nn.Tanh)
    up = partial(nn.MaxPool2d, 2, 2, ceil_mode=True)
    yield net("max_pool_ceil", (3, 5, 5), partial(nn.MaxPool2d, 2, 1), up)
    signal = (partial(nn.Conv1d, 2, 4, 3), nn.Tanh, partial(nn.AvgPool1d, 3, 2))
    yield net("pool1d", (2, 11), *signal, partial(nn.MaxPool1d, 2))


KIND = LayerKind(
    name="max_pool2d",
    family="free",
    forward=forward,
    constants=(6, 6),
    order="image",
    modules={nn.MaxPool1d: (max_pool1d, _ATTRIBUTES), nn.MaxPool2d: (max_pool2d, _ATTRIBUTES)},
    functions={
        F.max_pool1d: max_pool1d,
        F.max_pool2d: max_pool2d,
        torch.max_pool1d: max_pool1d,
        torch.max_pool2d: max_pool2d,
    },
    kinks=kinks,
    examples=(
        Example("side by side", partial(nn.MaxPool2d, 2), ((3, 6, 5),)),
        Example("overlapping, padded", partial(nn.MaxPool2d, 3, 2, 1), ((2, 7, 6),)),
        Example("rounded up", partial(nn.MaxPool2d, (3, 2), 2, ceil_mode=True), ((2, 4, 5),)),
        Example("signal", partial(nn.MaxPool1d, 3, 2), ((2, 9),)),
    ),
    cases=cases,
)
