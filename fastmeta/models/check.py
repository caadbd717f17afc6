"""Checks of the models' arguments."""

from __future__ import annotations


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
