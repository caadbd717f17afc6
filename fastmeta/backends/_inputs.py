"""What the two PyTorch backends share: detached leaves, gradients without None, the check of class
indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from fastmeta.backends._random_state import preserved_for
from fastmeta.inputs import Tree, flatten, leaves_of, like, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import Conventions, call, own
from fastmeta.network.swap import Exchange
from fastmeta.problem import Batch, Gradients, Problem
from fastmeta.update_rules import UpdateRule

_PARTS = ("x", "y", "weights")


def any_batch(problem: Problem) -> Batch:
    """The set that is run first: the support set if inner steps read it, else the query set if
    there is one."""
    batch = (problem.steps and problem.support) or problem.query or problem.support
    if batch is None:
        raise ValueError("a problem needs a support or a query set")
    return batch


def each(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The same set with `function(tensor)` in the place of every tensor."""
    x, y, weights = (mapped(function, getattr(batch, part)) for part in _PARTS)
    return replace(batch, x=x, y=y, weights=weights)


def one_task(batch: Batch) -> Tree:
    """The inputs of the first task, those of its first step: [N, *in]."""
    return mapped(lambda x: x[0, 0] if batch.per_step else x[0], batch.x)


def parts_of(batch: Batch | None, role: str) -> dict[str, Tensor]:
    """The tensors of a set by name: as `wrt` has it, "support_x", and for the leaves of a tree
    "support_x/0" and so on.

    Args:
        batch: the set; None: there is none.
        role: "support" or "query".
    """
    found = {}
    for part in _PARTS:
        tree = getattr(batch, part, None)
        if isinstance(tree, Tensor):
            found[f"{role}_{part}"] = tree
        else:
            found |= {f"{role}_{part}/{at}": leaf for at, leaf in enumerate(leaves_of(tree))}
    return found


def with_parts(batch: Batch, role: str, others: Mapping[str, Tensor]) -> Batch:
    """The same set with those of its tensors that are in `others`, by the names of `parts_of`,
    replaced."""
    if not others:
        return batch
    names = iter(parts_of(batch, role))
    return each(batch, lambda tensor: others.get(next(names), tensor))


def wanted_parts(problem: Problem, wrt: frozenset[str]) -> dict[str, Tensor]:
    """What of the data of `problem` a gradient is asked for by, by the names of `parts_of`."""
    data = parts_of(problem.support, "support") | parts_of(problem.query, "query")
    return {
        name: tensor
        for name, tensor in data.items()
        if name.partition("/")[0] in wrt and tensor.is_floating_point()
    }


def put_parts(grads: Gradients, problem: Problem, found: Mapping[str, Tensor]) -> None:
    """Put gradients by the names of `parts_of` where they belong."""
    for role, batch in (("support", problem.support), ("query", problem.query)):
        for part in _PARTS:
            field, tree = f"{role}_{part}", getattr(batch, part, None)
            if field in found:
                setattr(grads, field, found[field])
            elif any(name.startswith(f"{field}/") for name in found):
                names = [f"{field}/{at}" for at in range(len(leaves_of(tree)))]
                setattr(grads, field, like(tree, map(found.get, names)))


def products(output: Tree, cotangent: Tree) -> list[Tensor]:
    """<output, cotangent>, a term for each leaf that has a cotangent."""
    leaves, form = flatten(output)
    pairs = zip(leaves, form.match(cotangent), strict=True)
    return [(leaf * direction).sum() for leaf, direction in pairs if direction is not None]


def differentiable(tree: Tree) -> list[Tensor]:
    """The leaves of a tree that can have a gradient."""
    return [leaf for leaf in leaves_of(tree) if leaf.is_floating_point()]


def runs(problem: Problem) -> bool:
    """Whether the network is run at all: without inner steps only on a query set."""
    return problem.steps > 0 or problem.query is not None


def inner_loop(problem: Problem) -> tuple[Batch, Loss, UpdateRule]:
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

    def leaves(batch: Batch | None) -> Batch | None:
        return None if batch is None else each(batch, lambda tensor: own(tensor, requires_grad))

    cotangents = problem.adapted_grad
    return replace(
        problem,
        exchange=Exchange(problem.net),
        params={name: own(value, requires_grad) for name, value in problem.params.items()},
        rates={name: own(value, requires_grad) for name, value in problem.rates.items()},
        hyper={name: own(value, requires_grad) for name, value in problem.hyper.items()},
        support=leaves(problem.support),
        query=leaves(problem.query),
        step_weights=with_step_weights(problem).step_weights,
        task_weights=None if problem.task_weights is None else own(problem.task_weights),
        adapted_grad=None if cotangents is None else {name: own(value) for name, value in cotangents.items()},
        output_grad=mapped(own, problem.output_grad),
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
    random state.

    Raises:
        TypeError: the output is not one tensor.
    """
    params = {name: value[0] if name in problem.per_task else value for name, value in problem.params.items()}
    x = one_task(any_batch(problem))
    with torch.no_grad(), preserved_for(problem):
        output = call(problem.exchange or problem.net, params, x, batch_stats=problem.batch_stats)
    for loss in (problem.loss, problem.query_loss):
        if loss is not None:
            loss.check_one("the network's output", output)
    return tuple(output.shape[1:])


def check_rates(problem: Problem) -> None:
    """Check that learning rates and learned numbers of the rule are finite, unless an accelerator
    would have to be waited for.

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
    check_numbers(problem)


def check_numbers(problem: Problem) -> None:
    """Check that the learned numbers of the rule are finite, unless an accelerator would have to be
    waited for.

    Raises:
        ValueError: one is not.
    """
    for name, number in problem.hyper.items() if problem.steps else ():
        if number.device.type == "cpu" and not number.isfinite().all():
            raise ValueError(f"`update_rule`: {name} must be finite, got NaN or infinity in it")


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
