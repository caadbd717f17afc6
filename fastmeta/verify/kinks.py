"""How near a computation comes to the kinks of its functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmeta.losses import Loss

_KINKED = ("l1", "smooth_l1", "huber")
_AT_ZERO = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_"})


class KinkDistance(TorchFunctionMode):
    """Records, while active, the smallest distance of any argument of a kinked function from its kink.

    For ReLU and its relatives that is the smallest |pre-activation|. The losses l1, huber and smooth_l1 are known
    by their `abs` (of output - target), which no network of the case list uses.

    Args:
        losses: those of the problem.
    """

    def __init__(self, *losses: Loss | None) -> None:
        super().__init__()
        self.smallest = math.inf
        self._kinks = {0.0 if loss.kind == "l1" else loss.beta for loss in losses if loss and loss.kind in _KINKED}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _AT_ZERO:
            self._record(args[0], 0.0)
        elif name == "abs":
            for kink in self._kinks:
                self._record(args[0], kink)
        return func(*args, **(kwargs or {}))

    def _record(self, argument: Tensor, kink: float) -> None:
        if argument.numel():
            distance = (argument.detach().abs() - kink).abs().min()
            self.smallest = min(self.smallest, float(distance))
