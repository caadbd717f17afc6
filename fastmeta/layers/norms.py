"""What the norm layers have in common: their input and their affine parameters."""

from __future__ import annotations

from typing import Any

from fastmeta.capture.build import Parameter, Refused, Value, described


def normalised(input: Any) -> Value:
    """The input, if it is a traced tensor with something to normalise."""
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")
    if not input.shape:
        raise Refused("it takes [N, C, ...], got [N]")
    return input


def affine(weight: Any, bias: Any, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The names of weight and bias, None where there is none."""
    for what, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, Parameter):
            raise Refused(f"the {what} must be a parameter, got {described(value)}")
        if value is not None and value.shape != tuple(shape):
            raise Refused(f"the {what} `{value.name}` must be {list(shape)}, got {list(value.shape)}")
    return tuple(value.name if value is not None else None for value in (weight, bias))
