"""Checks of the arguments of models and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence


def positive(model: str, argument: str, value: object) -> int:
    """`value`, if it is a positive int.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{model}: `{argument}` must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{model}: `{argument}` must be positive, got {value}")
    return value


def positives(
    model: str, argument: str, values: object, what: str, least: int, most: int | None = None
) -> tuple[int, ...]:
    """`values`, if they are `least` to `most` positive ints, which `what` says in words.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{model}: `{argument}` must be a sequence of ints, {what}, got {values!r}")
    if len(values) < least or (most is not None and len(values) > most):
        raise ValueError(f"{model}: `{argument}` must be {what}, got {tuple(values)}")
    return tuple(positive(model, argument, value) for value in values)


def finite_number(model: str, argument: str, value: object) -> float:
    """`value`, if it is a finite number.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{model}: `{argument}` must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{model}: `{argument}` must be finite, got {value}")
    return float(value)


def positive_number(model: str, argument: str, value: object) -> float:
    """`value`, if it is a finite positive number.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{model}: `{argument}` must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{model}: `{argument}` must be finite and positive, got {value}")
    return value
