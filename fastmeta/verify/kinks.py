"""How near a computation comes to the kinks of its functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastmeta.losses import Loss

_MAX_POOLS = (F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d)
_KINKED = ("l1", "smooth_l1", "huber")
_AT_ZERO = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_"})


class KinkDistance(TorchFunctionMode):
    """Records, while active, the smallest distance of any argument of a kinked function from its
    kink.

    For ReLU and its relatives that is the smallest |pre-activation|, for max-pooling the smallest
    distance between the two largest values of a window. The losses l1, huber and smooth_l1 are
    known by their `abs` (of output - target), which no network of the case list uses.

    Args:
        losses: those of the problem.
    """

    def __init__(self, *losses: Loss | None) -> None:
        super().__init__()
        self.smallest = math.inf
        self._kinks = {
            0.0 if loss.kind == "l1" else loss.beta for loss in losses if loss and loss.kind in _KINKED
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _AT_ZERO:
            self._record(args[0], 0.0)
        elif func in _MAX_POOLS:
            self._record(_gaps(*args, **(kwargs or {})), 0.0)
        elif name == "abs":
            for kink in self._kinks:
                self._record(args[0], kink)
        return func(*args, **(kwargs or {}))

    def _record(self, argument: Tensor, kink: float) -> None:
        if argument.numel():
            distance = (argument.detach().abs() - kink).abs().min()
            self.smallest = min(self.smallest, float(distance))


def _gaps(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any) -> Tensor:
    """The distance of the two largest values of every window of a max-pool that rounds the number
    of windows down."""
    dimensions = x.dim() - 2
    kernel, step, pad = (
        tuple(size) if isinstance(size, (tuple, list)) else (size,) * dimensions
        for size in (kernel_size, stride or kernel_size, padding)
    )
    windows = F.pad(x.detach(), [p for size in reversed(pad) for p in (size, size)], value=-math.inf)
    for at, (size, by) in enumerate(zip(kernel, step, strict=True)):
        windows = windows.unfold(2 + at, size, by)
    values = windows.flatten(2 + dimensions).topk(2, dim=-1).values
    return values[..., 0] - values[..., 1]
