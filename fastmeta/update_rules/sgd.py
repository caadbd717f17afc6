"""Stochastic gradient descent with momentum and weight decay, and its adjoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmeta.models.check import is_finite


@dataclass(frozen=True, slots=True)
class SGD:
    """The inner step of `torch.optim.SGD` (dampening 0, no Nesterov).

    With momentum mu, weight decay omega, learning rate alpha and g = grad L(theta):

        m'     = mu m + g + omega theta          m = 0 before the first step
        theta' = theta - alpha m'

    The adjoint goes back one step. It is given lambda = dJ/dtheta' and mbar, the part of dJ/dm'
    that comes from later steps (0 after the last one), and returns the same for the step before. H
    is the Hessian of L at theta:

        v           = mbar - alpha lambda
        dJ/dalpha   = -lambda m'                 with the lambda of this line, before the next
        dJ/dtheta   = lambda + H v + omega v
        dJ/dm       = mu v

    Any other input x of g (support inputs, float targets, example weights) gets d<g, v>/dx: v
    carries the minus sign. First order leaves out H v and d<g, v>/dx, nothing else.

    Args:
        momentum: mu, finite, at least 0.
        weight_decay: omega, finite, at least 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is negative or not finite.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise TypeError(f"SGD: `{name}` must be a number, got {type(value).__name__}")
            if not (is_finite(value) and value >= 0):
                raise ValueError(f"SGD: `{name}` must be finite and at least 0, got {value}")
            # equal rules have equal fields: 1 and 1.0 are one cache key
            object.__setattr__(self, name, float(value))

    def update(
        self, theta: Tensor, g: Tensor, m: Tensor | None, alpha: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """One step of one parameter.

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
