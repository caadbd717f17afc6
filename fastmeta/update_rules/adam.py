"""Adam, and AdamW, whose weight decay is apart from the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from torch import Tensor

from fastmeta.update_rules.rule import Named, Number, UpdateRule, on, pair


class Adam(UpdateRule):
    """The inner step of `torch.optim.Adam`.

    With betas b1 and b2, learning rate alpha, weight decay omega and the (clipped) gradient g, at
    inner step k = 0, 1, ...:

        d      = g + omega theta
        m'     = b1 m + (1 - b1) d
        v'     = b2 v + (1 - b2) d^2
        theta' = theta - alpha (m' / (1 - b1^(k+1))) / (sqrt(v' / (1 - b2^(k+1)) + eps_root) + eps)

    An element whose gradient was zero at every step has the derivative of sqrt at zero, which is
    infinite: gradients through it are NaN, as they are through `torch.optim.Adam`, unless
    `eps_root` is greater than zero.

    Args:
        betas: (b1, b2), each from 0 to below 1.
        eps: added to the root.
        eps_root: added inside the root, as in optax and TorchOpt; PyTorch has none.
        weight_decay: omega, at least 0.
        clip_value, clip_norm: as in `fastmeta.SGD`.

    Each number may be a tensor () or [K], one for each inner step, and is learned then; those of
    `betas` are called "beta1" and "beta2".

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is out of range, a tensor of another shape.

    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization" (2015), algorithm 1.
    """

    kind = "adam"
    __slots__ = ()

    def __init__(
        self,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        eps_root: Number = 0.0,
        weight_decay: Number = 0.0,
        *,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        rest = {
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
        }
        beta1, beta2 = pair(self.name, "betas", betas)
        self._set({"betas": tuple(betas), **rest}, {"beta1": beta1, "beta2": beta2, **rest})

    @property
    def state(self) -> tuple[str, ...]:
        """Running means of the gradient and of its square."""
        return ("exp_avg", "exp_avg_sq")

    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """As `UpdateRule.move`."""
        if on(hyper["weight_decay"]):
            theta, g = self._decayed(theta, g, rate, hyper["weight_decay"])
        b1, b2 = hyper["beta1"], hyper["beta2"]
        m = b1 * state["exp_avg"] + (1 - b1) * g
        v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        c1, c2 = 1 - b1 ** (k + 1), 1 - b2 ** (k + 1)
        if on(hyper["eps_root"]):
            root = (v / c2 + hyper["eps_root"]).sqrt()
        else:
            root = v.sqrt() / (c2.sqrt() if isinstance(c2, Tensor) else sqrt(c2))
        return theta - rate / c1 * m / (root + hyper["eps"]), {"exp_avg": m, "exp_avg_sq": v}

    def _decayed(self, theta: Tensor, g: Tensor, rate: Tensor, decay: Number) -> tuple[Tensor, Tensor]:
        """(theta, g) with weight decay."""
        return theta, g + decay * theta


class AdamW(Adam):
    """The inner step of `torch.optim.AdamW`: as `fastmeta.Adam`, with d = g and weight decay apart,

        theta' = (1 - alpha omega) theta - alpha ...

    Args:
        betas, eps, eps_root, clip_value, clip_norm: as in `fastmeta.Adam`.
        weight_decay: omega, at least 0.

    Raises:
        TypeError: an argument is not a number or a tensor.
        ValueError: a number is out of range, a tensor of another shape.

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
    """

    kind = "adamw"
    __slots__ = ()

    def __init__(
        self,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        eps_root: Number = 0.0,
        weight_decay: Number = 1e-2,
        *,
        clip_value: Number | None = None,
        clip_norm: Number | None = None,
    ) -> None:
        super().__init__(betas, eps, eps_root, weight_decay, clip_value=clip_value, clip_norm=clip_norm)

    def _decayed(self, theta: Tensor, g: Tensor, rate: Tensor, decay: Number) -> tuple[Tensor, Tensor]:
        return theta * (1 - rate * decay), g
