"""One kind of call of a machine: what is fixed is worked out once, a call hands over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends.machine.plan import Plan, make_plan
from fastmeta.backends.machine.programs import Programs
from fastmeta.inputs import Tree, first_leaf, mapped
from fastmeta.network.functional import isolated
from fastmeta.problem import Batch, Gradients, Problem, Result
from fastmeta.trace.ir import Space
from fastmeta.trace.step import Slot

POISON = False
_CPU = torch.device("cpu")
_DENSE = torch.contiguous_format
_MOST_THREADS = 1024


class Job:
    """All calls that differ in nothing but the values of tensors."""

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool, programs: Programs) -> None:
        self.wrt, self.adapted, self.programs = wrt, adapted, programs
        self.plan: Plan = make_plan(problem, wrt, programs)
        self.dtype = next(iter(problem.params.values())).dtype
        names = [slot.name for slot in self.plan.fixed]
        self.fixed = [name.removeprefix("fixed.") for name in names if name.startswith("fixed.")]
        self.rest = [name for name in names if not name.startswith("fixed.")]
        # where rates are numbers the same dict comes with every call, and was checked
        self.number_rates: dict[str, Tensor] | None = None
        weights = problem.step_weights
        self.step_weights = list(weights) if weights is not None and problem.query_loss is not None else []

    def run(self, problem: Problem) -> Result:
        """The machine's answer.

        Raises:
            IndexError: an index is out of range.
        """
        plan, wrt, tasks = self.plan, self.wrt, problem.tasks
        names = self.programs.adapted
        result, grads = Result(), Gradients()
        params = problem.params
        if "params" in wrt:
            grads.params = {name: _like(value) for name, value in params.items()}
        if "lr" in wrt:
            make = _like if problem.steps else torch.zeros_like
            grads.lr = {name: make(rate, memory_format=_DENSE) for name, rate in problem.rates.items()}
        adapted: list[Tensor | None] = []
        if self.adapted:
            result.adapted = self._adapted(problem)
            adapted = [result.adapted[name] for name in names]
        losses = loss = output = None
        query = problem.query
        if query is not None and plan.output is not None:
            output = torch.empty((tasks, plan.output.size), dtype=self.dtype, device=_CPU)
            if problem.query_loss is not None:
                losses = result.task_losses = torch.empty(tasks, dtype=self.dtype, device=_CPU)
                loss = result.loss = torch.empty((), dtype=self.dtype, device=_CPU)
        seeds = problem.adapted_grad
        found: dict[str, Tensor] = {}
        support = self._set(
            "support", problem, problem.support if problem.steps else None, plan.support, found
        )
        asked = self._set("query", problem, query, plan.query, found)
        outcome = plan.machine.run(
            tasks,
            min(torch.get_num_threads(), _MOST_THREADS),
            [params[name] for name in names],
            [problem.rates[name] for name in names],
            [] if seeds is None else [seeds[name] for name in names],
            adapted,
            [] if grads.params is None else [grads.params[name] for name in names],
            [] if grads.lr is None or not problem.steps else [grads.lr[name] for name in names],
            [*map(params.__getitem__, self.fixed), *(self._rest(problem) if self.rest else ())],
            []
            if grads.params is None
            else [*map(grads.params.__getitem__, self.fixed), *[None] * len(self.rest)],
            *support,
            *asked,
            [problem.task_weights, self._cotangents(problem) if wrt else None, losses, loss, output],
            self.step_weights,
            POISON,
        )
        if outcome:
            with isolated(_CPU):
                _inputs.check_class_indices(problem)  # says which, where it is one
            raise IndexError("index out of range in self")
        if seeds is not None and grads.params is not None:
            for name in self.programs.others:
                cotangent = seeds[name]
                grads.params[name] += cotangent if name in problem.per_task else cotangent.sum(0)
        if found:
            _inputs.put_parts(grads, problem, found)
        for name in _unused(problem, wrt):
            unused = getattr(problem.support, name.partition("_")[2])
            setattr(grads, name, mapped(torch.zeros_like, unused))
        result.grads = grads
        if output is not None:
            result.output = self._output(output)
        return result

    def _output(self, flat: Tensor) -> Tree:
        """The tree that the network returns, from [T, size]."""
        out = self.plan.output
        if out is None:
            raise ValueError("there is no query set")
        tasks = flat.shape[0]
        if len(out.shapes) == 1:
            return out.form.build([flat.reshape(tasks, *out.shapes[0]).to(out.dtypes[0])])
        leaves = [
            flat[:, at : at + torch.Size(shape).numel()].reshape(tasks, *shape).to(dtype)
            for at, shape, dtype in zip(out.offsets, out.shapes, out.dtypes, strict=True)
        ]
        return out.form.build(leaves)

    def _cotangents(self, problem: Problem) -> Tensor | None:
        """Those of the output, [T, size]."""
        out = self.plan.output
        if problem.output_grad is None or out is None:
            return None
        if isinstance(problem.output_grad, Tensor):
            return problem.output_grad
        flat = torch.zeros((problem.tasks, out.size), dtype=self.dtype, device=_CPU)
        for at, cotangent in zip(out.offsets, out.form.match(problem.output_grad), strict=True):
            if cotangent is not None:
                n = cotangent[0].numel()
                flat[:, at : at + n] = cotangent.reshape(problem.tasks, n)
        return flat

    def _rest(self, problem: Problem) -> list[Tensor]:
        """Buffers, and weights of losses."""
        found = []
        for name in self.rest:
            kind, _, key = name.partition(".")
            if kind == "buffer":
                found.append(self.programs.sources.value(problem.net, key).detach().to(self.dtype))
                continue
            losses = [loss for loss in (problem.loss, problem.query_loss) if loss is not None]
            value = next(v for loss in losses if (v := getattr(loss, key)) is not None)
            found.append(value.detach().to(self.dtype))
        return found

    def _adapted(self, problem: Problem) -> dict[str, Tensor]:
        found = {}
        for name, value in problem.params.items():
            shape = value.shape[1:] if name in problem.per_task else value.shape
            if name in self.programs.adapted:
                found[name] = torch.empty((problem.tasks, *shape), dtype=self.dtype, device=_CPU)
            else:
                own = (
                    value.detach()
                    if name in problem.per_task
                    else value.detach().expand(problem.tasks, *shape)
                )
                found[name] = own.clone(memory_format=torch.contiguous_format)
        return found

    def _set(
        self,
        role: str,
        problem: Problem,
        batch: Batch | None,
        slots: tuple[Slot, ...],
        found: dict[str, Tensor],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Tensors of a set in the order of its slots, and memory for their gradients."""
        if batch is None:
            return [], []
        parts = _parts(batch, role)
        given: list[Tensor | None] = []
        gradients: list[Tensor | None] = []
        for slot in slots:
            value = parts[slot.name] if slot.name in parts else self._integers(problem, batch, slot)
            given.append(value.to(torch.int64) if slot.space == Space.INTS else value)
            gradient = None
            if slot.gradient >= 0:
                gradient = found[slot.name] = torch.zeros(value.shape, dtype=self.dtype, device=_CPU)
            gradients.append(gradient)
        return given, gradients

    def _integers(self, problem: Problem, batch: Batch, slot: Slot) -> Tensor:
        """An integer buffer, the same for all tasks."""
        value = self.programs.sources.value(problem.net, slot.name.removeprefix("buffer.")).detach()
        lead = first_leaf(batch.x).shape[: 2 if batch.per_step else 1]
        return value.expand(*lead, *value.shape)


def _like(value: Tensor, memory_format: torch.memory_format = _DENSE) -> Tensor:
    """Memory for a gradient, which the machine fills."""
    return torch.empty_like(value, memory_format=memory_format)


def _parts(batch: Batch, role: str) -> dict[str, Tensor]:
    """As `_inputs.parts_of`, quickly where nothing is a tree."""
    x, y, weights = batch.x, batch.y, batch.weights
    if not isinstance(x, Tensor) or not (y is None or isinstance(y, Tensor)):
        return _inputs.parts_of(batch, role)
    found = {f"{role}_x": x}
    if y is not None:
        found[f"{role}_y"] = y
    if weights is not None:
        found[f"{role}_weights"] = weights
    return found


def _unused(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """Gradients by a support set that no step reads: zeros."""
    if problem.steps or problem.support is None:
        return []
    names = [name for name in ("support_x", "support_y", "support_weights") if name in wrt]
    return [name for name in names if getattr(problem.support, name.partition("_")[2]) is not None]
