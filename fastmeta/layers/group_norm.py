"""The layer kind `group_norm`: each example normalised over groups of channels; instance norm has
one a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Refused, Value, integer, number
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import conv, image_case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind, tanh_around
from fastmeta.layers.norms import affine, image_cases, normalised, pooled, relu_cases, row_cases
from fastmeta.layers.windows import image


def group_norm(
    build: Builder, input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Value:
    """[N, C, ...] with weight and bias [C] -> [N, C, ...]."""
    channels, groups = normalised(input).shape[0], integer(num_groups)
    if groups < 1 or channels % groups:
        raise Refused(f"{channels} channels are no {groups} groups")
    if prod(input.shape) == groups:
        raise Refused("a group is one value")
    names = affine(weight, bias, (channels,))
    return build.layer("group_norm", (input,), input.shape, names, constants=(float(groups), number(eps)))


def instance_norm(
    build: Builder,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Value:
    """[N, C, ...] with weight and bias [C] -> [N, C, ...]: a group for each channel."""
    if running_mean is not None or running_var is not None:
        raise Refused("it tracks running statistics")
    return group_norm(build, input, normalised(input).shape[0], weight, bias, eps)


def _instance_norm(
    dimensions: int,
    build: Builder,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    eps: Any,
) -> Value:
    return instance_norm(build, image(input, dimensions), running_mean, running_var, weight, bias, eps=eps)


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, C, ...] -> [N, C, ...]."""
    groups, eps = int(layer.constants[0]), layer.constants[1]
    weight, bias = (params[name] if name else None for name in layer.params)
    return F.group_norm(x, groups, weight, bias, eps)


_ATTRIBUTES = ("running_mean", "running_var", "weight", "bias", "eps")


def cases() -> Iterator[Case]:
    """Some groups, one, and one for each channel; of rows and of images."""
    yield from row_cases("gn", (3, 30, 26, 5))
    yield from image_cases("gn2", partial(nn.GroupNorm, 2, 6))
    yield from image_cases("gn1_plain", partial(nn.GroupNorm, 1, 6, affine=False))
    yield from image_cases("in", partial(nn.InstanceNorm2d, 6, affine=True))
    yield from relu_cases("gn", partial(nn.GroupNorm, 3, 6))
    pooled = (nn.ReLU, partial(nn.MaxPool2d, 2), conv(6, 4, 2), nn.Tanh)
    first = (conv(1, 6, 3, padding=1), partial(nn.GroupNorm, 3, 6), *pooled)
    yield image_case("first_gn", (1, 7, 6), *first, wrt_inputs=False, kinks=True)


KIND = LayerKind(
    name="group_norm",
    family="norm",
    forward=forward,
    params=("weight", "bias"),
    constants=(2, 2),
    order="image",
    modules={
        nn.GroupNorm: (group_norm, ("num_groups", "weight", "bias", "eps")),
        nn.InstanceNorm1d: (partial(_instance_norm, 1), _ATTRIBUTES),
        nn.InstanceNorm2d: (partial(_instance_norm, 2), _ATTRIBUTES),
    },
    functions={F.group_norm: group_norm, F.instance_norm: instance_norm},
    epilogue=True,
    groups=lambda constants, size: int(constants[0]),
    examples=(
        Example("image", partial(nn.GroupNorm, 2, 6), ((6, 4, 3),)),
        Example("rows", partial(nn.GroupNorm, 2, 6), ((6,),)),
        Example("one group, plain", partial(nn.GroupNorm, 1, 5, affine=False), ((5, 3),)),
        Example("a group for each channel", partial(nn.InstanceNorm2d, 4, affine=True), ((4, 3, 3),)),
        Example("relu and max-pool after it", partial(pooled, partial(nn.GroupNorm, 3, 6)), ((6, 4, 5),)),
        Example("between tanh", partial(tanh_around, partial(nn.GroupNorm, 2, 6)), ((6, 3),)),
    ),
    cases=cases,
)
