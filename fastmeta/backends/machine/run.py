"""One kind of call of a machine: what is fixed is worked out once, a call hands over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends.machine.plan import Plan, Programs, make_plan
from fastmeta.problem import Batch, Gradients, Problem, Result
from fastmeta.trace.ir import Space
from fastmeta.trace.step import Slot

POISON = False
_CPU = torch.device("cpu")
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
            grads.params = {
                name: torch.zeros(value.shape, dtype=value.dtype, device=_CPU) for name, value in params.items()
            }
        if "lr" in wrt:
            grads.lr = {
                name: torch.zeros(rate.shape, dtype=self.dtype, device=_CPU)
                for name, rate in problem.rates.items()
            }
        adapted: list[Tensor | None] = []
        if self.adapted:
            result.adapted = self._adapted(problem)
            adapted = [result.adapted[name] for name in names]
        losses = loss = output = None
        query = problem.query
        if query is not None:
            output = result.output = torch.empty((tasks, *plan.output_shape), dtype=self.dtype, device=_CPU)
            if problem.query_loss is not None:
                losses = result.task_losses = torch.empty(tasks, dtype=self.dtype, device=_CPU)
                loss = result.loss = torch.empty((), dtype=self.dtype, device=_CPU)
        seeds = problem.adapted_grad
        support = self._set("support", problem.support if problem.steps else None, plan.support, grads)
        asked = self._set("query", query, plan.query, grads)
        outcome = plan.machine.run(
            tasks,
            min(torch.get_num_threads(), _MOST_THREADS),
            [params[name] for name in names],
            [problem.rates[name] for name in names],
            [] if seeds is None else [seeds[name] for name in names],
            adapted,
            [] if grads.params is None else [grads.params[name] for name in names],
            [] if grads.lr is None or not problem.steps else [grads.lr[name] for name in names],
            [*(params[name] for name in self.fixed), *self._rest(problem)],
            []
            if grads.params is None
            else [*(grads.params[name] for name in self.fixed), *[None] * len(self.rest)],
            *support,
            *asked,
            [problem.task_weights, problem.output_grad if wrt else None, losses, loss, output],
            self.step_weights,
            POISON,
        )
        if outcome:
            raise IndexError("index out of range in self")
        if seeds is not None and grads.params is not None:
            for name in self.programs.others:
                cotangent = seeds[name]
                grads.params[name] += cotangent if name in problem.per_task else cotangent.sum(0)
        result.grads = grads
        return result

    def _rest(self, problem: Problem) -> list[Tensor]:
        """Buffers, and weights of losses."""
        found = []
        for name in self.rest:
            kind, _, key = name.partition(".")
            if kind == "buffer":
                found.append(self.programs.sources.value(key).detach().to(self.dtype))
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
                own = value.detach() if name in problem.per_task else value.detach().expand(problem.tasks, *shape)
                found[name] = own.clone(memory_format=torch.contiguous_format)
        return found

    def _set(
        self, role: str, batch: Batch | None, slots: tuple[Slot, ...], grads: Gradients
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Tensors of a set in the order of its slots, and memory for their gradients."""
        if batch is None:
            return [], []
        given: list[Tensor | None] = []
        gradients: list[Tensor | None] = []
        for slot in slots:
            value = self._entry(batch, slot, role)
            given.append(value)
            gradient = None
            if slot.gradient >= 0:
                gradient = torch.zeros(value.shape, dtype=self.dtype, device=_CPU)
                setattr(grads, f"{role}_{slot.name}", gradient)
            gradients.append(gradient)
        return given, gradients

    def _entry(self, batch: Batch, slot: Slot, role: str) -> Tensor:
        if slot.name.startswith("buffer."):  # an integer buffer, the same for all tasks
            value = self.programs.sources.value(slot.name.removeprefix("buffer.")).detach()
            lead = batch.x.shape[: 2 if batch.per_step else 1]
            value = value.expand(*lead, *value.shape)
        else:
            value = getattr(batch, slot.name)
        if slot.space == Space.INTS:
            return value.detach().to(torch.int64)
        return value


def check(problem: Problem) -> None:
    """Check what only values show: learning rates, class indices.

    Raises:
        ValueError: names what is wrong.
    """
    _inputs.check_rates(problem)
