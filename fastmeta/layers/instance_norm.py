"""Instance norm: a `group_norm` with a group for each channel."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value
from fastmeta.layers.group_norm import group_norm
from fastmeta.layers.norms import normalised
from fastmeta.layers.windows import image


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
    """[N, C, ...] with weight and bias [C] -> [N, C, ...]."""
    if running_mean is not None or running_var is not None:
        raise Refused("it tracks running statistics")
    return group_norm(build, input, normalised(input).shape[0], weight, bias, eps)


def _module(
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


_ATTRIBUTES = ("running_mean", "running_var", "weight", "bias", "eps")
MODULES: Modules = {
    nn.InstanceNorm1d: (partial(_module, 1), _ATTRIBUTES),
    nn.InstanceNorm2d: (partial(_module, 2), _ATTRIBUTES),
}
FUNCTIONS: Functions = {F.instance_norm: instance_norm}
METHODS: Methods = {}
