"""The layer kind `max_pool2d`: the largest value of every window, of images or of signals."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value
from fastmeta.layers.windows import constants, image, numbers, pooling, positions


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
MODULES: Modules = {nn.MaxPool1d: (max_pool1d, _ATTRIBUTES), nn.MaxPool2d: (max_pool2d, _ATTRIBUTES)}
FUNCTIONS: Functions = {
    F.max_pool1d: max_pool1d,
    F.max_pool2d: max_pool2d,
    torch.max_pool1d: max_pool1d,
    torch.max_pool2d: max_pool2d,
}
METHODS: Methods = {}
