"""The layer kind `conv2d`: a convolution of images [C, H, W], or of signals [C, L] as images of
height 1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Parameter, Refused, Value, described
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind
from fastmeta.layers.windows import as_image, constants, image, numbers, positions


def _convolution(
    dimensions: int,
    build: Builder,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    padding_mode: str = "zeros",
) -> Value:
    """[N, C, H, W] with weight [O, C, kh, kw] and bias [O] -> [N, O, H', W']."""
    image(input, dimensions)
    if not isinstance(weight, Parameter):
        raise Refused(f"the weight must be a parameter, got {described(weight)}")
    if bias is not None and not isinstance(bias, Parameter):
        raise Refused(f"the bias must be a parameter, got {described(bias)}")
    if len(weight.shape) != dimensions + 2:
        raise Refused(
            f"the weight `{weight.name}` must have {dimensions + 2} dimensions, got {list(weight.shape)}"
        )
    outputs, channels, *sizes = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise Refused(f"the bias `{bias.name}` must be [{outputs}], got {list(bias.shape)}")
    if set(numbers("dilation", dilation, dimensions)) != {1}:
        raise Refused(f"its dilation is {dilation}")
    if groups != 1:
        raise Refused(f"it has {groups} groups")
    if padding_mode != "zeros":
        raise Refused(f"it pads by {padding_mode!r}")
    if input.shape[0] != channels:
        raise Refused(f"it takes {channels} channels, got {input.shape[0]}")
    kernel, strides = tuple(sizes), numbers("stride", stride, dimensions)
    paddings = _paddings(padding, kernel, strides)
    names = (weight.name, bias.name if bias else None)
    shape = (outputs, *positions(input.shape, kernel, strides, paddings))
    return build.layer("conv2d", (input,), shape, names, constants=constants(kernel, strides, paddings))


def _paddings(padding: Any, kernel: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0,) * len(kernel)
    if padding != "same":
        return numbers("padding", padding, len(kernel), least=0)
    if set(stride) != {1}:
        raise Refused("padding='same' needs a stride of 1")
    if any(size % 2 == 0 for size in kernel):
        raise Refused(f"padding='same' of an even kernel {list(kernel)} is not symmetric")
    return tuple(size // 2 for size in kernel)


conv1d, conv2d = partial(_convolution, 1), partial(_convolution, 2)

_ATTRIBUTES = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, L] -> [N, O, H', W'] or [N, O, L']."""
    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    weight, bias = (params[name] if name else None for name in layer.params)
    taps = weight.reshape(*weight.shape[:2], kh, kw)  # type: ignore[union-attr]
    return F.conv2d(as_image(x), taps, bias, (sh, sw), (ph, pw)).reshape(len(x), *layer.shape)


KIND = LayerKind(
    name="conv2d",
    family="bilinear",
    forward=forward,
    params=("weight", "bias"),
    required=1,
    matrix=True,
    constants=(6, 6),
    order="image",
    modules={nn.Conv1d: (conv1d, _ATTRIBUTES), nn.Conv2d: (conv2d, _ATTRIBUTES)},
    functions={F.conv1d: conv1d, F.conv2d: conv2d, torch.conv1d: conv1d, torch.conv2d: conv2d},
    epilogue=True,
    prologue=True,
)
