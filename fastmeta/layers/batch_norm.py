"""The layer kind `batch_norm`: normalised by the task's own batch, or by the running statistics
that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Buffer, Builder, Refused, Value, batched, described, number
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import Stems, conv, image_case
from fastmeta.cases.networks import frozen, half_frozen_norms, half_frozen_norms_mlp, mlp
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind, tanh_around
from fastmeta.layers.norms import affine, image_cases, normalised, pooled, relu_cases, row_cases
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


def cases() -> Iterator[Case]:
    """By the batch and by running statistics; of rows, of images and of the input."""
    yield from row_cases("bn", (3, 15, 13, 5))
    yield Case("bn_relu_mlp", partial(mlp, (3, 15, 13, 5), "relu", norm="bn"), (3,), loss="ce", kinks=True)
    yield Case("bn_gelu_mlp", partial(mlp, (3, 15, 5), "gelu", norm="bn_plain"), (3,), shots=33, queries=21)
    yield from image_cases("bn", partial(nn.BatchNorm2d, 6))
    yield from image_cases("bn_plain", partial(nn.BatchNorm2d, 6, affine=False))
    rows = (partial(nn.BatchNorm1d, 20), partial(nn.Linear, 20, 17), partial(nn.BatchNorm1d, 17), nn.Tanh)
    yield image_case("bn_input", (20,), *rows)
    plain = (partial(nn.BatchNorm2d, 2, affine=False), nn.Tanh, partial(nn.InstanceNorm2d, 2))
    yield image_case("plain_input", (2, 4, 3), *plain, conv(2, 4, 2), nn.Tanh)
    body = (conv(2, 6, 3, padding=1, bias=False), partial(nn.BatchNorm2d, 6), nn.Tanh)
    one = partial(image_case, "bn_one", (2, 9, 8), *body)
    yield one(shots=1, queries=1, tasks=1)
    yield one(order="first", step_weights=True)
    yield one(operator="inner_sgd", weighted="s", loss="ce")
    yield one(operator="task_forward", steps=0)
    yield from relu_cases("bn", partial(nn.BatchNorm2d, 6))
    wide = (partial(nn.BatchNorm2d, 2), nn.ReLU, partial(nn.MaxPool2d, (3, 2)), conv(2, 4, 2), nn.Tanh)
    yield image_case("bn_relu_pool_input", (2, 8, 7), *wide, kinks=True)
    half = partial(Case, loss="ce", batch_stats="module", tasks=2, shots=4, queries=3)
    yield half("half_frozen_norms", half_frozen_norms_mlp, (3,), rates="rows", memory="recompute")
    yield half("half_frozen_image_norms", half_frozen_norms, (2, 5, 4))
    yield from _first_layers()


def _first_layers() -> Iterator[Case]:
    """A convolution of the input behind which a norm stands, where nobody asks for the input's
    gradient: a backend may compute it again and again instead of keeping it."""
    gray = (conv(1, 6, 3, padding=1), partial(nn.BatchNorm2d, 6))
    pooled = (nn.ReLU, partial(nn.MaxPool2d, 2), conv(6, 4, 2), nn.Tanh)
    for tail in (pooled, (nn.Tanh, conv(6, 4, 3, stride=2), nn.Tanh)):
        label = "first_bn_relu_pool" if tail is pooled else "first_bn"
        net = partial(image_case, label, (1, 7, 6), *gray, *tail, wrt_inputs=False, kinks=tail is pooled)
        yield net()
        yield net(memory="recompute", rates="element", momentum=0.5, steps=3)
        yield net(per_task="some", step_weights=True, weighted="sqt")
    net = partial(image_case, "first_bn", (1, 7, 6), *gray, nn.Tanh, wrt_inputs=False)
    yield net(operator="inner_sgd", rates="head")
    yield net(operator="task_forward", steps=0)
    yield net(order="first", per_step=True, tasks=3)
    strided = (
        conv(3, 18, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        partial(nn.BatchNorm2d, 18, affine=False),
    )
    yield image_case("first_rgb", (3, 6, 5), *strided, nn.Tanh, wrt_inputs=False)
    wide = (conv(1, 20, 2), partial(nn.BatchNorm2d, 20), nn.ReLU, partial(nn.MaxPool2d, (3, 2)))
    yield image_case("first_pool_3_2", (1, 8, 6), *wide, wrt_inputs=False, kinks=True)
    yield Case("first_stems", Stems, (1, 4, 4), 2, 4, 3, loss="ce", wrt_inputs=False)


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
    examples=(
        Example("rows", partial(nn.BatchNorm1d, 5), ((5,),)),
        Example("image", partial(nn.BatchNorm2d, 3), ((3, 4, 5),)),
        Example("plain, of a signal", partial(nn.BatchNorm1d, 3, affine=False), ((3, 5),)),
        Example("running statistics", partial(frozen, partial(nn.BatchNorm2d, 3)), ((3, 4, 3),)),
        Example(
            "running statistics, plain", partial(frozen, partial(nn.BatchNorm1d, 5, affine=False)), ((5,),)
        ),
        Example("relu and max-pool after it", partial(pooled, partial(nn.BatchNorm2d, 3)), ((3, 4, 5),)),
        Example("between tanh", partial(tanh_around, partial(nn.BatchNorm1d, 5)), ((5,),)),
    ),
    cases=cases,
)
