"""A problem in chunks of its tasks: cut one out, and join the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fastmeta.backends._captured import merged
from fastmeta.backends._inputs import each
from fastmeta.inputs import Tree, flatten, leaves_of, mapped
from fastmeta.problem import Batch, Gradients, Problem, Result

#: A tensor of a result: (group, member), the member of a tree the number of a leaf.
_Key = tuple[str, str | int]
_DATA = ("support_x", "support_y", "support_weights", "query_x", "query_y", "query_weights")


def chunks(problem: Problem) -> Iterator[Problem]:
    """The tasks of `problem`, at most `task_chunk` at a time and in order; the J of all sum up to
    its own."""
    size = problem.task_chunk or problem.tasks
    if size >= problem.tasks:
        yield problem
        return
    for start in range(0, problem.tasks, size):
        yield cut(problem, start, min(start + size, problem.tasks))


def cut(problem: Problem, start: int, stop: int) -> Problem:
    """Tasks start .. stop - 1; their J is their part of the whole one's. Nothing is copied."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[start:stop]

    def sets(batch: Batch | None) -> Batch | None:
        return None if batch is None else each(batch, lambda tensor: tensor[start:stop])

    tasks = stop - start
    weights = part(problem.task_weights)
    if weights is None:
        weights = next(iter(problem.params.values())).new_ones(tasks)
    cotangents = problem.adapted_grad
    return replace(
        problem,
        tasks=tasks,
        params={
            name: value[start:stop] if name in problem.per_task else value
            for name, value in problem.params.items()
        },
        rates={
            name: rate[:, start:stop] if rate.shape[1] > 1 else rate for name, rate in problem.rates.items()
        },
        support=sets(problem.support),
        query=sets(problem.query),
        task_weights=weights * (tasks / problem.tasks),  # J divides by its own number of tasks
        adapted_grad=None
        if cotangents is None
        else {name: value[start:stop] for name, value in cotangents.items()},
        output_grad=mapped(lambda cotangent: cotangent[start:stop], problem.output_grad),
    )


class Joined:
    """The answer to a problem out of those to its `chunks`; what all tasks share is added up as it
    comes."""

    def __init__(self, problem: Problem, first: Result) -> None:
        self._problem = problem
        self._first = first  # says what was asked for
        self._sums: dict[_Key, Tensor] = {}
        self._parts: dict[_Key, list[Tensor]] = {}
        self._captured: list[tuple[Tensor, Tensor]] | None = None
        self.add(first)

    def add(self, result: Result) -> None:
        """The answer to the next chunk."""
        if result.grads.captured is not None:
            self._captured = merged([*(self._captured or ()), *result.grads.captured])
        for key, tensor in _tensors(result):
            if self._dim(key) is not None:
                self._parts.setdefault(key, []).append(tensor)
            elif key in self._sums:
                self._sums[key] += tensor
            else:
                self._sums[key] = tensor

    def result(self) -> Result:
        """The answer to the whole problem."""
        found = {
            **self._sums,
            **{key: torch.cat(parts, self._dim(key) or 0) for key, parts in self._parts.items()},
        }
        first = self._first

        def group(which: str, like: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
            names = self._problem.params  # in their order
            return (
                None
                if like is None
                else {name: found[which, name] for name in names if (which, name) in found}
            )

        grads = Gradients(
            group("params", first.grads.params), group("lr", first.grads.lr), captured=self._captured
        )
        if first.grads.rule is not None:
            grads.rule = {name: found["rule", name] for name in first.grads.rule}

        def tree(name: str, like: Tree) -> Tree:
            leaves, form = flatten(like)
            return form.build(found[name, at] for at in range(len(leaves)))

        for field in _DATA:
            setattr(grads, field, tree(field, getattr(first.grads, field)))
        adapted = group("adapted", first.adapted)
        return Result(tree("task_losses", first.task_losses), tree("output", first.output), adapted, grads)

    def _dim(self, key: _Key) -> int | None:
        """The dimension of tasks; None: shared by all of them."""
        group, member = key
        if group == "params":
            return 0 if member in self._problem.per_task else None
        if group == "rule":
            return None
        if group == "lr":
            return 1 if self._problem.rates[str(member)].shape[1] > 1 else None
        return 0


def joined(problem: Problem, results: Iterator[Result]) -> Result:
    """The answer to a problem out of those to its chunks, added up as they come."""
    first = next(results)
    second = next(results, None)
    if second is None:
        return first
    whole = Joined(problem, first)
    for result in chain((second,), results):
        whole.add(result)
    return whole.result()


def _tensors(result: Result) -> Iterator[tuple[_Key, Tensor]]:
    grads = result.grads
    groups = {"adapted": result.adapted, "params": grads.params, "lr": grads.lr, "rule": grads.rule}
    for group, members in groups.items():
        for member, tensor in (members or {}).items():
            yield (group, member), tensor
    trees = {"task_losses": result.task_losses, "output": result.output}
    trees |= {field: getattr(grads, field) for field in _DATA}
    for group, tree in trees.items():
        yield from (((group, at), tensor) for at, tensor in enumerate(leaves_of(tree)))
