"""The inner loop: every task takes its own steps on its own support set."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors
from fastmeta.ops.differentiable import Operation, run
from fastmeta.ops.eager import eager
from fastmeta.ops.options import Adapt, Options, names_of, rule_of
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import NONE, Hyper, hyper_of
from fastmeta.update_rules import UpdateRule


@eager
def inner_sgd(
    net: nn.Module,
    params: Mapping[str, Tensor],
    x: Tree,
    y: Tree,
    *,
    loss: object,
    lr: Rates,
    steps: int,
    order: str = "second",
    adapt: Adapt = "all",
    weights: Tensor | None = None,
    weight_norm: str = "count",
    update_rule: UpdateRule | None = None,
    support_per_step: bool = False,
    memory: str = "auto",
    memory_limit: int | None = None,
    task_chunk: int | None = None,
    batch_stats: str = "task",
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The parameters of every task after `steps` inner steps.

    Args:
        net: the network; its parameters are not used, `params` are.
        params: every parameter by its name in `net.named_parameters()`: [*shape], shared by all
            tasks, or [T, *shape], one for each task.
        x: support inputs [T, N, *in]; [T, K, N, *in] with `support_per_step`; or a tree of
            tensors, see `fastmeta.Inputs`.
        y: support targets, as the loss wants them.
        loss, lr, steps, order, adapt, weight_norm, update_rule, support_per_step, memory,
        memory_limit, task_chunk, batch_stats, backend: as in `fastmeta.meta_gradient`.
        weights: of the support examples, [T, N] or [T, K, N]; of booleans: a mask.

    Returns:
        name -> [T, *shape], every parameter, also those that are not adapted.

    Derivatives: differentiable in `params`, `lr`, learned numbers of `update_rule`, `x`, `y` and
        `weights` where they are floating-point tensors, and in whatever requires grad that the
        network or the loss reads besides; the backward pass runs the inner loop, and so the loss,
        again. With order="first" only the identity part of each step remains. With
        `create_graph=True` the backward pass is a loop of plain autograd, whose results can be
        differentiated again.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailable: the backend named cannot run this call.
        RuntimeError: in the backward pass: a tensor was modified since, or the loss reads others
            than it did.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 2.2.
    """
    rule = rule_of("inner_sgd", update_rule)
    options = Options(
        "inner_sgd",
        steps,
        order,
        names_of("inner_sgd", net, adapt),
        None,
        support_per_step,
        rule.form,
        memory,
        batch_stats,
        backend,
        task_chunk,
        memory_limit=memory_limit,
    )
    given = options, net, params, Tensors(x, y, weights), lr, resolve(loss, weight_norm=weight_norm)
    return inner_loop(*given, hyper=hyper_of(rule))


def inner_loop(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    lr: Rates,
    loss: object,
    aliases: Aliases | None = None,
    hyper: Hyper = NONE,
) -> dict[str, Tensor]:
    """`inner_sgd` with its options in one piece, under any name in messages; `hyper` are the
    tensors of the update rule."""
    operation = Operation(options, net, params, tensors, lr, resolve(loss), hyper, aliases)
    return run(operation)
