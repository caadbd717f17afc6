"""One kind of call of the engine: what is fixed is worked out once, a call hands over addresses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastmeta.backends import _cpu_plan as plans
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients, Problem, Result

POISON = False

_BATCH_GRADIENTS = ("x", "y", "weights")
_VERDICTS = {1: ("support", "loss"), 2: ("query", "query_loss")}


class Job:
    """All calls that differ in nothing but the values of tensors."""

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool) -> None:
        program = problem.program
        if program is None:
            raise ValueError(f"a plan needs a captured network: {problem.refused}")
        self.wrt, self.adapted = wrt, adapted
        self.memory = plans.memory_mode(problem, wrt)
        self.plan = plans.make_plan(problem, wrt, self.memory)
        self.names = plans.used_params(program)
        self.dtype = problem.params[self.names[0]].dtype
        self.itemsize = self.dtype.itemsize
        self.output_shape = program.output_shape
        # every parameter's place in one vector of gradients
        self.all_names = tuple(name for name, _ in program.params)
        self.templates = [torch.empty(problem.params[name].shape, dtype=self.dtype, device="meta") for name in self.all_names]
        ends = _running_total(t.numel() for t in self.templates)
        self.flat_size = ends[-1]
        start = dict(zip(self.all_names, [0, *ends], strict=False))
        self.offsets = [start[name] * self.itemsize for name in self.names]
        self.some_unused = len(self.names) < len(self.all_names)
        self.new = torch.zeros if self.some_unused else torch.empty
        self.adapted_shapes = {name: (problem.tasks, *shape) for name, shape in program.params}
        weights = problem.step_weights
        self.step_weights = list(weights) if weights is not None and problem.query_loss is not None else []

    def run(self, problem: Problem) -> Result:
        """The engine's answer."""
        keep: list[Tensor] = []  # whatever the addresses below point to
        address = _Addresses(keep)
        tasks, wrt, params, rates = problem.tasks, self.wrt, problem.params, problem.rates
        result = Result()
        grads = result.grads

        base = 0
        if "params" in wrt:
            flat = self.new(self.flat_size, dtype=self.dtype)
            if POISON and not self.some_unused:
                flat.fill_(torch.nan)
            base = flat.data_ptr()
            grads.flat_params = flat
            pieces = _unflatten_dense_tensors(flat, self.templates)
            grads.params = dict(zip(self.all_names, pieces, strict=True))
        if "lr" in wrt:
            grads.lr = {name: torch.zeros(rate.shape, dtype=self.dtype) for name, rate in rates.items()}
        if self.adapted:
            result.adapted = self._adapted(problem)

        addresses: list[int] = []
        for name, offset in zip(self.names, self.offsets, strict=True):
            rate = rates.get(name)
            addresses += (
                address(params[name]),
                0 if rate is None else address(rate),
                0 if problem.adapted_grad is None else address(problem.adapted_grad[name]),
                0 if result.adapted is None else result.adapted[name].data_ptr(),
                base + offset if base else 0,
                0 if grads.lr is None or rate is None else grads.lr[name].data_ptr(),
            )
        addresses += self._batch("support", problem.support, problem.loss, grads, address)
        addresses += self._batch("query", problem.query, problem.query_loss, grads, address)
        query = problem.query
        losses = output = 0
        if query is not None:
            result.output = torch.empty((tasks, query.x.shape[1], *self.output_shape), dtype=self.dtype)
            output = result.output.data_ptr()
            if query.y is not None:
                result.task_losses = torch.empty(tasks, dtype=self.dtype)
                losses = result.task_losses.data_ptr()
        addresses += (
            0 if problem.task_weights is None else address(problem.task_weights),
            0 if problem.output_grad is None else address(problem.output_grad),
            losses,
            output,
        )
        verdict = self.plan.run(tasks, torch.get_num_threads(), addresses, self.step_weights, POISON)
        if verdict:
            self._refuse(verdict, problem)
        return result

    def _adapted(self, problem: Problem) -> dict[str, Tensor]:
        used = set(self.names)
        adapted = {}
        for name, shape in self.adapted_shapes.items():
            if name in used:
                adapted[name] = torch.empty(shape, dtype=self.dtype)
            else:
                adapted[name] = problem.params[name].detach().expand(shape).clone()
        return adapted

    def _batch(
        self, which: str, batch: Batch | None, loss: Loss | None, grads: Gradients, address: _Addresses
    ) -> tuple[int, ...]:
        """x, y, weights, class weights and the gradients of the first three."""
        if batch is None:
            return (0, 0, 0, 0, 0, 0, 0)
        tensors = (batch.x, batch.y, batch.weights)
        out = []
        for field, tensor in zip(_BATCH_GRADIENTS, tensors, strict=True):
            key = f"{which}_{field}"
            if key in self.wrt and tensor is not None:
                grad = torch.zeros(tensor.shape, dtype=self.dtype)
                setattr(grads, key, grad)
                out.append(grad.data_ptr())
            else:
                out.append(0)
        class_weights = None if loss is None else self._class_weights(loss)
        return (
            address(batch.x),
            0 if batch.y is None or loss is None else address(batch.y),
            0 if batch.weights is None else address(batch.weights),
            0 if class_weights is None else address(class_weights),
            *out,
        )

    def _class_weights(self, loss: Loss) -> Tensor | None:
        """Class weights [C], or pos_weight spread over the last dimension."""
        if loss.kind == "bce_with_logits" and loss.pos_weight is not None:
            last = self.output_shape[-1] if self.output_shape else 1
            return loss.pos_weight.to(self.dtype).reshape(-1).expand(last)
        return None if loss.weight is None else loss.weight.to(self.dtype)

    def _refuse(self, verdict: int, problem: Problem) -> None:
        if verdict not in _VERDICTS:
            raise ValueError("learning rates must be finite numbers, got NaN or infinity among them")
        which, loss_field = _VERDICTS[verdict]
        batch, loss = getattr(problem, which), getattr(problem, loss_field)
        loss.check_values(f"`{which}_y`", batch.y, self.output_shape[0])
        raise ValueError(f"`{which}_y` must hold class indices in [0, {self.output_shape[0]})")


class _Addresses:
    """Addresses of tensors, dense copies where they are not; all of them stay alive in `keep`."""

    __slots__ = ("_keep",)

    def __init__(self, keep: list[Tensor]) -> None:
        self._keep = keep

    def __call__(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous():
            tensor = tensor.detach().contiguous()
            self._keep.append(tensor)
        return int(tensor.data_ptr())


def _running_total(sizes: Iterable[int]) -> list[int]:
    total, ends = 0, []
    for size in sizes:
        total += size
        ends.append(total)
    return ends
