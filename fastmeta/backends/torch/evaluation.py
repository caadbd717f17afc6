"""One evaluation of the network and its loss on all tasks: by vmap, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmeta.backends._autocast import autocast
from fastmeta.backends._captured import Captured, Watch
from fastmeta.backends.torch.each_task import each_task
from fastmeta.backends.torch.features import Features
from fastmeta.inputs import Form, Tree, flatten, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import call_then
from fastmeta.network.swap import Carried
from fastmeta.problem import Batch, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The losses and the outputs of all tasks.

    Args:
        problem: says how the network is called.
        params: every parameter, [T, *shape] if its name is in `stacked`, else [*shape].
        stacked: names of the parameters that every task has its own of.
        batch: x [T, N, *in], y [T, N, ...], weights [T, N], x and y possibly trees; of one step.
        loss: None: the losses are zero.
        vectorised: by vmap instead of a loop.
        features, values: what is not to be computed again, and what it was: [T, ...] each.
        buffers: what stands in the place of buffers and other tensors of the module's own, by the
            ids of those; None: copies of them.

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
    buffers: Mapping[int, Tensor] | None = None

    def run(self) -> tuple[Tensor, Tree]:
        """(losses [T], output [T, N, *out])."""
        params, batch = self.params, self.batch
        data, form = flatten((batch.x, batch.y, batch.weights))
        forms: list[Form] = []  # of the output

        def one_task(theta: Mapping[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            examples, known = form.build(tensors[: len(data)]), tensors[len(data) :]
            forwards = None if self.features is None else self.features.replaying(known)
            how = self.vectorised, forwards, self.buffers
            loss, output = evaluate_one(self.problem, theta, examples, self.loss, *how)
            leaves, output_form = flatten(output)
            forms.append(output_form)
            return loss, *leaves

        losses, *outputs = each_task(one_task, params, self.stacked, [*data, *self.values], self.vectorised)
        if len(forms) > 1 and len({form.without_constants() for form in forms}) > 1:
            raise ValueError("the network must return the same containers for every task, and did not")
        return losses, forms[0].build(outputs)

    def watched(self, captured: Captured) -> tuple[Tensor, Tree, Watch]:
        """(losses [T], output [T, N, *out], what the network and the loss read past their
        arguments); `captured` takes note."""
        batch = self.batch
        ours = [*self.params.values(), batch.x, batch.y, batch.weights, *self.values]
        return captured.evaluated(self.run, ours)


def evaluate_one(
    problem: Problem,
    theta: Mapping[str, Tensor],
    examples: tuple[Tree, Tree, Tensor | None],
    loss: Loss | None,
    decompose: bool = False,
    forwards: Mapping[str, Callable[..., Any]] | None = None,
    buffers: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tree]:
    """The loss, (), and the output, [N, *out], of one task.

    Args:
        problem: says how the network is called.
        theta: every parameter, [*shape].
        examples: x [N, *in], y [N, ...], weights [N], x and y possibly trees.
        loss: None: the loss is zero.
        decompose, forwards: as of `call`.
        buffers: as of `Evaluation`.
    """
    (x, y, weights), first = examples, next(iter(theta.values()))
    net, decompose = problem.exchange or problem.net, decompose or problem.third

    def cast(leaf: Tensor) -> Tensor:
        return leaf.to(first.dtype) if leaf.is_floating_point() else leaf

    def value_of(output: Tree) -> Tensor:
        # losses and their targets are those of the parameters' dtype
        output = output if problem.autocast is None else mapped(cast, output)
        value = first.new_zeros(()) if loss is None or y is None else loss(output, y, weights)
        return value if problem.autocast is None else cast(value)

    with autocast(problem.device, problem.autocast):
        how: dict[str, Any] = {
            "batch_stats": problem.batch_stats,
            "decompose": decompose,
            "forwards": forwards,
            "carried": None if buffers is None else _standing_in(buffers),
        }
        value, output = call_then(net, theta, x, value_of, **how)
        return value, output if problem.autocast is None else mapped(cast, output)


def _standing_in(buffers: Mapping[int, Tensor]) -> Carried:
    """A module's state in which copies of these tensors stand for its own."""
    carried = Carried()
    carried.copies = {at: tensor.clone() for at, tensor in buffers.items()}
    return carried
