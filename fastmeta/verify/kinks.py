"""How near a computation comes to the kinks of its functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmeta.capture.build import Builder, Functions, Methods, Refused, Rule
from fastmeta.layers.functions import FUNCTIONS, tables
from fastmeta.layers.registry import KINDS, kind_of
from fastmeta.losses import Loss

_KINKED = ("l1", "smooth_l1", "huber")


class KinkDistance(TorchFunctionMode):
    """Records, while active, the smallest distance of any argument of a kinked function from its
    kink.

    For ReLU and its relatives that is the smallest |pre-activation|, for max-pooling the smallest
    distance between the two largest values of a window: what the records of the layer kinds say.
    The losses l1, huber and smooth_l1 are known by their `abs` (of output - target), which no
    network of the case list uses.

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
        kwargs = kwargs or {}
        if func in _RULES:
            self._record(_distance(func, args, kwargs))
        elif self._kinks and getattr(func, "__name__", "") == "abs":
            for kink in self._kinks:
                self._record((args[0].detach().abs() - kink).abs())
        return func(*args, **kwargs)

    def _record(self, distances: Tensor) -> None:
        if distances.numel():
            self.smallest = min(self.smallest, float(distances.min()))


def _calls(functions: Functions, methods: Methods) -> dict[Callable[..., Any], Rule]:
    """The same with methods of tensors as the functions that a mode sees."""
    return functions | {getattr(Tensor, name): rule for name, rule in methods.items()}


def _rules() -> dict[Callable[..., Any], Rule]:
    """Every function of torch with kinks, and how it is captured."""
    found: dict[Callable[..., Any], Rule] = {}
    for kind in KINDS.values():
        if kind.kinks is not None and kind.family != "pointwise":
            found |= _calls(kind.functions, kind.methods)
    for row in FUNCTIONS.values():
        if row.kinks:
            found |= _calls(*tables(row)[1:])
    return found


_RULES = _rules()


def _distance(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the record says of the layer that a call is captured as."""
    build, tensors = Builder((), {}, {}, torch.float64), {}

    def traced(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        value = build.layer("", (build.input,), tuple(given.shape[1:]))
        tensors[value.index] = given.detach()
        return value

    try:
        _RULES[func](build, *map(traced, args), **{name: traced(given) for name, given in kwargs.items()})
    except Refused as reason:
        raise ValueError(f"the kinks of {getattr(func, '__name__', func)} are not known: {reason}") from None
    layer = build.layers[-1]
    kinks = kind_of(layer).kinks
    if kinks is None:
        raise ValueError(f"the layer kind {layer.kind} has no kinks")
    return kinks(layer, *(tensors[value] for value in layer.inputs))
