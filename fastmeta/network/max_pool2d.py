"""The layer kind `max_pool2d`: the largest value of every window, of images or of signals."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.network.build import Builder, Functions, Methods, Modules, Refused, Value
from fastmeta.network.windows import constants, image, numbers, positions


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
    kernel = numbers("kernel_size", kernel_size, dimensions)
    strides = kernel if stride in (None, (), []) else numbers("stride", stride, dimensions)
    paddings = numbers("padding", padding, dimensions, least=0)
    if set(numbers("dilation", dilation, dimensions)) != {1}:
        raise Refused(f"its dilation is {dilation}")
    if return_indices:
        raise Refused("it returns indices")
    if any(2 * p > k for p, k in zip(paddings, kernel, strict=True)):
        raise Refused(f"a padding of {padding} is more than half of the window {kernel_size}")
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
