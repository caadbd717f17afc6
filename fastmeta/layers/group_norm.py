"""The layer kind `group_norm`: each example normalised over groups of channels; instance norm has
one a group."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value, integer, number
from fastmeta.layers.norms import affine, normalised


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


MODULES: Modules = {nn.GroupNorm: (group_norm, ("num_groups", "weight", "bias", "eps"))}
FUNCTIONS: Functions = {F.group_norm: group_norm}
METHODS: Methods = {}
