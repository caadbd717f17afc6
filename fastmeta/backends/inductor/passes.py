"""One pass over the network for all tasks, as a function of flat tensors: nothing is baked in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.backends import _inputs
from fastmeta.backends._sweep import stack
from fastmeta.backends.torch.evaluation import Evaluation, evaluate_one
from fastmeta.backends.torch.tasks import output_shape, step_of
from fastmeta.inputs import Tree
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Problem
from fastmeta.trace.lower import OPERATORS
from fastmeta.trace.record import NoReads, Recorder
from fastmeta.trace.step import Tracer

_WEIGHTS = ("weight", "pos_weight")


def set_of(p: Problem, role: str, k: int) -> tuple[Batch, Loss | None]:
    """(the support set of step k or the query set, its loss).

    Raises:
        ValueError: there is no such set.
    """
    if role == "support":
        support, loss, _ = _inputs.inner_loop(p)
        return step_of(support, k), loss
    if p.query is None:
        raise ValueError("there is no query set")
    return p.query, p.query_loss


@dataclass(frozen=True, slots=True)
class Given:
    """The tensors that a pass depends on, by name: "params.<name>", those of a set as `parts_of`
    calls them, "buffers.<name>" and "loss.<name>"."""

    role: str
    names: tuple[str, ...]

    def tensors(
        self, p: Problem, buffers: Mapping[str, Tensor], theta: Mapping[str, Tensor], k: int
    ) -> list[Tensor]:
        """Of the pass at theta_k, dense, in the order of `names`.

        Args:
            p: the problem.
            buffers: values of those of the module, and of other tensors of its own, by name.
            theta: adapted parameters, [T, *shape] each.
            k: of the step.
        """
        found = _tensors(p, buffers, self.role, theta, k)
        return [found[name].contiguous() for name in self.names]


def _tensors(
    p: Problem, buffers: Mapping[str, Tensor], role: str, theta: Mapping[str, Tensor], k: int
) -> dict[str, Tensor]:
    batch, loss = set_of(p, role, k)
    found = {f"params.{name}": theta.get(name, value) for name, value in p.params.items()}
    found |= _inputs.parts_of(batch, role)
    found |= {f"buffers.{name}": value.detach() for name, value in buffers.items()}
    return found | {
        f"loss.{name}": value.detach()
        for name in _WEIGHTS
        if loss is not None and (value := getattr(loss, name)) is not None
    }


@dataclass(frozen=True, slots=True)
class Buffers:
    """Where the tensors of a module that are no parameters are found at every call. Holds no
    module, so that it may be kept with one.

    Args:
        places: name -> (path of its module, name in it, whether it is a registered buffer).
        sorts: of each what a trace depends on.
    """

    places: dict[str, tuple[str, str, bool]]
    sorts: tuple[object, ...]

    @classmethod
    def of(cls, problem: Problem) -> Buffers:
        """Of its module.

        Raises:
            UntraceableError: one is where it cannot be found again.
        """
        found = Tracer(problem).sources.attributes
        return cls(found, _sorts(_values(problem.net, found)))

    def values(self, net: nn.Module) -> dict[str, Tensor]:
        """As they are now, by name."""
        return _values(net, self.places)

    def same(self, net: nn.Module) -> bool:
        """Whether the module's tensors differ from what they were in nothing but values."""
        return _sorts(self.values(net)) == self.sorts


def _values(net: nn.Module, places: Mapping[str, tuple[str, str, bool]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (path, key, registered) in places.items():
        module = net.get_submodule(path)
        held: Any = module._buffers if registered else vars(module)
        found[name] = held[key]
    return found


def _sorts(values: Mapping[str, Tensor]) -> tuple[object, ...]:
    return tuple((v.shape, v.dtype, v.device, v.requires_grad) for v in values.values())


class Pass:
    """A pass over one set, to be traced.

    Args:
        p: its tensors detached; those of its sets and parameters are read for their shapes only.
        buffers: where those of its module are found.
        role: "support" or "query".
        wanted: names, as of `Given`, of what a gradient is wanted by.
    """

    def __init__(self, p: Problem, buffers: Buffers, role: str, wanted: Sequence[str]) -> None:
        self.p, self.role, self.wanted = p, role, wanted
        self.buffers = buffers.values(p.net)
        self.given = Given(role, tuple(_tensors(p, self.buffers, role, {}, 0)))
        self.batch, self.loss = set_of(p, role, 0)
        self.classes = 0  # of a loss that reads class indices
        if self.loss is not None and self.loss.needs_class_indices(self.batch.y):
            self.classes = output_shape(p)[0]

    def watch(self) -> None:
        """Run one task's pass under a recorder, which sees what no program can do.

        Raises:
            UntraceableError: the module reads a value on the host, draws random numbers, and so on.
        """
        recorder, p = Recorder(OPERATORS), self.p
        found = _tensors(p, self.buffers, self.role, {}, 0)
        one = {}
        for name, tensor in found.items():
            kind, _, key = name.partition(".")
            of_task = key in p.per_task if kind == "params" else kind not in ("buffers", "loss")
            one[name] = (tensor[0] if of_task else tensor).clone(memory_format=torch.contiguous_format)
            recorder.register(one[name], name)
        params, batch, loss, buffers = self._placed(one)
        examples = batch.x, batch.y, batch.weights
        with recorder, NoReads(recorder):
            evaluate_one(p, params, examples, loss, decompose=True, buffers=buffers)

    def evaluated(
        self, tensors: Sequence[Tensor], stacked: Set[str]
    ) -> tuple[Tensor, Tree, dict[str, Tensor]]:
        """(losses [T], output [T, ...], the leaves that a gradient is wanted by).

        A task with a class index out of range has NaN for its loss: on a GPU nobody looks at
        values.

        Args:
            tensors: in the order of `given`.
            stacked: names of parameters that every task has its own of.
        """
        found = dict(zip(self.given.names, tensors, strict=True))
        leaves = {name: found[name].detach().requires_grad_() for name in self.wanted}
        found |= leaves
        params, batch, loss, buffers = self._placed(found)
        bad = None
        if self.classes and loss is not None and isinstance(batch.y, Tensor):
            wrong = ((batch.y < 0) | (batch.y >= self.classes)) & (batch.y != loss.ignore_index)
            bad = wrong.reshape(wrong.shape[0], -1).any(1)
            batch = replace(batch, y=batch.y.masked_fill(wrong, 0))
        losses, output = Evaluation(
            problem=self.p,
            params=params,
            stacked=frozenset(stacked),
            batch=batch,
            loss=loss,
            vectorised=True,
            buffers=buffers,
        ).run()
        if bad is not None:
            losses = losses * torch.ones_like(losses).masked_fill(bad, nan)
        return losses, output, leaves

    def example(self, names: Sequence[str]) -> list[Tensor]:
        """Tensors to trace with; `names`: of adapted parameters."""
        theta = {name: stack(self.p, name) for name in names}
        return self.given.tensors(self.p, self.buffers, theta, 0)

    def _placed(
        self, found: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Batch, Loss | None, dict[int, Tensor]]:
        """(parameters, set, loss, what stands for buffers), made of these tensors."""
        params = {name: found[f"params.{name}"] for name in self.p.params}
        batch = _inputs.with_parts(self.batch, self.role, found)
        weights = {name: found[f"loss.{name}"] for name in _WEIGHTS if f"loss.{name}" in found}
        loss = replace(self.loss, **weights) if self.loss is not None and weights else self.loss  # type: ignore[arg-type]
        buffers = {id(value): found[f"buffers.{name}"] for name, value in self.buffers.items()}
        return params, batch, loss, buffers
