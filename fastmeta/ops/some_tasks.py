"""A problem of some of its tasks, and their answer as one to all of them: the others have the
gradient zero."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.backends._captured import merged
from fastmeta.backends._inputs import each
from fastmeta.inputs import Tree, mapped
from fastmeta.problem import Batch, Gradients, Problem, Result, Scratch

#: The fields of `Gradients` that are by data.
DATA = ("support_x", "support_y", "support_weights", "query_x", "query_y", "query_weights")


def select(problem: Problem, tasks: Tensor) -> Problem:
    """The problem of the tasks numbered `tasks`, in this order; J divides by how many they are.

    Args:
        problem: its tensors are copied where every task has its own part of them.
        tasks: [n] int64, n >= 1, on the problem's device.
    """

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach().index_select(0, tasks)

    def sets(batch: Batch | None) -> Batch | None:
        return None if batch is None else each(batch, part)

    def shares(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.detach().index_select(0, tasks) if name in problem.per_task else value
            for name, value in values.items()
        }

    rates, cotangents = problem.rates, problem.adapted_grad
    return replace(
        problem,
        tasks=len(tasks),
        params=shares(problem.params),
        rates={
            name: rate.index_select(1, tasks) if rate.shape[1] > 1 else rate for name, rate in rates.items()
        },
        support=sets(problem.support),
        query=sets(problem.query),
        task_weights=mapped(part, problem.task_weights),
        adapted_grad=None
        if cotangents is None
        else {name: v.index_select(0, tasks) for name, v in cotangents.items()},
        output_grad=mapped(part, problem.output_grad),
        prefer_flat=False,
        scratch=Scratch(),
    )


def scatter(problem: Problem, whole: Result, tasks: Tensor, some: Result | None, scale: float) -> Result:
    """The answer to `problem` without some of its tasks.

    Args:
        problem: the whole one.
        whole: its answer: losses and outputs of the tasks that are left out are these.
        tasks: those that are left.
        some: the answer to `select(problem, tasks)`; None if there are none.
        scale: of all gradients.

    Returns:
        Without `Result.loss`.
    """

    def spread(part: Tensor | None, like: Tensor, dim: int = 0) -> Tensor:
        full = torch.zeros_like(like)
        return full if part is None else full.index_copy_(dim, tasks, part * scale)

    def shared(part: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if part is None else part * scale

    def kept(part: Tree, all_of: Tree) -> Tree:
        if part is None:
            return all_of
        return mapped(lambda whole, some: whole.clone().index_copy_(0, tasks, some), all_of, part)

    grads, own = whole.grads, Gradients() if some is None else some.grads
    found = Gradients()
    for field in DATA:
        pair = getattr(grads, field), getattr(own, field)
        setattr(found, field, mapped(lambda like, part: spread(part, like), *pair))
    if grads.params is not None or grads.flat_params is not None:
        params = own.params or {}
        found.params = {
            name: (spread if name in problem.per_task else shared)(params.get(name), value)
            for name, value in problem.params.items()
        }
    if grads.lr is not None:
        rates = own.lr or {}
        found.lr = {
            name: spread(rates.get(name), rate, 1) if rate.shape[1] > 1 else shared(rates.get(name), rate)
            for name, rate in problem.rates.items()
        }
    if grads.rule is not None:
        numbers = own.rule or {}
        found.rule = {name: shared(numbers.get(name), value) for name, value in problem.hyper.items()}
    if grads.captured is not None:
        parts = merged((tensor, gradient * scale) for tensor, gradient in own.captured or ())
        found.captured = merged([*[(tensor, torch.zeros_like(g)) for tensor, g in grads.captured], *parts])
    task_losses = kept(None if some is None else some.task_losses, whole.task_losses)
    output = kept(None if some is None else some.output, whole.output)
    return Result(task_losses, output, whole.adapted, found)
