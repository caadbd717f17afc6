"""Adagrad: the gradient over the root of the sum of its squares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.update_rules.rule import Named, Number, State, UpdateRule, on


class Adagrad(UpdateRule):
    """The inner step of `torch.optim.Adagrad`.

    With learning rate alpha, its decay eta, weight decay omega and the (clipped) gradient g, at
    inner step k = 0, 1, ...:

        d      = g + omega theta
        s'     = s + d^2                         s = initial_accumulator_value before the first step
        theta' = theta - alpha / (1 + k eta) d / (sqrt(s' + eps_root) + eps)

    Args:
        lr_decay: eta, at least 0.
        weight_decay: omega, at least 0.
        initial_accumulator_value: at least 0; a plain number.
        eps: added to the root.
        eps_root: added inside the root: see `fastmeta.Adam`; PyTorch has none.
        clip_value, clip_norm: as in `fastmeta.SGD`.

    Each other number may be a tensor () or [K], one for each inner step, and is learned then.

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is out of range, a tensor of another shape.

    Source: Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization" (2011).
    """

    kind = "adagrad"
    __slots__ = ()

    def __init__(
        self,
        lr_decay: Number = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: Number = 1e-10,
        eps_root: Number = 0.0,
        *,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        if isinstance(initial_accumulator_value, Tensor):
            raise TypeError("Adagrad: `initial_accumulator_value` must be a number, got Tensor")
        numbers = {
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "eps_root": eps_root,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
        }
        self._set(dict(numbers), numbers)

    @property
    def state(self) -> tuple[str, ...]:
        """The sum of squares."""
        return ("sum",)

    def init(self, theta: Named) -> State:
        """As `UpdateRule.init`, from `initial_accumulator_value`."""
        start = self.numbers["initial_accumulator_value"]
        return {"sum": {name: torch.full_like(value, start) for name, value in theta.items()}}

    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """As `UpdateRule.move`."""
        if on(hyper["weight_decay"]):
            g = g + hyper["weight_decay"] * theta
        total = state["sum"] + g * g
        root = (total + hyper["eps_root"] if on(hyper["eps_root"]) else total).sqrt()
        rate = rate / (1 + k * hyper["lr_decay"])
        return theta - rate * g / (root + hyper["eps"]), {"sum": total}
