"""One kind of call of the engine: what is fixed is worked out once, a call hands over addresses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastmeta.backends._losses import class_weights, reads_channels
from fastmeta.backends._pieces import zeros
from fastmeta.backends.cpu import plan as plans
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients, Problem, Result

POISON = False

_BATCH_GRADIENTS = ("x", "y", "weights")
_VERDICTS = {1: ("support", "loss"), 2: ("query", "query_loss")}


#: Said wherever memory is made for the engine: the default device may be another one, "meta" for example.
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
            torch.empty(problem.params[name].shape, dtype=self.dtype, device="meta") for name in self.all_names
        ]
        ends = _running_total(t.numel() for t in self.templates)
        self.flat_size = ends[-1]
        start = dict(zip(self.all_names, [0, *ends], strict=False))
        self.offsets = [start[name] * self.itemsize for name in self.names]
        self.no_gradients = [0] * len(self.buffers)
        self.some_unused = len(self.names) < len(self.all_names)
        self.new = torch.zeros if self.some_unused else torch.empty
        self.constant_rates: tuple[dict[str, Tensor] | None, list[int]] = (None, [])
        self.input_gradients = bool(wrt - {"params", "lr"})
        self.adapted_shapes = {name: (problem.tasks, *shape) for name, shape in program.params}
        weights = problem.step_weights
        self.step_weights = list(weights) if weights is not None and problem.query_loss is not None else []

    def run(self, problem: Problem) -> Result:
        """The engine's answer."""
        keep: list[Tensor] = []  # dense copies, alive until the engine is done
        tasks, wrt, rates, query = problem.tasks, self.wrt, problem.rates, problem.query
        names, dtype = self.names, self.dtype
        result = Result()
        grads = result.grads

        grad: list[int] = []
        if "params" in wrt:
            grad = self._parameter_gradients(problem, grads) + self.no_gradients
        rate_grad: list[int] = []
        if "lr" in wrt:
            grads.lr = {name: torch.zeros(rate.shape, dtype=dtype, device=_CPU) for name, rate in rates.items()}
            rate_grad = [grads.lr[name].data_ptr() if name in rates else 0 for name in names] + self.no_gradients
        adapted: list[int] = []
        if self.adapted:
            result.adapted = self._adapted(problem)
            adapted = [result.adapted[name].data_ptr() for name in names] + self.no_gradients
        seeds = problem.adapted_grad
        output = losses = loss = 0
        if query is not None:
            result.output = torch.empty((tasks, query.x.shape[1], *self.output_shape), dtype=dtype, device=_CPU)
            output = result.output.data_ptr()
            if query.y is not None:
                result.task_losses = torch.empty(tasks, dtype=dtype, device=_CPU)
                result.loss = torch.empty((), dtype=dtype, device=_CPU)
                losses, loss = result.task_losses.data_ptr(), result.loss.data_ptr()
        verdict = self.plan.run(
            tasks,
            torch.get_num_threads(),
            _addresses(self._values(problem, keep), keep),
            self._rate_addresses(rates, keep),
            [] if seeds is None else _addresses([seeds[name] for name in names], keep) + self.no_gradients,
            adapted,
            grad,
            rate_grad,
            self._batch("support", problem.support, problem.loss, grads, keep),
            self._batch("query", query, problem.query_loss, grads, keep),
            [*_addresses([problem.task_weights, problem.output_grad], keep), losses, loss, output],
            self.step_weights,
            POISON,
        )
        if verdict:
            self._refuse(verdict, problem)
        return result

    def _parameter_gradients(self, problem: Problem, grads: Gradients) -> list[int]:
        """Fresh memory for them, in one vector where that is preferred; its addresses."""
        if not problem.prefer_flat and not self.some_unused:  # cheaper than views of a vector
            own = grads.params = {
                name: torch.empty_like(value, memory_format=torch.contiguous_format)
                for name, value in problem.params.items()
            }
            if POISON:
                for value in own.values():
                    value.fill_(torch.nan)
            return [own[name].data_ptr() for name in self.names]
        flat = grads.flat_params = self.new(self.flat_size, dtype=self.dtype, device=_CPU)
        if POISON and not self.some_unused:
            flat.fill_(torch.nan)
        if not problem.prefer_flat:
            pieces = _unflatten_dense_tensors(flat, self.templates)
            grads.params = dict(zip(self.all_names, pieces, strict=True))
        base = flat.data_ptr()
        return [base + offset for offset in self.offsets]

    def _values(self, problem: Problem, keep: list[Tensor]) -> list[Tensor | None]:
        """The parameters, and behind them the buffers."""
        params = problem.params
        values: list[Tensor | None] = [params[name] for name in self.names]
        if self.buffers:
            buffers = [problem.net.get_buffer(name).to(self.dtype) for name in self.buffers]
            keep += buffers  # some may be copies
            values += buffers
        return values

    def _rate_addresses(self, rates: dict[str, Tensor], keep: list[Tensor]) -> list[int]:
        if rates is not self.constant_rates[0]:  # the same dict comes again and again where rates are numbers
            addresses = _addresses([rates.get(name) for name in self.names], keep) + self.no_gradients
            if keep:
                return addresses
            self.constant_rates = (rates, addresses)
        return self.constant_rates[1]

    def _adapted(self, problem: Problem) -> dict[str, Tensor]:
        used = set(self.names)
        adapted = {}
        for name, shape in self.adapted_shapes.items():
            if name in used:
                adapted[name] = torch.empty(shape, dtype=self.dtype, device=_CPU)
            else:
                adapted[name] = problem.params[name].detach().expand(shape).clone()
        return adapted

    def _batch(
        self, which: str, batch: Batch | None, loss: Loss | None, grads: Gradients, keep: list[Tensor]
    ) -> list[int]:
        """x, y, weights, class weights and the gradients of the first three."""
        if batch is None:
            return []
        y = None if loss is None else batch.y
        weights = None if loss is None else class_weights(loss, self.output_shape, self.channels, self.dtype, "cpu")
        if weights is not None:  # perhaps of another dtype than the loss has them: nobody else holds those
            keep.append(weights)
        addresses = _addresses([batch.x, y, batch.weights, weights], keep)
        if not self.input_gradients:
            return [*addresses, 0, 0, 0]
        for field, tensor in zip(_BATCH_GRADIENTS, (batch.x, y, batch.weights), strict=True):
            key = f"{which}_{field}"
            if key in self.wrt and tensor is not None:
                grad = zeros(tensor.shape, self.dtype)
                setattr(grads, key, grad)
                addresses.append(grad.data_ptr())
            else:
                addresses.append(0)
        return addresses

    def _refuse(self, verdict: int, problem: Problem) -> None:
        if verdict not in _VERDICTS:
            raise ValueError("learning rates must be finite numbers, got NaN or infinity among them")
        which, loss_field = _VERDICTS[verdict]
        batch, loss = getattr(problem, which), getattr(problem, loss_field)
        loss.check_values(f"`{which}_y`", batch.y, self.output_shape[0])
        raise ValueError(f"`{which}_y` must hold class indices in [0, {self.output_shape[0]})")


def _addresses(tensors: list[Tensor | None], keep: list[Tensor]) -> list[int]:
    """Where each tensor lies, 0 for none; a dense copy, put into `keep`, stands for one that is not dense or that is
    to be read with the opposite sign (`torch.imag` of a conjugate)."""
    addresses = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
        elif tensor.is_contiguous() and not tensor.is_neg():
            addresses.append(tensor.data_ptr())
        else:
            keep.append(tensor.detach().resolve_neg().contiguous())
            addresses.append(keep[-1].data_ptr())
    return addresses


def _running_total(sizes: Iterable[int]) -> list[int]:
    total, ends = 0, []
    for size in sizes:
        total += size
        ends.append(total)
    return ends
