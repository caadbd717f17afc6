"""How near a computation comes to the kinks of its functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Function name -> positional index or keyword of the constant at which |argument| has its kink.
_AT_ZERO = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_"})
_LOSSES = {"l1_loss": ("", 0.0), "smooth_l1_loss": ("beta", 1.0), "huber_loss": ("delta", 1.0)}


class KinkDistance(TorchFunctionMode):
    """Records, while active, the smallest distance of any argument of a kinked function from its kink.

    For ReLU and its relatives that is the smallest |pre-activation|, for the losses the smallest distance of
    |output - target| from where the second derivative (l1: the first) jumps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.smallest = math.inf

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _AT_ZERO:
            self._record(args[0].detach().abs())
        elif name in _LOSSES:
            keyword, default = _LOSSES[name]
            kink = kwargs.get(keyword, default)
            self._record(((args[0] - args[1]).detach().abs() - kink).abs())
        return func(*args, **kwargs)

    def _record(self, distance: Tensor) -> None:
        if distance.numel():
            with torch.no_grad():
                self.smallest = min(self.smallest, float(distance.min()))
