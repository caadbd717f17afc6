"""Gradients that refuse to be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refused(gradients: Sequence[Tensor], by: Sequence[Tensor]) -> list[Tensor]:
    """`gradients`, whose derivatives by anything that made them raise.

    Args:
        gradients: without a graph.
        by: what they are the gradients by. They are put in front of what refuses: without them
            `torch.autograd.grad` would find no way there, and answer with None or zeros instead of
            asking.
    """
    return list(_Refuse.apply(len(by), *by, *[gradient.detach().requires_grad_() for gradient in gradients]))


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("fastmeta: these gradients are once differentiable, and were differentiated again")
