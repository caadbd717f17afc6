"""The layer kind `reshape`: another shape for each example, the batch dimension staying first.

Values are row-major, so that a reshape moves nothing: only the shape of one example changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.capture.build import BATCH, Builder, Refused, Value, batched, described, integer
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import Reshaped
from fastmeta.cases.networks import mlp
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind


def reshape(build: Builder, input: Any, shape: Any) -> Value:
    """[N, ...] -> [N, ...] of as many elements, `shape` being (N or -1, ...) with at most one
    -1."""
    _check_input(input)
    if not isinstance(shape, (tuple, list)) or not shape:
        raise Refused(
            f"the shape must be a sequence of sizes that begins with the batch size, got {described(shape)}"
        )
    first, rest = shape[0], [integer(size) for size in shape[1:]]
    elements, unknown = prod(input.shape), rest.count(-1)
    known = prod(size for size in rest if size != -1)
    if first is BATCH:
        fits = known == elements if not unknown else unknown == 1 and known > 0 and elements % known == 0
    elif first == -1:
        fits = not unknown and known == elements > 0
    else:
        raise Refused(f"the first size must be the batch size or -1, got {described(first)}")
    if not fits or min(rest, default=0) < -1:
        raise Refused(f"the batch dimension does not stay first in {batched(input.shape)} -> {list(shape)}")
    return reshaped(build, input, tuple(elements // known if size == -1 else size for size in rest))


def flatten(build: Builder, input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Value:
    """[N, ..., A, ..., B, ...] -> [N, ..., A * ... * B, ...]."""
    _check_input(input)
    start, end = _dimension(input, start_dim), _dimension(input, end_dim)
    if start == end:
        return reshaped(build, input, input.shape)
    if start > end:
        raise Refused(f"start_dim {start_dim} comes after end_dim {end_dim}")
    if start == 0:
        raise Refused("it would flatten the batch dimension (use start_dim=1)")
    shape = input.shape
    return reshaped(build, input, (*shape[: start - 1], prod(shape[start - 1 : end]), *shape[end:]))


def unflatten(build: Builder, input: Any, dim: Any, sizes: Any) -> Value:
    """[N, ..., A * B, ...] -> [N, ..., A, B, ...]."""
    _check_input(input)
    at = _dimension(input, dim)
    if at == 0:
        raise Refused("it would unflatten the batch dimension")
    if not isinstance(sizes, (tuple, list)):
        raise Refused(f"the sizes must be a tuple, got {described(sizes)}")
    shape = input.shape
    return reshape(build, input, (BATCH, *shape[: at - 1], *sizes, *shape[at:]))


def squeeze(build: Builder, input: Any, dim: Any) -> Value:
    """[N, ..., 1, ...] -> [N, ...]; nothing changes where the size is not 1."""
    _check_input(input)
    at = _dimension(input, dim)
    if at == 0:
        raise Refused("it would squeeze the batch dimension")
    shape = input.shape
    return reshaped(build, input, shape[: at - 1] + shape[at:] if shape[at - 1] == 1 else shape)


def unsqueeze(build: Builder, input: Any, dim: Any) -> Value:
    """[N, ...] -> [N, ..., 1, ...]."""
    _check_input(input)
    at = integer(dim)
    if at < 0:
        at += len(input.shape) + 2
    if not 0 < at <= len(input.shape) + 1:
        raise Refused(f"dim must leave the batch dimension first, got {dim}")
    return reshaped(build, input, (*input.shape[: at - 1], 1, *input.shape[at - 1 :]))


def _sizes(build: Builder, input: Any, *shape: Any) -> Value:
    return reshape(
        build, input, shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    )


def _unflatten_module(build: Builder, input: Any, dim: Any, unflattened_size: Any) -> Value:
    return unflatten(build, input, dim, unflattened_size)


def reshaped(build: Builder, input: Value, shape: tuple[int, ...]) -> Value:
    """The input under another shape, known to fit."""
    return input if shape == input.shape else build.layer("reshape", (input,), shape, view=True)


def _check_input(input: Any) -> None:
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")


def _dimension(input: Value, dim: Any) -> int:
    rank, at = len(input.shape) + 1, integer(dim)
    if not -rank <= at < rank:
        raise Refused(f"dimension {dim} is out of range for {rank} dimensions")
    return at % rank


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ...] -> [N, *layer.shape]."""
    return x.reshape(len(x), *layer.shape)


def _after_convolution(make: Callable[[], nn.Module]) -> nn.Module:
    """Of an image that kernels keep channels-last."""
    return nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), make())


def _before_convolution(shape: tuple[int, ...]) -> nn.Module:
    """To an image that kernels keep channels-last."""
    return nn.Sequential(nn.Unflatten(1, shape), nn.Conv2d(shape[0], 2, 1, bias=False))


def cases() -> Iterator[Case]:
    """From an image to rows, and from rows to images of two shapes."""
    yield Case("image", partial(mlp, (25, 13, 5), "tanh", flatten=True), (1, 5, 5), loss="ce")
    yield Case("reshaped_image", Reshaped, (5,), 2, 4, 3, loss="ce", kinks=True)


KIND = LayerKind(
    name="reshape",
    family="linear_map",
    forward=forward,
    modules={
        nn.Flatten: (flatten, ("start_dim", "end_dim")),
        nn.Unflatten: (_unflatten_module, ("dim", "unflattened_size")),
    },
    functions={
        torch.flatten: flatten,
        torch.reshape: reshape,
        torch.unflatten: unflatten,
        torch.squeeze: squeeze,
        torch.unsqueeze: unsqueeze,
    },
    methods={
        "view": _sizes,
        "reshape": _sizes,
        "flatten": flatten,
        "unflatten": unflatten,
        "squeeze": squeeze,
        "unsqueeze": unsqueeze,
    },
    examples=(
        Example("image to vector", partial(_after_convolution, nn.Flatten), ((2, 4, 3),)),
        Example("vector to image", partial(_before_convolution, (3, 2, 4)), ((24,),)),
        Example("rows", partial(nn.Unflatten, 1, (2, 3)), ((6, 5),)),
    ),
    cases=cases,
)
