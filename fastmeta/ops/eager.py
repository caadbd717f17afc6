"""Operators are not for torch.compile to look into."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, at which torch.compile breaks its graph; otherwise called straight away.

    `torch.compiler.disable` alone costs every eager call several microseconds.
    """
    disabled = torch.compiler.disable(function)

    @wraps(function)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return dispatch
