"""RMSProp: the gradient over the root of its running mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fastmeta.models.check import flag
from fastmeta.update_rules.rule import SHARE, Named, Number, Range, UpdateRule, on


class RMSProp(UpdateRule):
    """The inner step of `torch.optim.RMSprop`.

    With smoothing a, momentum mu, weight decay omega, learning rate alpha and the (clipped)
    gradient g:

        d      = g + omega theta
        s'     = a s + (1 - a) d^2
        c'     = a c + (1 - a) d                 centered; else 0
        u      = d / (sqrt(s' - c'^2 + eps_root) + eps)
        b'     = mu b + u                        with momentum; else u
        theta' = theta - alpha b'

    Args:
        alpha: a, from 0 to below 1; what `torch.optim.RMSprop` calls so, no learning rate.
        eps: added to the root.
        eps_root: added inside the root: see `fastmeta.Adam`; PyTorch has none.
        weight_decay: omega, at least 0.
        momentum: mu, at least 0.
        centered: by the running variance in place of the mean square.
        clip_value, clip_norm: as in `fastmeta.SGD`.

    Each number may be a tensor () or [K], one for each inner step, and is learned then.

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is out of range, a tensor of another shape.

    Source: Hinton, "Neural Networks for Machine Learning", lecture 6; centered: Graves, "Generating
        Sequences With Recurrent Neural Networks" (2013), section 4.2.
    """

    kind = "rmsprop"
    ranges: ClassVar[dict[str, Range]] = {"alpha": SHARE}
    __slots__ = ()

    def __init__(
        self,
        alpha: Number = 0.99,
        eps: Number = 1e-8,
        eps_root: Number = 0.0,
        weight_decay: Number = 0.0,
        momentum: Number = 0.0,
        *,
        centered: bool = False,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        numbers = {
            "alpha": alpha,
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
        }
        flag("RMSProp", "centered", centered)
        self._set({**numbers, "centered": centered}, numbers, centered=centered)

    @property
    def state(self) -> tuple[str, ...]:
        """The running mean square, the running mean if centered, the buffer of momentum."""
        centered = ("grad_avg",) if self.options["centered"] else ()
        return ("square_avg", *centered, *(("momentum_buffer",) if self.has("momentum") else ()))

    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """As `UpdateRule.move`."""
        if on(hyper["weight_decay"]):
            g = g + hyper["weight_decay"] * theta
        a = hyper["alpha"]
        after = {"square_avg": a * state["square_avg"] + (1 - a) * g * g}
        square = after["square_avg"]
        if self.options["centered"]:
            after["grad_avg"] = a * state["grad_avg"] + (1 - a) * g
            square = square - after["grad_avg"] * after["grad_avg"]
        if on(hyper["eps_root"]):
            square = square + hyper["eps_root"]
        u = g / (square.sqrt() + hyper["eps"])
        if "momentum_buffer" in state:
            u = after["momentum_buffer"] = hyper["momentum"] * state["momentum_buffer"] + u
        return theta - rate * u, after
