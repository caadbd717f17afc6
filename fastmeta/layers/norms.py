"""What the norm layers have in common: their input, their affine parameters, and their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from fastmeta.capture.build import Parameter, Refused, Value, batched, described, integer
from fastmeta.cases.case import Case
from fastmeta.cases.convolutional import conv, image_case
from fastmeta.cases.networks import mlp


def normalised(input: Any) -> Value:
    """The input, if it is a traced tensor with something to normalise."""
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")
    if not input.shape:
        raise Refused("it takes [N, C, ...], got [N]")
    return input


def last_dimensions(input: Any, normalized_shape: Any) -> tuple[int, ...]:
    """The last dimensions of an input that a norm goes over, as PyTorch is told them."""
    shape = normalised(input).shape
    given = normalized_shape if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    found = tuple(map(integer, given))
    if not found or shape[-len(found) :] != found:
        raise Refused(f"it takes [N, ..., {', '.join(map(str, found))}], got {batched(shape)}")
    return found


def affine(weight: Any, bias: Any, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The names of weight and bias, None where there is none."""
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, Parameter):
            raise Refused(f"the {what} must be a parameter, got {described(value)}")
        if value is not None and value.shape != tuple(shape):
            raise Refused(f"the {what} `{value.name}` must be {list(shape)}, got {list(value.shape)}")
    return tuple(value.name if value is not None else None for value in (weight, bias))


def pooled(make: Callable[[], nn.BatchNorm2d | nn.GroupNorm]) -> nn.Module:
    """A norm of images, a relu, and a max-pool over windows side by side; a bias of one, so that
    hardly a window is zero everywhere, where its maximum has a kink."""
    norm = make()
    nn.init.ones_(norm.bias)
    return nn.Sequential(norm, nn.ReLU(), nn.MaxPool2d(2))


def row_cases(norm: str, widths: Sequence[int]) -> Iterator[Case]:
    """Between linear layers; `norm` is a name of `fastmeta.cases.networks.NORMS`."""
    net = partial(Case, f"{norm}_mlp", partial(mlp, widths, "tanh", norm=norm), (3,), loss="ce")
    yield net()
    yield net(memory="recompute", steps=3, rates="element_step_task", momentum=0.9, weight_decay=0.05)
    yield net(order="first", step_weights=True, weighted="sqt", per_task="some")
    yield net(operator="inner_sgd", rates="head", per_step=True)


def image_cases(name: str, norm: Callable[[], nn.Module]) -> Iterator[Case]:
    """Between convolutions, of an image [N, 6, 4, 9]."""
    body = (conv(2, 6, 3, padding=1), norm, nn.Tanh, conv(6, 3, 3), nn.Tanh)
    net = partial(image_case, name, (2, 4, 9), *body)
    yield net()
    yield net(rates="element", momentum=0.5, memory="recompute", per_task="some")


def relu_cases(name: str, norm: Callable[[], nn.Module]) -> Iterator[Case]:
    """With a relu after it, of images [N, 6, ...]; and with a max-pool over windows side by side
    after it, with a relu between or none, which the engine runs as one."""
    body = (conv(2, 6, 3, padding=1), norm, nn.ReLU, conv(6, 3, 3))
    net = partial(image_case, f"{name}_relu", (2, 6, 5), *body, kinks=True)
    yield net()
    yield net(memory="recompute", rates="element")
    yield net(shots=3, steps=1, per_task="some", step_weights=True)
    for tail, more in (("relu_pool", (nn.ReLU,)), ("pool", ())):
        pooled = (conv(2, 6, 3, padding=1), norm, *more, partial(nn.MaxPool2d, 2), conv(6, 4, 2), nn.Tanh)
        net = partial(image_case, f"{name}_{tail}", (2, 7, 6), *pooled, kinks=True)
        yield net()
        yield net(memory="recompute", rates="element", steps=3)
        yield net(shots=3, steps=1, per_task="some", step_weights=True)
