"""One evaluation of the network and its loss on all tasks: by vmap, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.backends._autocast import autocast
from fastmeta.backends._captured import Captured, Watch
from fastmeta.backends.torch.features import Features
from fastmeta.losses import Loss
from fastmeta.network.functional import call_then
from fastmeta.problem import Batch, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The losses and the outputs of all tasks.

    Args:
        problem: says how the network is called.
        params: every parameter, [T, *shape] if its name is in `stacked`, else [*shape].
        stacked: names of the parameters that every task has its own of.
        batch: x [T, N, *in], y [T, N, ...], weights [T, N]; of one step.
        loss: None: the losses are zero.
        vectorised: by vmap instead of a loop.
        features, values: what is not to be computed again, and what it was: [T, ...] each.

    Derivatives: by ordinary autograd outside of vmap, twice; norms and attention are decomposed
        under vmap.
    """

    problem: Problem
    params: Mapping[str, Tensor]
    stacked: frozenset[str]
    batch: Batch
    loss: Loss | None
    vectorised: bool
    features: Features | None = None
    values: Sequence[Tensor] = ()

    def run(self) -> tuple[Tensor, Tensor]:
        """(losses [T], output [T, N, *out])."""
        params, batch, values = self.params, self.batch, self.values

        def one_task(
            theta: Mapping[str, Tensor], x: Tensor, y: Tensor | None, weights: Tensor | None, *known: Tensor
        ) -> tuple[Tensor, Tensor]:
            forwards = None if self.features is None else self.features.replaying(known)
            return evaluate_one(self.problem, theta, (x, y, weights), self.loss, self.vectorised, forwards)

        if self.vectorised:
            dims = {name: 0 if name in self.stacked else None for name in params}
            in_dims = (
                dims,
                0,
                None if batch.y is None else 0,
                None if batch.weights is None else 0,
                *[0] * len(values),
            )
            every_task = torch.func.vmap(one_task, in_dims=in_dims, randomness="different")
            return every_task(dict(params), batch.x, batch.y, batch.weights, *values)

        # unbind once: the backward of one select a task would write all of [T, *shape] T times
        columns = {name: value.unbind() for name, value in params.items() if name in self.stacked}
        nothing = (None,) * batch.x.shape[0]
        data = zip(
            batch.x.unbind(),
            nothing if batch.y is None else batch.y.unbind(),
            nothing if batch.weights is None else batch.weights.unbind(),
            *[value.unbind() for value in values],
            strict=True,
        )
        answers = [
            one_task({**params, **{name: column[task] for name, column in columns.items()}}, *entry)
            for task, entry in enumerate(data)
        ]
        losses, outputs = zip(*answers, strict=True)
        return torch.stack(losses), torch.stack(outputs)

    def watched(self, captured: Captured) -> tuple[Tensor, Tensor, Watch]:
        """(losses [T], output [T, N, *out], what the network and the loss read past their
        arguments); `captured` takes note."""
        batch = self.batch
        ours = [*self.params.values(), batch.x, batch.y, batch.weights, *self.values]
        return captured.evaluated(self.run, ours)


def evaluate_one(
    problem: Problem,
    theta: Mapping[str, Tensor],
    examples: tuple[Tensor, Tensor | None, Tensor | None],
    loss: Loss | None,
    decompose: bool = False,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, (), and the output, [N, *out], of one task.

    Args:
        problem: says how the network is called.
        theta: every parameter, [*shape].
        examples: x [N, *in], y [N, ...], weights [N].
        loss: None: the loss is zero.
        decompose, forwards: as of `call`.
    """
    (x, y, weights), dtype = examples, next(iter(theta.values())).dtype
    net, decompose = problem.exchange or problem.net, decompose or problem.third

    def value_of(output: Tensor) -> Tensor:
        # losses and their targets are those of the parameters' dtype
        output = output if problem.autocast is None else output.to(dtype)
        value = output.new_zeros(()) if loss is None or y is None else loss(output, y, weights)
        return value if problem.autocast is None else value.to(dtype)

    with autocast(x.device, problem.autocast):
        how: dict[str, Any] = {
            "batch_stats": problem.batch_stats,
            "decompose": decompose,
            "forwards": forwards,
        }
        value, output = call_then(net, theta, x, value_of, **how)
        return value, output if problem.autocast is None else output.to(dtype)
