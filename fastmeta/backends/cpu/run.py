"""One kind of call of the engine: what is fixed is worked out once, a call hands over tensors.

The engine takes care that they are what the plan says; it reads copies of those that are not dense.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastmeta.backends._losses import class_weights, reads_channels
from fastmeta.backends._native_rules import given_numbers, gradients_of_numbers
from fastmeta.backends._pieces import zeros
from fastmeta.backends._rules import unread_gradient
from fastmeta.backends.cpu import plan as plans
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients, Problem, Result

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

POISON = False
_MOST_THREADS: int = 1 if _C is None else _C.MOST_THREADS

Tensors = list[Tensor | None]

_BATCH_GRADIENTS = ("x", "y", "weights")
_VERDICTS = {1: ("support", "loss"), 2: ("query", "query_loss")}


#: Said wherever memory is made for the engine: the default device may be another one, "meta" for
#: example.
_CPU = torch.device("cpu")


class Job:
    """All calls that differ in nothing but the values of tensors."""

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool) -> None:
        program = problem.program
        if program is None:
            raise ValueError(f"a plan needs a captured network: {problem.refused}")
        self.wrt, self.adapted = wrt, adapted
        self.memory = plans.memory_mode(problem, wrt)
        self.plan = plans.make_plan(problem, wrt, self.memory)
        self.names, self.buffers = plans.used_params(program), plans.used_buffers(problem)
        self.dtype = problem.params[self.names[0]].dtype
        self.itemsize = self.dtype.itemsize
        self.output_shape, self.channels = program.output_shape, reads_channels(problem)
        # every parameter's place in one vector of gradients
        self.all_names = tuple(name for name, _ in program.params)
        self.templates = [
            torch.empty(problem.params[name].shape, dtype=self.dtype, device="meta")
            for name in self.all_names
        ]
        ends = _running_total(t.numel() for t in self.templates)
        self.flat_size = ends[-1]
        start = dict(zip(self.all_names, [0, *ends], strict=False))
        self.offsets = [start[name] for name in self.names]
        self.no_gradients: list[Tensor | None] = [None] * len(self.buffers)
        used = set(self.names)
        spans = zip(self.all_names, [0, *ends], ends, strict=False)
        self.unread = [(name, start, end) for name, start, end in spans if name not in used]
        self.some_unused = bool(self.unread)
        self.new = torch.zeros if self.some_unused else torch.empty
        # where rates are numbers the same dict comes with every call
        self.number_rate_list = self._one_rate(problem.rates)
        self.number_rates = None if self.number_rate_list is None else problem.rates
        self.input_gradients = bool(wrt - {"params", "lr"})
        self.adapted_shapes = {name: (problem.tasks, *shape) for name, shape in program.params}
        weights = problem.step_weights
        self.step_weights = list(weights) if weights is not None and problem.query_loss is not None else []

    def run(self, problem: Problem) -> Result:
        """The engine's answer."""
        tasks, wrt, rates, query = problem.tasks, self.wrt, problem.rates, problem.query
        names, dtype = self.names, self.dtype
        result = Result()
        grads = result.grads

        grad: Tensors = []
        offsets: list[int] = []
        if "params" in wrt:
            grad, offsets = self._parameter_gradients(problem, grads)
        rate_grad: Tensors = []
        if "lr" in wrt:
            grads.lr = {
                name: torch.zeros(rate.shape, dtype=dtype, device=_CPU) for name, rate in rates.items()
            }
            if problem.steps:  # else they stay zero
                rate_grad = [*map(grads.lr.get, names), *self.no_gradients]
        adapted: Tensors = []
        if self.adapted:
            result.adapted = self._adapted(problem)
            adapted = [*map(result.adapted.get, names), *self.no_gradients]
        seeds = problem.adapted_grad
        unread = self.unread if seeds is not None and "params" in wrt else ()
        output = losses = loss = None
        if query is not None:
            output = torch.empty((tasks, query.x.shape[1], *self.output_shape), dtype=dtype, device=_CPU)
            result.output = output
            if query.y is not None:
                losses = result.task_losses = torch.empty(tasks, dtype=dtype, device=_CPU)
                loss = result.loss = torch.empty((), dtype=dtype, device=_CPU)
        numbers = given_numbers(problem) if problem.hyper else None
        number_grads = None if numbers is None or "rule" not in wrt else torch.zeros_like(numbers)
        verdict = self.plan.run(
            tasks,
            min(torch.get_num_threads(), _MOST_THREADS),
            self._values(problem),
            self.number_rate_list or []
            if rates is self.number_rates
            else [*map(rates.get, names), *self.no_gradients],
            [] if seeds is None else [*map(seeds.get, names), *self.no_gradients],
            adapted,
            grad,
            offsets,
            rate_grad,
            self._batch("support", problem.support, problem.loss, grads),
            self._batch("query", query, problem.query_loss, grads),
            [problem.task_weights, problem.output_grad, losses, loss, output, numbers, number_grads],
            self.step_weights,
            POISON,
        )
        if verdict:
            self._refuse(verdict, problem)
        for name, start, end in unread:
            flat = grads.flat_params
            if flat is not None:
                flat[start:end] = unread_gradient(problem, name).reshape(-1)
        if "rule" in wrt:
            grads.rule = gradients_of_numbers(problem, number_grads)
        return result

    def _parameter_gradients(self, problem: Problem, grads: Gradients) -> tuple[Tensors, list[int]]:
        """Fresh memory for them: a tensor each, or one vector where that is preferred and where
        each lies in it."""
        if not problem.prefer_flat and not self.some_unused:  # cheaper than views of a vector
            own = grads.params = {
                name: torch.empty_like(value, memory_format=torch.contiguous_format)
                for name, value in problem.params.items()
            }
            if POISON:
                for value in own.values():
                    value.fill_(torch.nan)
            return [*map(own.get, self.names), *self.no_gradients], []
        flat = grads.flat_params = self.new(self.flat_size, dtype=self.dtype, device=_CPU)
        if POISON and not self.some_unused:
            flat.fill_(torch.nan)
        if not problem.prefer_flat:
            pieces = _unflatten_dense_tensors(flat, self.templates)
            grads.params = dict(zip(self.all_names, pieces, strict=True))
        return [flat], self.offsets

    def _values(self, problem: Problem) -> Tensors:
        """The parameters, and behind them the buffers."""
        params = problem.params
        values: Tensors = [params[name] for name in self.names]
        if self.buffers:
            values += [problem.net.get_buffer(name).to(self.dtype) for name in self.buffers]
        return values

    def _one_rate(self, rates: dict[str, Tensor]) -> Tensors | None:
        """Where all rates are one number, one tensor for all of them, which the engine looks at
        once."""
        given: Tensors = [*map(rates.get, self.names), *self.no_gradients]
        known = [rate for rate in given if rate is not None]
        if any(rate.numel() != 1 or rate.data_ptr() != known[0].data_ptr() for rate in known):
            return None
        return [None if rate is None else known[0] for rate in given]

    def _adapted(self, problem: Problem) -> dict[str, Tensor]:
        used = set(self.names)
        adapted = {}
        for name, shape in self.adapted_shapes.items():
            if name in used:
                adapted[name] = torch.empty(shape, dtype=self.dtype, device=_CPU)
            else:
                adapted[name] = problem.params[name].detach().expand(shape).clone()
        return adapted

    def _batch(self, which: str, batch: Batch | None, loss: Loss | None, grads: Gradients) -> Tensors:
        """x, y, weights, class weights and the gradients of the first three."""
        if batch is None:
            return []
        y = None if loss is None else batch.y
        weights = (
            None if loss is None else class_weights(loss, self.output_shape, self.channels, self.dtype, "cpu")
        )
        if not self.input_gradients:
            return [batch.x, y, batch.weights, weights, None, None, None]
        gradients: Tensors = []
        for field, tensor in zip(_BATCH_GRADIENTS, (batch.x, y, batch.weights), strict=True):
            key, grad = f"{which}_{field}", None
            if key in self.wrt and tensor is not None:
                grad = zeros(tensor.shape, self.dtype)
                setattr(grads, key, grad)
            gradients.append(grad)
        return [batch.x, y, batch.weights, weights, *gradients]

    def _refuse(self, verdict: int, problem: Problem) -> None:
        if verdict not in _VERDICTS:
            raise ValueError("learning rates must be finite numbers, got NaN or infinity among them")
        which, loss_field = _VERDICTS[verdict]
        batch, loss = getattr(problem, which), getattr(problem, loss_field)
        loss.check_values(f"`{which}_y`", batch.y, self.output_shape[0])
        raise ValueError(f"`{which}_y` must hold class indices in [0, {self.output_shape[0]})")


def _running_total(sizes: Iterable[int]) -> list[int]:
    total, ends = 0, []
    for size in sizes:
        total += size
        ends.append(total)
    return ends
