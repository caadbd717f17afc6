"""Stochastic gradient descent with momentum, Nesterov's too, and weight decay; and its adjoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.models.check import flag
from fastmeta.update_rules.rule import ANY, Named, Number, Range, UpdateRule, on


class SGD(UpdateRule):
    """The inner step of `torch.optim.SGD`.

    With momentum mu, dampening tau, weight decay omega, learning rate alpha and the (clipped)
    gradient g = grad L(theta):

        d      = g + omega theta
        m'     = mu m + (1 - tau) d              m' = d at the first step
        theta' = theta - alpha m'                Nesterov: theta - alpha (d + mu m')

    Without dampening, Nesterov, clipping and learned numbers the adjoint is written out. It goes
    back one step. It is given lambda = dJ/dtheta' and mbar, the part of dJ/dm' that comes from
    later steps (0 after the last one), and returns the same for the step before. H is the Hessian
    of L at theta:

        v           = mbar - alpha lambda
        dJ/dalpha   = -lambda m'                 with the lambda of this line, before the next
        dJ/dtheta   = lambda + H v + omega v
        dJ/dm       = mu v

    Any other input x of g (support inputs, float targets, example weights) gets d<g, v>/dx: v
    carries the minus sign. First order leaves out H v and d<g, v>/dx, nothing else.

    Args:
        momentum: mu, at least 0.
        weight_decay: omega, at least 0.
        dampening: tau.
        nesterov: Nesterov's momentum; needs a momentum, and no dampening.
        clip_value: largest absolute value of an element of the gradient, as
            `torch.nn.utils.clip_grad_value_`; None: any.
        clip_norm: largest norm of the gradient of one task over all adapted parameters, as
            `torch.nn.utils.clip_grad_norm_`; None: any.

    Each number may be a tensor () or [K], one for each inner step, and is learned then.

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is negative or not finite, a tensor of another shape.
    """

    kind = "sgd"
    ranges: ClassVar[dict[str, Range]] = {"dampening": ANY}
    __slots__ = ("_written",)

    _written: bool

    def __init__(
        self,
        momentum: Number = 0.0,
        weight_decay: Number = 0.0,
        *,
        dampening: Number = 0.0,
        nesterov: bool = False,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        numbers: dict[str, Number | None] = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
        }
        given: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
        if not isinstance(dampening, (int, float)) or dampening:
            given["dampening"] = dampening
        if flag("SGD", "nesterov", nesterov):
            given["nesterov"] = True
        given |= {name: numbers[name] for name in ("clip_value", "clip_norm") if numbers[name] is not None}
        self._set(given, numbers, nesterov=nesterov)
        if nesterov and (not self.has("momentum") or self.has("dampening")):
            raise ValueError("SGD: `nesterov` needs a momentum and no dampening")

    def _fill(self, *made: Any) -> None:
        super()._fill(*made)
        others = ("dampening", "clip_value", "clip_norm")
        plain = not self.learned and not self.options["nesterov"] and not any(map(self.has, others))
        object.__setattr__(self, "_written", plain)

    @property
    def written(self) -> bool:
        """As `UpdateRule.written`: whether the adjoint below is that of this rule."""
        return self._written

    @property
    def state(self) -> tuple[str, ...]:
        """The momentum buffer, where there is momentum."""
        return ("momentum_buffer",) if self.has("momentum") else ()

    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """As `UpdateRule.move`."""
        if on(hyper["weight_decay"]):
            g = g + hyper["weight_decay"] * theta
        if not self.state:
            return theta - rate * g, {}
        m = g
        if k:
            m = hyper["momentum"] * state["momentum_buffer"] + (1 - hyper["dampening"]) * g
        direction = g + hyper["momentum"] * m if self.options["nesterov"] else m
        return theta - rate * direction, {"momentum_buffer": m}

    def update(
        self, theta: Tensor, g: Tensor, m: Tensor | None, alpha: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """One step of one parameter, of a rule that is `written`.

        Args:
            theta, g, m: [*shape], or [T, *shape] for all tasks at once; m is None before the first
                step.
            alpha: the learning rate, broadcasts to theta.

        Returns:
            (theta', m'): new tensors, except that m' is g itself where nothing is added to g.
        """
        if self.weight_decay:
            g = g + self.weight_decay * theta
        if self.momentum and m is not None:
            g = g + self.momentum * m
        return theta - alpha * g, g

    def direction(self, lam: Tensor, mbar: Tensor | None, alpha: Tensor | float) -> Tensor:
        """The direction v = mbar - alpha lambda of the Hessian-vector product; None is zero."""
        v = -alpha * lam
        return v if mbar is None else mbar + v

    def update_adjoint(self, lam: Tensor, hv: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(dJ/dtheta, dJ/dm) of one step.

        Args:
            lam: dJ/dtheta', as `direction` took it.
            hv: H v; None leaves it out (first order).
            v: what `direction` returned.

        Returns:
            (lambda + H v + omega v, mu v), the second None where mu is zero.
        """
        if hv is not None:
            lam = lam + hv
        if self.weight_decay:
            lam = lam + self.weight_decay * v
        return lam, self.momentum * v if self.momentum else None
