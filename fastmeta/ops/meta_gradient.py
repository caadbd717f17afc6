"""Query losses after the inner loop and their gradients, in one pass and without an autograd
graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import NamedTuple, cast

from torch import Tensor, nn

from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.ops.again import captures_of, reads
from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import settled
from fastmeta.ops.eager import eager
from fastmeta.ops.options import Adapt, Options, argument, names_of, numbers_of, rule_of, wrt_of
from fastmeta.ops.plan import prepare
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import hyper_of
from fastmeta.update_rules import UpdateRule


class MetaGradient(NamedTuple):
    """What `meta_gradient` returns; a gradient that was not asked for is None."""

    loss: Tensor  # ()
    task_losses: Tensor  # [T]
    output: Tree  # [T, M, *out]; of a network that returns several tensors, what it returns
    grads: dict[str, Tensor] | None = None  # parameter name -> as the parameter was given
    lr: Tensor | dict[str, Tensor] | None = None  # in the structure of `lr`; a number gets a tensor ()
    # of trees: the same containers, None in the place of what is no floating-point tensor
    support_x: Tree = None
    support_y: Tree = None
    support_weights: Tensor | None = None
    query_x: Tree = None
    query_y: Tree = None
    query_weights: Tensor | None = None
    # (tensor, gradient) of every tensor that requires grad and that the network or a loss read past
    # its arguments
    captured: tuple[tuple[Tensor, Tensor], ...] = ()
    rule: dict[str, Tensor] | None = None  # by the learned numbers of the update rule, in their shapes


@eager
def meta_gradient(
    net: nn.Module,
    params: Mapping[str, Tensor],
    support: tuple[Tree, Tree],
    query: tuple[Tree, Tree],
    *,
    loss: object,
    query_loss: object = None,
    lr: Rates,
    steps: int,
    order: str = "second",
    adapt: Adapt = "all",
    step_weights: Sequence[float] | None = None,
    support_step_weights: Sequence[float] | None = None,
    task_weights: Tensor | None = None,
    support_weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    weight_norm: str = "count",
    support_per_step: bool = False,
    update_rule: UpdateRule | None = None,
    memory: str = "auto",
    memory_limit: int | None = None,
    task_chunk: int | None = None,
    batch_stats: str = "task",
    wrt: Iterable[str] = ("params",),
    backend: str = "auto",
) -> MetaGradient:
    """The meta-gradient: query losses after `steps` inner steps, and their gradients.

    Args:
        net: the network; its parameters are not used, `params` are.
        params: every parameter by its name in `net.named_parameters()`: [*shape], shared by all
            tasks, or [T, *shape], one for each task.
        support: x [T, N, *in] and y as the loss wants it; [T, K, N, ...] with `support_per_step`.
            Both may be trees of tensors, see `fastmeta.Inputs`.
        query: x [T, M, *in] and y.
        loss: a name, a function of `torch.nn.functional`, a loss module or any f(output, target) ->
            scalar; see `fastmeta.losses.resolve`.
        query_loss: the same for the query sets; None: `loss`.
        lr: inner learning rates: a number, a tensor () or [K], or a dict of numbers and tensors ()
            or [K or 1, T or 1, ...] by parameter name or glob pattern: a name goes before a
            pattern, and the first pattern that matches before later ones. The rest of a shape is
            any that broadcasts to the parameter's: [O, 1] is a rate for each row of a weight [O,
            I]. A rate for a parameter that `adapt` leaves out because it is frozen is not used.
        steps: K, at least 0.
        order: "second", exact, or "first", which drops every derivative of the inner gradients
            (FOMAML).
        adapt: "all", "head" (the last layer with parameters) or "body" (all the others), of these
            the parameters of `net` that require grad, whatever tensors `params` has for them; or
            names of parameters, glob patterns of names ("blocks.*.weight") or a predicate (name,
            parameter) -> bool, which may ask for frozen ones too.
        step_weights: K + 1 numbers: weights of the query losses after 0 .. K steps; None: the last
            one only.
        support_step_weights: K numbers: weights of each step's own support loss, before its update,
            in the loss and in `task_losses` (test-time training); None: all zero.
        task_weights: [T]; the loss is sum(task_weights * task_losses) / T. A task of weight zero
            contributes nothing, even if it diverged, except on an accelerator, where that would
            have to be looked for.
        support_weights, query_weights: [T, N] ([T, K, N] with `support_per_step`) and [T, M]; of
            booleans: masks, for tasks of different sizes. The mean is over the examples that they
            keep; the others may hold anything finite, and any class.
        weight_norm: the mean over examples with weights w: "count", sum(w * l) / N, or "sum", sum(w
            * l) / sum(w), which is zero, without any gradient, where all weights of a task are
              zero.
        support_per_step: there is a support set of its own for every inner step.
        update_rule: what a step does with a gradient: `fastmeta.SGD`, `Adam`, `AdamW`, `RMSProp`,
            `Adagrad`, `Lion` or a `CustomRule`; None: plain SGD. docs/update-rules.md says which
            backend runs which.
        memory: "store" keeps the activations of every inner step, "recompute" only the parameters,
            and the state of the rule, of every step; "auto" stores while that takes less than 256
            MiB. "checkpoint" keeps those of about sqrt(K) steps, and runs the steps between them
            again: for K in the hundreds and thousands.
        memory_limit: bytes that those of all tasks may take at most with "checkpoint", which then
            keeps fewer and runs more steps again; None: those of about sqrt(K) steps.
        task_chunk: at most so many tasks at a time on the `torch` backend, which otherwise runs all
            of them side by side; None: all. Results are the same but for rounding and random draws.
            On other backends it has no use.
        batch_stats: batch norm by "task", the task's own batch; by the "running" statistics; or
            "module": each norm as the module itself does it, by its batch after .train(), by its
            running statistics after .eval(). Running statistics are never moved, unlike by the
            module itself.
        wrt: what to differentiate by, out of `fastmeta.problem.DIFFERENTIABLE`.
        backend: "auto", or the name of one.

    Returns:
        `MetaGradient`; its gradients are detached. What the network or a loss reads past its
        arguments and requires
            grad, such as a learned weight in a closure or the parameters of a loss network, is in
            `captured`, whatever `wrt` says.

    Derivatives: of `loss`, exact, computed here; what is returned has none.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was modified.
        BackendUnavailable: the backend named cannot run this call.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 3;
        docs/architecture.md.
    """
    support_x, support_y = _pair("support", support)
    query_x, query_y = _pair("query", query)
    support_loss = resolve(loss, weight_norm=weight_norm)
    rule = rule_of("meta_gradient", update_rule)
    options = Options(
        "meta_gradient",
        steps,
        order,
        names_of("meta_gradient", net, adapt),
        numbers_of("meta_gradient", step_weights),
        support_per_step,
        rule.form,
        memory,
        batch_stats,
        backend,
        task_chunk,
        numbers_of("meta_gradient", support_step_weights, "support_step_weights"),
        memory_limit,
    )
    call = prepare(
        options,
        net,
        params,
        Tensors(support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights),
        support_loss,
        support_loss if query_loss is None else resolve(query_loss, weight_norm=weight_norm),
        lr,
        wrt_of("meta_gradient", wrt),
        captures=captures_of(True, None),
        hyper=hyper_of(rule),
    )
    found = settled("meta_gradient", "keep", call, call.solve())
    result = found.result
    task_losses, output, grads = cast(Tensor, result.task_losses), result.output, result.grads
    return MetaGradient(
        found.loss,
        task_losses,
        output,
        grads.params,
        None if grads.lr is None else call.plan.rates.fold(grads.lr, lr),
        grads.support_x,
        grads.support_y,
        grads.support_weights,
        grads.query_x,
        grads.query_y,
        grads.query_weights,
        tuple((read.tensor, read.gradient) for read in reads(grads.captured, None)),
        grads.rule,
    )


def _pair(field: str, batch: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    try:
        x, y = batch
    except (TypeError, ValueError):
        what = argument("meta_gradient", field)
        many = f" of {len(batch)}" if isinstance(batch, Sized) else ""
        raise TypeError(f"{what} must be a pair (x, y), got {type(batch).__name__}{many}") from None
    return x, y
