"""Checks of the arguments of models and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Counts and sizes are at most this: nothing larger ends in a lifetime or fits into memory.
MOST = 2**31 - 1


def positive(model: str, argument: str, value: object) -> int:
    """`value`, if it is a positive int.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(f"{model}: `{argument}` must be positive, got {value}")
    return check_count(f"{model}: `{argument}`", value, 1)


def check_count(what: str, value: object, least: int, sort: str = "an int") -> int:
    """`value`, if it is an int from `least` to `MOST`.

    Raises:
        TypeError, ValueError: otherwise; the message begins with `what`, and says that it must be
            `sort`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be {sort}, got {value!r}")
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")
    if value > MOST:
        raise ValueError(f"{what} must be at most {MOST}, got {value}")
    return value


def flag(model: str, argument: str, value: object) -> bool:
    """`value`, if it is True or False.

    Raises:
        TypeError: otherwise; the message names the argument.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{model}: `{argument}` must be True or False, got {value!r}")
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
    if not is_finite(value):
        raise ValueError(f"{model}: `{argument}` must be finite, got {value}")
    return float(value)


def positive_number(model: str, argument: str, value: object) -> float:
    """`value`, if it is a finite positive number.

    Raises:
        TypeError, ValueError: otherwise; the message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{model}: `{argument}` must be a number, got {value!r}")
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{model}: `{argument}` must be finite and positive, got {value}")
    return float(value)


def is_finite(value: float) -> bool:
    """Whether `value` is finite as a float; an int of any size may come."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
