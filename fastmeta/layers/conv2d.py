"""The layer kind `conv2d`: a convolution of images [C, H, W], or of signals [C, L] as images of
height 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Parameter, Refused, Value, described
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import conv, image_case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind, tanh_around
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


def cases() -> Iterator[Case]:
    """Kernels of all shapes, strides and paddings, of images and of signals."""
    yield image_case("conv", (2, 5, 5), conv(2, 6, 3, padding=1), nn.Tanh, conv(6, 7, 3), nn.Tanh)
    yield image_case(
        "conv_gray", (1, 7, 6), conv(1, 9, 3, padding=1), nn.Tanh, conv(9, 4, 3, stride=2, padding=1), nn.Tanh
    )
    yield image_case(
        "conv_rgb", (3, 6, 5), conv(3, 5, (2, 3), stride=(2, 1), padding=(1, 2)), nn.Tanh, loss="mse"
    )
    yield image_case(
        "conv_wide", (3, 6, 5), conv(3, 70, 3, padding=1), nn.Tanh, conv(70, 17, 1, bias=False), nn.Tanh
    )
    yield image_case(
        "conv_large",
        (5, 7, 7),
        conv(5, 33, 5, padding=2, stride=3),
        nn.Tanh,
        conv(33, 2, 3, padding=1),
        nn.Tanh,
    )
    yield image_case(
        "conv_point", (3, 1, 1), conv(3, 5, 3, padding=1), nn.Tanh, conv(5, 2, 1), nn.Tanh, shots=1, queries=1
    )
    wide = (
        conv(2, 18, 3, padding=1),
        nn.Tanh,
        conv(18, 20, 3, padding=1),
        nn.Tanh,
        conv(20, 17, 3, padding=2),
        nn.Tanh,
    )
    yield image_case("conv_winograd", (2, 9, 8), *wide)
    yield image_case(
        "conv_winograd", (2, 7, 9), *wide, shots=3, steps=3, memory="recompute", rates="element", momentum=0.5
    )
    yield image_case(
        "conv_winograd_valid", (20, 10, 9), conv(20, 16, 3, bias=False), nn.Tanh, shots=5, order="first"
    )
    yield image_case(
        "conv1d",
        (2, 9),
        partial(nn.Conv1d, 2, 4, 3),
        nn.Tanh,
        partial(nn.Conv1d, 4, 3, 4, stride=2, padding=1),
    )
    net = partial(
        image_case, "conv", (2, 5, 5), conv(2, 6, 3, padding=1), nn.Tanh, conv(6, 7, 3, stride=2), nn.Tanh
    )
    yield net(memory="recompute", steps=3)
    yield net(rates="element_step_task", momentum=0.9, weight_decay=0.1)
    yield net(per_task="all", step_weights=True, weighted="sqt")
    yield net(per_task="some", order="first", rates="tensor")
    yield net(operator="inner_sgd", rates="head")
    yield net(operator="task_forward", steps=0, per_task="some")
    yield net(tasks=18, shots=2, queries=1, per_step=True)


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
    examples=(
        Example("bias", partial(nn.Conv2d, 2, 6, 3, padding=1), ((2, 5, 4),)),
        Example(
            "stride, no bias",
            partial(nn.Conv2d, 3, 4, (2, 3), stride=(2, 1), padding=(1, 2), bias=False),
            ((3, 6, 5),),
        ),
        Example("one tap", partial(nn.Conv2d, 5, 7, 1), ((5, 3, 4),)),
        Example("many channels", partial(nn.Conv2d, 16, 17, 3, padding=1), ((16, 7, 6),)),
        Example("signal", partial(nn.Conv1d, 2, 4, 4, stride=2, padding=1), ((2, 9),)),
        Example("between tanh", partial(tanh_around, partial(nn.Conv2d, 2, 3, 2)), ((2, 4, 3),)),
    ),
    cases=cases,
)
