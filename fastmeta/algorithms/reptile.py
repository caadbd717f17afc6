"""Reptile: a first-order algorithm without query sets, whose gradient is how far the inner loop
went."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.algorithms.inner_loop import InnerLoop, check_no_gradients
from fastmeta.algorithms.meta_loss import attached
from fastmeta.inputs import Tree
from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import check_choice, check_diverged, left_out
from fastmeta.ops.eager import eager
from fastmeta.ops.options import Adapt, argument, check_flag
from fastmeta.ops.rates import Rates
from fastmeta.update_rules import UpdateRule


class ReptileLoss(NamedTuple):
    """What a `Reptile` returns. Only `loss` is differentiable: a loss built from the others raises
    on backward."""

    loss: Tensor  # (): half the squared distance to the adapted parameters, mean over tasks
    task_losses: Tensor  # [T]
    adapted: dict[str, Tensor]  # name -> [T, *shape], for `predict`


class Reptile(InnerLoop):
    """Reptile: moves the initialisation towards the parameters that an inner loop finds for each
    task.

        reptile = fm.Reptile(net, loss="mse", inner_lr=0.02, inner_steps=5)
        opt = torch.optim.SGD(reptile.parameters(), lr=0.1)
        reptile(support_x, support_y).loss.backward()  # .grad is mean_T(theta - theta_K)
        opt.step()  # theta + 0.1 mean_T(theta_K - theta)

    Args:
        net: the network; its parameters are the meta-parameters.
        loss, inner_lr, inner_steps, adapt, weight_norm, update_rule, batch_stats, backend: as in
            `fastmeta.MAML`.
        normalise: divide the gradient by inner_lr * inner_steps, which gives it the size of a
            loss's gradient; with inner_steps=1 it is that of the mean support loss. `inner_lr` must
            then be a number other than zero.
        on_divergence: as in `fastmeta.MAML`, of tasks whose adapted parameters are not finite,
            looked for on any device where gradients are on.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms" (2018), algorithms 1
        and 2; the loss
    whose gradient this is: section 5.2.
    """

    who = "Reptile"

    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        inner_lr: Rates,
        inner_steps: int,
        normalise: bool = False,
        adapt: Adapt = "all",
        weight_norm: str = "count",
        update_rule: UpdateRule | None = None,
        batch_stats: str = "task",
        backend: str = "auto",
        on_divergence: str = "raise",
    ) -> None:
        check_flag(self.who, "normalise", normalise)
        check_choice(self.who, on_divergence)
        super().__init__(
            net,
            loss=loss,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            adapt=adapt,
            weight_norm=weight_norm,
            update_rule=update_rule,
            batch_stats=batch_stats,
            backend=backend,
        )
        self.normalise = normalise
        self.on_divergence = on_divergence
        _scale(self)

    @eager
    def forward(
        self,
        support_x: Tree,
        support_y: Tree,
        task_weights: Tensor | None = None,
        support_weights: Tensor | None = None,
        support_per_step: bool = False,
    ) -> ReptileLoss:
        """The inner loop, and how far it went.

        Args:
            support_x: [T, N, *in]; [T, K, N, *in] with `support_per_step`; or a tree of tensors,
                see `fastmeta.Inputs`.
            support_y: as the loss wants it.
            task_weights: [T]; the loss is sum(task_weights * task_losses) / T.
            support_weights: [T, N] or [T, K, N].
            support_per_step: there is a minibatch of its own for every inner step.

        Returns:
            `ReptileLoss`.

        Derivatives: `loss` is once differentiable in the parameters, at constant adapted
            parameters: `backward` puts mean_T(theta - theta_K) into `.grad`. What a loss reads gets
            none, and differentiating again raises.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it. Nothing was
                modified.
            FloatingPointError: tasks diverged, where gradients are on; without them their losses
                are not finite.
            BackendUnavailable: the backend named cannot run this call.
        """
        tensors = Tensors(support_x, support_y, support_weights, task_weights=task_weights)
        check_no_gradients(self.who, tensors)
        scale, own = _scale(self), self._machinery
        adapted = own.adapted(self.who, tensors, self.inner_steps, support_per_step)
        params = own.params()
        with torch.no_grad():
            way = {name: scale * (value - adapted[name]) for name, value in params.items()}  # [T, *shape]
            squares = [d.reshape(len(d), -1).square().sum(1) for d in way.values()]
            task_losses = torch.stack(squares).sum(0) / (2 * scale)
            weights = torch.ones_like(task_losses) if task_weights is None else task_weights
            counted, losses = len(weights), task_losses
            gone = left_out(self.who, self.on_divergence, adapted.values(), task_weights)
            if gone:
                counted, losses = gone.counted, gone.without(losses)
                way = {name: gone.without(d) for name, d in way.items()}
            weights = weights / counted
            loss = torch.dot(weights, losses)
        if torch.is_grad_enabled() and any(value.requires_grad for value in params.values()):
            if self.on_divergence == "raise":
                check_diverged(self.who, "adapted parameters are", adapted.values(), task_weights)
            loss = attached(loss, {name: torch.tensordot(weights, d, 1) for name, d in way.items()}, params)
        return ReptileLoss(loss, task_losses, adapted)


def _scale(reptile: Reptile) -> float:
    """1, or 1 / (inner_lr * inner_steps)."""
    if not reptile.normalise:
        return 1.0
    who, rate, steps = reptile.who, reptile.inner_lrs.number, reptile.inner_steps
    if not rate or not steps:
        given = steps if rate else "zero" if rate is not None else "tensors"
        which = argument(who, "steps" if rate else "lr")
        raise ValueError(f"{which} must be a number other than zero with `normalise`, got {given}")
    return 1 / (rate * steps)
