"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastmeta.update_rules.rule import Named, Number, UpdateRule, on, pair


class Lion(UpdateRule):
    """The inner step of Lion.

    With betas b1 and b2, weight decay omega, learning rate alpha and the (clipped) gradient g:

        theta' = theta - alpha (sign(b1 m + (1 - b1) g) + omega theta)
        m'     = b2 m + (1 - b2) g

    The derivative of a sign is zero: no gradient passes through g, and `betas` get zeros.

    Args:
        betas: (b1, b2), each from 0 to below 1.
        weight_decay: omega, at least 0.
        clip_value, clip_norm: as in `fastmeta.SGD`.

    Each number may be a tensor () or [K], one for each inner step, and is learned then; those of
    `betas` are called "beta1" and "beta2".

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is out of range, a tensor of another shape.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2.
    """

    kind = "lion"
    __slots__ = ()

    def __init__(
        self,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        *,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        rest = {"weight_decay": weight_decay, "clip_value": clip_value, "clip_norm": clip_norm}
        beta1, beta2 = pair("Lion", "betas", betas)
        self._set({"betas": tuple(betas), **rest}, {"beta1": beta1, "beta2": beta2, **rest})

    @property
    def state(self) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """As `UpdateRule.move`."""
        m, b1, b2 = state["exp_avg"], hyper["beta1"], hyper["beta2"]
        direction = (b1 * m + (1 - b1) * g).sign()
        if on(hyper["weight_decay"]):
            direction = direction + hyper["weight_decay"] * theta
        return theta - rate * direction, {"exp_avg": b2 * m + (1 - b2) * g}
