"""Backward passes that refuse to be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., "tuple[Tensor | None, ...]"]


def once_differentiable(backward: Backward) -> Backward:
    """`backward`, whose results raise when they are differentiated.

    PyTorch's own decorator lets a second derivative through as zero where the incoming gradient has no graph, as
    that of a plain loss; and it costs several microseconds a call.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        given = [result for result in results if result is not None]
        if not given:
            return results
        refusing = iter(_Refuse.apply(*[result.detach().requires_grad_() for result in given]))
        return tuple(None if result is None else next(refusing) for result in results)

    return once


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("fastmeta: gradients are once differentiable, and were differentiated again")
