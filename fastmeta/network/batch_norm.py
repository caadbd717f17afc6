"""The layer kind `batch_norm`: normalised by the task's own batch or by running statistics, as the problem says."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fastmeta.network.build import (
    Buffer,
    Builder,
    Functions,
    Methods,
    Modules,
    Refused,
    Value,
    batched,
    described,
    number,
)
from fastmeta.network.norms import affine, normalised


def batch_norm(
    build: Builder,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Value:
    """[N, C, ...] with weight, bias and running statistics [C] -> [N, C, ...].

    Neither `training` nor `momentum` matters: `batch_stats` of the call says what a task is normalised by.
    """
    normalised(input)
    channels = input.shape[:1]
    names = affine(weight, bias, channels) + _statistics(running_mean, running_var, channels)
    return build.layer("batch_norm", (input,), input.shape, names, constants=(number(eps),))


def _module(dimensions: tuple[int, ...]) -> Any:
    def rule(
        build: Builder, input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, eps: Any
    ) -> Value:
        if len(normalised(input).shape) not in dimensions:
            raise Refused(f"it does not take {batched(input.shape)}")
        return batch_norm(build, input, running_mean, running_var, weight, bias, eps=eps)

    return rule


def _statistics(mean: Any, var: Any, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    if mean is None and var is None:
        return (None, None)
    for what, value in (("mean", mean), ("variance", var)):
        if not isinstance(value, Buffer):
            raise Refused(f"the running {what} must be a buffer, got {described(value)}")
        if value.shape != shape:
            raise Refused(f"the buffer `{value.name}` must be {list(shape)}, got {list(value.shape)}")
    return (mean.name, var.name)


_ATTRIBUTES = ("running_mean", "running_var", "weight", "bias", "eps")
MODULES: Modules = {
    nn.BatchNorm1d: (_module((1, 2)), _ATTRIBUTES),
    nn.BatchNorm2d: (_module((3,)), _ATTRIBUTES),
}
FUNCTIONS: Functions = {F.batch_norm: batch_norm}
METHODS: Methods = {}
