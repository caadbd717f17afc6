"""One kind of call of a machine: what is fixed is worked out once, a call hands over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._native_rules import given_numbers, gradients_of_numbers
from fastmeta.backends._rule_tasks import check_start, start_of_all, through_start
from fastmeta.backends._sweep import stack
from fastmeta.backends.machine.plan import Plan, make_plan
from fastmeta.backends.machine.programs import Programs
from fastmeta.inputs import Tree, first_leaf, flatten, mapped
from fastmeta.network.functional import isolated
from fastmeta.ordinary import PLAIN
from fastmeta.problem import Batch, Problem, Result
from fastmeta.trace.ir import Space
from fastmeta.trace.rule import TracedRule
from fastmeta.trace.step import Slot

POISON = False
_CPU = torch.device("cpu")
_like = torch.empty_like
_DENSE = torch.contiguous_format
_MOST_THREADS = 1024

Tensors = list[Tensor | None]


class Job:
    """All calls that differ in nothing but the values of tensors."""

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool, programs: Programs) -> None:
        self.wrt, self.adapted, self.programs = wrt, adapted, programs
        self.plan: Plan = make_plan(problem, wrt, programs, adapted)
        self.dtype = next(iter(problem.params.values())).dtype
        names = [slot.name for slot in self.plan.fixed]
        self.fixed = [name.removeprefix("fixed.") for name in names if name.startswith("fixed.")]
        self.rest = [name for name in names if not name.startswith("fixed.")]
        rule = self.plan.rule
        self.numbers = [] if rule is None else [slot.name.removeprefix("rule.") for slot in rule.numbers]
        self.no_gradients: list[Tensor | None] = [None] * len(self.rest)
        # where rates are numbers the same dict comes with every call, and was checked
        self.number_rates: dict[str, Tensor] | None = None
        weights = problem.step_weights
        self.step_weights = list(weights) if weights is not None and problem.query_loss is not None else []
        self.unused = _unused(problem, wrt)
        out = self.plan.output
        self._plain = out is not None and out.plain and out.dtypes[0] == self.dtype
        self._results = self._templates(problem)
        self._sets = {
            role: _Set(role, slots)
            for role, slots in (("support", self.plan.support), ("query", self.plan.query))
        }

    def run(self, problem: Problem) -> Result:
        """The machine's answer.

        Raises:
            IndexError: an index is out of range.
        """
        plan, wrt, params, rates = self.plan, self.wrt, problem.params, problem.rates
        names, fixed = self.programs.adapted, self.fixed
        result = Result()
        grads = result.grads
        own: dict[str, Tensor] = {}
        if "params" in wrt:
            own = grads.params = {name: _like(value, memory_format=_DENSE) for name, value in params.items()}
        rate_grads: Tensors = []
        if "lr" in wrt:
            make = _like if problem.steps else torch.zeros_like
            grads.lr = {name: make(rate, memory_format=_DENSE) for name, rate in rates.items()}
            if problem.steps:
                rate_grads = [*map(grads.lr.__getitem__, names)]
        adapted: Tensors = []
        if self.adapted:
            result.adapted = self._adapted(problem)
            adapted = [*map(result.adapted.__getitem__, names)]
        losses, loss, output = [None if x is None else _like(x, memory_format=_DENSE) for x in self._results]
        result.task_losses, result.loss = losses, loss
        seeds = problem.adapted_grad
        found: dict[str, Tensor] = {}
        numbers = given_numbers(problem) if problem.hyper else None
        number_grads = None if numbers is None or "rule" not in wrt else torch.zeros_like(numbers)
        own_numbers = [problem.hyper[name].detach() for name in self.numbers]
        own_number_grads = {}
        if "rule" in wrt:
            pairs = zip(self.numbers, own_numbers, strict=True)
            own_number_grads = {name: torch.zeros_like(value, memory_format=_DENSE) for name, value in pairs}
        state: list[Tensor] = [] if plan.rule is None else start_of_rule(problem, plan.rule)
        sbar: list[Tensor] = []
        if own and plan.rule is not None and plan.rule.reaches:
            sbar = [_like(value, memory_format=_DENSE) for value in state]
        outcome = plan.machine.run(
            problem.tasks,
            min(torch.get_num_threads(), _MOST_THREADS),
            [*map(params.__getitem__, names)],
            [*map(rates.__getitem__, names)],
            [] if seeds is None else [*map(seeds.__getitem__, names)],
            adapted,
            [*map(own.__getitem__, names)] if own else [],
            rate_grads,
            [*map(params.__getitem__, fixed), *(self._rest(problem) if self.rest else ()), *own_numbers],
            self._fixed_gradients(own, own_number_grads),
            *self._set("support", problem, problem.support if problem.steps else None, found),
            *self._set("query", problem, problem.query, found),
            state,
            sbar,
            [
                problem.task_weights,
                self._cotangents(problem) if wrt else None,
                losses,
                loss,
                output,
                numbers,
                number_grads,
            ],
            self.step_weights,
            POISON,
        )
        if outcome:
            with isolated(_CPU):
                _inputs.check_class_indices(problem)  # says which, where it is one
            raise IndexError("index out of range in self")
        if sbar:
            self._through_start(problem, sbar, own)
        if seeds is not None and own:
            for name in self.programs.others:
                cotangent = seeds[name]
                own[name] += cotangent if name in problem.per_task else cotangent.sum(0)
        if "rule" in wrt:
            grads.rule = own_number_grads if self.numbers else gradients_of_numbers(problem, number_grads)
        if found:
            _inputs.put_parts(grads, problem, found)
        for name in self.unused:
            unused = getattr(problem.support, name.partition("_")[2])
            setattr(grads, name, mapped(torch.zeros_like, unused))
        if output is not None:
            result.output = output if self._plain else self._output(output)
        return result

    def _through_start(self, problem: Problem, sbar: list[Tensor], own: dict[str, Tensor]) -> None:
        """Add what of dJ/dtheta comes from the state before the first step."""
        if problem.rule is None or self.plan.rule is None:
            raise ValueError("there is no rule")
        floating = [by for by, given in zip(sbar, self.plan.rule.floating, strict=True) if given]
        with isolated(_CPU):
            found = through_start(problem.rule, {n: stack(problem, n) for n in problem.rates}, floating)
        for name, by in found.items():
            own[name] += by if name in problem.per_task else by.sum(0)

    def _fixed_gradients(self, own: dict[str, Tensor], numbers: dict[str, Tensor]) -> Tensors:
        """Memory for the gradients of what does not adapt, in the order of the machine."""
        if not own and not numbers:
            return []
        return [*map(own.get, self.fixed), *self.no_gradients, *map(numbers.get, self.numbers)]

    def _templates(self, problem: Problem) -> Tensors:
        """Tensors like the task losses, the loss and the output, without memory of their size: to
        make others from them is faster than from a shape."""
        one, tasks, out = torch.empty((), dtype=self.dtype, device=_CPU), problem.tasks, self.plan.output
        if problem.query is None or out is None:
            return [None, None, None]
        output = one.expand(tasks, *(out.shapes[0] if self._plain else (out.size,)))
        return [one.expand(tasks), one, output] if problem.query_loss is not None else [None, None, output]

    def _output(self, flat: Tensor) -> Tree:
        """The tree that the network returns, from [T, size]."""
        out = self.plan.output
        if out is None:
            raise ValueError("there is no query set")
        tasks = flat.shape[0]
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
        self, role: str, problem: Problem, batch: Batch | None, found: dict[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """Tensors of a set in the order of its slots, and memory for their gradients."""
        if batch is None:
            return [], []
        known = self._sets[role]
        given: Tensors
        if known.single and batch.x.__class__ in PLAIN:
            given = [getattr(batch, name) for name in known.single]
        else:
            parts = _inputs.parts_of(batch, role)
            given = [
                parts[slot.name] if slot.name in parts else self._integers(problem, batch, slot)
                for slot in known.slots
            ]
        for at in known.integers:
            if given[at].dtype != torch.int64:  # type: ignore[union-attr]
                given[at] = given[at].to(torch.int64)  # type: ignore[union-attr]
        if not known.wanted:
            return given, []
        gradients: Tensors = [None] * len(given)
        for at in known.wanted:
            shape = given[at].shape  # type: ignore[union-attr]
            gradients[at] = found[known.slots[at].name] = torch.zeros(shape, dtype=self.dtype, device=_CPU)
        return given, gradients

    def _integers(self, problem: Problem, batch: Batch, slot: Slot) -> Tensor:
        """An integer buffer, the same for all tasks."""
        value = self.programs.sources.value(problem.net, slot.name.removeprefix("buffer.")).detach()
        lead = first_leaf(batch.x).shape[: 2 if batch.per_step else 1]
        return value.expand(*lead, *value.shape)


class _Set:
    """The tensors of a set, in the order in which the machine takes them.

    Args:
        role: "support" or "query".
        slots: their places.
    """

    def __init__(self, role: str, slots: tuple[Slot, ...]) -> None:
        self.slots = slots
        self.integers = [at for at, slot in enumerate(slots) if slot.space == Space.INTS]
        self.wanted = [at for at, slot in enumerate(slots) if slot.gradient >= 0]
        fields = {f"{role}_{name}": name for name in ("x", "y", "weights")}
        names = [fields.get(slot.name) for slot in slots]
        #: Fields of `Batch`, where each is one tensor.
        self.single = tuple(name for name in names if name is not None) if all(names) else ()


def start_of_rule(problem: Problem, rule: TracedRule) -> list[Tensor]:
    """The state before the first step of a rule of the user's own, of all tasks: a tensor for each
    leaf.

    Raises:
        ValueError: it is not what it was when the rule was traced, or depends on a tensor that
            requires grad.
    """
    if problem.rule is None:
        raise ValueError("there is no rule")
    own = [name for name in problem.rates if name in problem.per_task]
    first = {name: problem.params[name].detach() for name in problem.rates}
    with isolated(_CPU), torch.enable_grad():
        if own:
            leaves, form = flatten(start_of_all(problem.rule, {n: stack(problem, n).detach() for n in first}))
        else:
            leaves, form = flatten(problem.rule.init(first))
            leaves = [leaf.expand(problem.tasks, *leaf.shape) for leaf in leaves]
        check_start(leaves, {})
    shapes = [tuple(leaf.shape[1:]) for leaf in leaves]
    leaves = [leaf.detach().to(next(iter(first.values())).dtype) for leaf in leaves]
    if form != rule.form or shapes != [slot.shape for slot in rule.state]:
        raise ValueError("CustomRule: `init` must return a state of the same form and shapes at every call")
    return leaves


def _unused(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """Gradients by a support set that no step reads: zeros."""
    if problem.steps or problem.support is None:
        return []
    names = [name for name in ("support_x", "support_y", "support_weights") if name in wrt]
    return [name for name in names if getattr(problem.support, name.partition("_")[2]) is not None]
