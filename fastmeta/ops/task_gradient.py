"""The gradient of every task's loss, differentiable: what update rules of one's own are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.ops.adapted import adapted_names
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors
from fastmeta.ops.eager import eager
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt, Options, argument, names_of

# A power of two; see `gradient`.
_SCALE = 2.0**32


@eager
def task_gradient(
    net: nn.Module,
    params: Mapping[str, Tensor],
    x: Tree,
    y: Tree,
    *,
    loss: object,
    adapt: Adapt = "all",
    weights: Tensor | None = None,
    weight_norm: str = "count",
    batch_stats: str = "task",
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The gradient of every task's loss by its own parameters, which autograd can differentiate
    once more.

        theta = dict(net.named_parameters())
        for _ in range(5):  # an inner loop of one's own, exact second order
            g = fm.task_gradient(net, theta, x, y, loss="mse")
            theta = {name: value - rule(name, g[name]) for name, value in theta.items()}

    Args:
        net: the network; its parameters are not used, `params` are.
        params: every parameter by its name in `net.named_parameters()`: [*shape], shared by all
            tasks, or [T, *shape], one for each task.
        x: inputs [T, N, *in]; or a tree of tensors, see `fastmeta.Inputs`.
        y: targets, as the loss wants them.
        loss, weight_norm, batch_stats, backend: as in `fastmeta.meta_gradient`.
        adapt: the parameters to differentiate by, as in `fastmeta.meta_gradient`.
        weights: of the examples, [T, N]; of booleans: a mask.

    Returns:
        name -> [T, *shape], the parameters in `adapt`.

    Derivatives: differentiable in `params`, `x`, `y` and `weights` where they are floating-point
    tensors, and in
        whatever requires grad that the network or the loss reads besides: one Hessian-vector
        product of every task. With `create_graph=True` more than once, by plain autograd.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: the backend named cannot run this call.

    Source: docs/meta-gradient.md, "One inner step as an operator".
    """
    options = Options(
        "task_gradient",
        1,
        adapt=names_of("task_gradient", net, adapt),
        batch_stats=batch_stats,
        backend=backend,
    )
    return gradient(options, net, params, Tensors(x, y, weights), resolve(loss, weight_norm=weight_norm))


def gradient(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    loss: object,
    aliases: Aliases | None = None,
) -> dict[str, Tensor]:
    """`task_gradient` with its options, of one inner step, in one piece.

    One step of rate -c leads to theta + c g, whose vector-Jacobian products are v + c H v. Theta
    and v are subtracted again, and with c = 2^32 all they leave behind is a rounding error of eps /
    c relative to them.
    """
    first = next(iter(params.values()), None) if isinstance(params, Mapping) else None
    if isinstance(first, Tensor) and first.dtype == torch.float16:
        raise TypeError(
            f"{argument(options.who, 'params')} must have the range of float32, got {first.dtype}"
        )
    moved = inner_loop(options, net, params, tensors, -_SCALE, loss, aliases)
    names = adapted_names(options.who, net, options.adapt)
    return {name: (moved[name] - params[name]) / _SCALE for name in names}
