"""The layer kind `batch_norm`: normalised by the task's own batch, or by the running statistics
that it names."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Buffer, Builder, Refused, Value, batched, described, number
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import LayerKind
from fastmeta.layers.norms import affine, normalised
from fastmeta.network.functional import by_own_batch


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

    `momentum` does not matter; `batch_stats` of the call says whether `training` does.
    """
    normalised(input)
    channels = input.shape[:1]
    names = affine(weight, bias, channels) + _statistics(build, running_mean, running_var, training, channels)
    return build.layer("batch_norm", (input,), input.shape, names, constants=(number(eps),))


def _module(dimensions: tuple[int, ...]) -> Any:
    def rule(
        build: Builder,
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any,
        bias: Any,
        training: Any,
        eps: Any,
    ) -> Value:
        if len(normalised(input).shape) not in dimensions:
            raise Refused(f"it does not take {batched(input.shape)}")
        training = training or (running_mean is None and running_var is None)
        return batch_norm(build, input, running_mean, running_var, weight, bias, training, eps=eps)

    return rule


def _statistics(
    build: Builder, mean: Any, var: Any, training: Any, shape: tuple[int, ...]
) -> tuple[str | None, ...]:
    """The names of the statistics, or of none where the task's own batch is what to normalise
    by."""
    if build.batch_stats == "module" and not isinstance(training, bool):
        raise Refused(f"`training` must be True or False, got {described(training)}")
    own_batch = by_own_batch(build.batch_stats, training)
    if mean is None and var is None:
        if not own_batch:
            raise Refused("it has no running statistics")
        return (None, None)
    for what, value in (("mean", mean), ("variance", var)):
        if not isinstance(value, Buffer):
            raise Refused(f"the running {what} must be a buffer, got {described(value)}")
        if value.shape != shape:
            raise Refused(f"the buffer `{value.name}` must be {list(shape)}, got {list(value.shape)}")
    return (None, None) if own_batch else (mean.name, var.name)


_ATTRIBUTES = ("running_mean", "running_var", "weight", "bias", "training", "eps")


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, C, ...] -> [N, C, ...]."""
    weight, bias, mean, var = (params[name] if name else None for name in layer.params)
    return F.batch_norm(x, mean, var, weight, bias, reads_batch(layer), eps=layer.constants[0])


def reads_batch(layer: Layer) -> bool:
    """Whether it normalises by its batch, not by running statistics."""
    return layer.params[2] is None


def refuses(layer: Layer, count: int) -> str:
    """The variance of one value is zero."""
    one = reads_batch(layer) and count * prod(layer.shape[1:]) == 1
    return "batch norm over one value per channel" if one else ""


KIND = LayerKind(
    name="batch_norm",
    family="norm",
    forward=forward,
    params=("weight", "bias", "mean", "variance"),
    buffers=2,
    constants=(1, 1),
    order="image",
    modules={
        nn.BatchNorm1d: (_module((1, 2)), _ATTRIBUTES),
        nn.BatchNorm2d: (_module((3,)), _ATTRIBUTES),
    },
    functions={F.batch_norm: batch_norm},
    epilogue=True,
    reads_batch=reads_batch,
    refuses=refuses,
)
