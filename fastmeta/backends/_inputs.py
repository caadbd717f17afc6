"""What the two PyTorch backends share: detached leaves, gradients without None, the check of class
indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from fastmeta.backends._random_state import preserved_for
from fastmeta.losses import Loss
from fastmeta.network.functional import Conventions, call, own
from fastmeta.network.swap import Exchange
from fastmeta.problem import Batch, Problem
from fastmeta.update_rules import SGD


def any_batch(problem: Problem) -> Batch:
    """The set that is run first: the support set if inner steps read it, else the query set if
    there is one."""
    batch = (problem.steps and problem.support) or problem.query or problem.support
    if batch is None:
        raise ValueError("a problem needs a support or a query set")
    return batch


def runs(problem: Problem) -> bool:
    """Whether the network is run at all: without inner steps only on a query set."""
    return problem.steps > 0 or problem.query is not None


def inner_loop(problem: Problem) -> tuple[Batch, Loss, SGD]:
    """What inner steps need: a problem with steps has it."""
    support, loss, rule = problem.support, problem.loss, problem.rule
    if support is None or loss is None or rule is None:
        raise ValueError(
            f"a problem with {problem.steps} inner steps needs a support set, a loss and an update rule"
        )
    return support, loss, rule


def detached(problem: Problem, requires_grad: bool = False) -> Problem:
    """The same problem: its tensors fresh leaves, its step weights written out, its network ready
    to run. For inside `isolated`."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else own(tensor, requires_grad)

    def leaves(batch: Batch | None) -> Batch | None:
        if batch is None:
            return None
        return replace(batch, x=own(batch.x, requires_grad), y=leaf(batch.y), weights=leaf(batch.weights))

    cotangents = problem.adapted_grad
    return replace(
        problem,
        exchange=Exchange(problem.net),
        params={name: own(value, requires_grad) for name, value in problem.params.items()},
        rates={name: own(value, requires_grad) for name, value in problem.rates.items()},
        support=leaves(problem.support),
        query=leaves(problem.query),
        step_weights=with_step_weights(problem).step_weights,
        task_weights=None if problem.task_weights is None else own(problem.task_weights),
        adapted_grad=None if cotangents is None else {name: own(value) for name, value in cotangents.items()},
        output_grad=None if problem.output_grad is None else own(problem.output_grad),
    )


def with_graph(problem: Problem) -> Problem:
    """The same problem, its tensors as they are, for gradients that are differentiated again."""
    losses = (_decomposed(problem.loss), _decomposed(problem.query_loss))
    return replace(with_step_weights(problem), third=True, loss=losses[0], query_loss=losses[1])


def _decomposed(loss: Loss | None) -> Loss | None:
    """A loss of which any derivative is right, where it is the user's own."""
    if loss is None or loss.function is None:
        return loss
    function = loss.function

    def decomposed(output: Tensor, target: Tensor) -> Tensor:
        # each norm of a loss by its own flag; third derivatives of PyTorch's fused ones are
        # silently wrong
        with Conventions("module", decompose=True):
            return function(output, target)

    return replace(loss, function=decomposed)


def varied(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theta`, in which everything can be differentiated by: what requires no grad is a leaf of its
    own."""
    return {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in theta.items()}


def with_step_weights(problem: Problem) -> Problem:
    """The same problem, its step weights written out."""
    return replace(problem, step_weights=problem.step_weights or (0.0,) * problem.steps + (1.0,))


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """d<outputs, directions>/d inputs by autograd; zeros where there is no dependence."""
    differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not differentiable or not wanted:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(
        [outputs[i] for i in differentiable],
        wanted,
        None if directions is None else [directions[i] for i in differentiable],
        create_graph=create_graph,
        retain_graph=retain_graph,
        materialize_grads=True,
    )
    remaining = iter(found)
    return [next(remaining) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in inputs]


def output_shape(problem: Problem) -> tuple[int, ...]:
    """Shape of the network's output for one example: runs task 0 once, draws nothing from the
    random state."""
    batch = any_batch(problem)
    params = {name: value[0] if name in problem.per_task else value for name, value in problem.params.items()}
    x = batch.x[0, 0] if batch.per_step else batch.x[0]  # [N, *in]
    with torch.no_grad(), preserved_for(problem):
        return tuple(
            call(problem.exchange or problem.net, params, x, batch_stats=problem.batch_stats).shape[1:]
        )


def check_rates(problem: Problem) -> None:
    """Check that learning rates are finite, unless an accelerator would have to be waited for.

    Raises:
        ValueError: one is not.
    """
    rates = problem.rates.values() if problem.steps else ()
    distinct = {
        (rate.data_ptr(), rate.shape, rate.stride()): rate for rate in rates if rate.device.type == "cpu"
    }
    single = {
        rate.data_ptr(): rate for rate in distinct.values() if rate.numel() == 1
    }  # a number is one for all
    several = [rate for rate in distinct.values() if rate.numel() != 1]
    if not (
        all(isfinite(rate.item()) for rate in single.values())
        and all(rate.isfinite().all() for rate in several)
    ):
        raise ValueError("learning rates must be finite numbers, got NaN or infinity among them")


def check_class_indices(problem: Problem, shape: Callable[[Problem], tuple[int, ...]] = output_shape) -> None:
    """Check the range of class indices, where there are any: on an accelerator they would end in a
    device assertion.

    Args:
        problem: its tensors detached.
        shape: gives the network's output for one example; called only where there are class
            indices.

    Raises:
        ValueError: one is out of range.
    """
    for what, loss, batch in (
        ("`support_y`", problem.loss, problem.support),
        ("`query_y`", problem.query_loss, problem.query),
    ):
        if batch is problem.support and not runs(problem):
            continue  # nothing runs, and the network need not take a set that is not used
        if (
            loss is not None
            and batch is not None
            and batch.y is not None
            and loss.needs_class_indices(batch.y)
        ):
            loss.check_values(what, batch.y, shape(problem)[0])
