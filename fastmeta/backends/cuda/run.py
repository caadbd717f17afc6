"""One kind of call of the CUDA kernels: what is fixed is worked out once, a call writes addresses
down and launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.backends._losses import class_weights, reads_channels
from fastmeta.backends._precision import asked_for
from fastmeta.backends._rules import NUMBERS, gradients_of_numbers, plain_numbers, unread_gradient
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda.launch import Kernels, chip, kernels_for
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients, Problem, Result

POISON = False

_FIELDS = ("x", "y", "weights")
_SUM_COLUMNS, _SUM_THREADS = 32, 512  # csrc/cuda/kernel.h: SUM_COLUMNS, RANGES * SUM_COLUMNS


class Job:
    """All calls that differ in nothing but the values of tensors."""

    def __init__(self, problem: Problem, wrt: frozenset[str], adapted: bool) -> None:
        self.wrt, self.adapted, self.precision = wrt, adapted, asked_for()
        first = next(iter(problem.params.values()))
        self.device, self.dtype = first.device, first.dtype
        self.plan = make_plan(problem, wrt)
        self.kernels: Kernels = kernels_for(self.plan, self.device)
        program = problem.program
        if program is None:
            raise ValueError(f"a plan needs a captured network: {problem.refused}")
        self.output_shape, self.channels = program.output_shape, reads_channels(problem)
        self.shapes = dict(program.params)
        self.names = [param.name for param in self.plan.params if not param.buffer]
        self.buffers = [param.name for param in self.plan.params if param.buffer]
        self.unused = [name for name in self.shapes if name not in set(self.names)]
        weights = problem.step_weights
        if weights is None or problem.query_loss is None:
            weights = (0.0,) * self.plan.steps + (1.0,)
        self.step_weights = [_bits(weight) for weight in weights]
        rule = problem.rule
        self.rule = [_bits(0.0 if rule is None else number) for number in _numbers(rule)]
        self.numbers: list[int] = []
        self.learned = [name for name in NUMBERS if rule is not None and name in rule.learned]
        if rule is not None and self.plan.rule.general:
            self.numbers = [_bits(number) for number in plain_numbers(rule)]
        self.blocks = self.kernels.blocks(problem.tasks)
        # gradients of shared parameters stand side by side among the sums, in the network's order
        self.flat_size = sum(p.numel for p in self.plan.params if not p.buffer)
        self.is_flat = not self.unused and not any(p.per_task for p in self.plan.params)

    def fits(self, wrt: frozenset[str], adapted: bool) -> bool:
        """Whether a problem of the same shapes and options can be answered, as the user wants its
        products now."""
        return self.wrt == wrt and self.adapted == adapted and self.precision == asked_for()

    def run(self, problem: Problem) -> Result:
        """The kernels' answer; nothing is waited for."""
        keep: list[Tensor] = []  # dense copies, alive until all is launched
        plan, wrt, tasks = self.plan, self.wrt, problem.tasks
        result = Result()
        grads = result.grads
        losses = 0
        sums = bool(wrt) or problem.query_loss is not None
        if problem.query is not None:
            result.output = self._empty(tasks, problem.query.x.shape[1], *self.output_shape)
            if problem.query_loss is not None:
                result.task_losses = self._empty(tasks)
                losses = result.task_losses.data_ptr()
        partial = self._empty(tasks, plan.columns) if sums else None
        total = self._empty(plan.columns) if sums else None
        workspace = self._empty(self.blocks, plan.workspace) if plan.workspace else None
        own = self._per_task(problem, result)
        words = [
            *self._rule_words(problem, keep),
            *(tasks, _address(workspace), _address(partial)),
            *self._batch("support", problem.support, problem.loss, grads, keep),
            *self._batch("query", problem.query, problem.query_loss, grads, keep),
            *_dense([problem.task_weights, problem.output_grad], keep),
            *(losses, _address(result.output), *self.rule),
            *self._params(problem, own, keep),
            *self.step_weights,
        ]
        self.kernels.launch(
            "fastmeta_meta_step", self.blocks, plan.ranks, plan.threads, plan.shared_bytes, words
        )
        if total is not None:
            blocks = -(-plan.columns // _SUM_COLUMNS)
            shared = _SUM_THREADS * self.dtype.itemsize
            words = [tasks, plan.columns, _address(partial), total.data_ptr()]
            self.kernels.launch("fastmeta_sum", blocks, 1, _SUM_THREADS, shared, words)
            if problem.query_loss is not None:
                result.loss = total[plan.columns - 1]
            self._sums(problem, total, own, grads)
        return result

    def _rule_words(self, problem: Problem, keep: list[Tensor]) -> list[int]:
        """csrc/cuda/args.h: RuleArgs."""
        if not self.plan.rule.general:
            return []
        given = None
        if self.learned:
            given = self._empty(problem.steps, len(NUMBERS))
            for name in self.learned:
                given[:, NUMBERS.index(name)] = problem.hyper[name].detach()
        return [*self.numbers, *_dense([given], keep)]

    def _empty(self, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.fill_(torch.nan) if POISON else made

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape), dtype=self.dtype, device=self.device)

    # ---- what a task writes by itself: adapted parameters, gradients of what every task has its
    # own of -----
    def _per_task(self, problem: Problem, result: Result) -> dict[str, dict[str, Tensor]]:
        own: dict[str, dict[str, Tensor]] = {"adapted": {}, "grad": {}, "rate": {}}
        tasks = problem.tasks
        if self.adapted:
            own["adapted"] = {name: self._empty(tasks, *self.shapes[name]) for name in self.names}
            result.adapted = {
                name: own["adapted"][name]
                if name in own["adapted"]
                else problem.params[name].detach().expand(tasks, *shape).clone()
                for name, shape in self.shapes.items()
            }
        for param in self.plan.params:
            if param.per_task and "params" in self.wrt:
                own["grad"][param.name] = self._empty(tasks, *self.shapes[param.name])
            if param.rate_per_task and self.plan.flags["wants_rates"]:
                own["rate"][param.name] = self._empty(*problem.rates[param.name].shape)
        return own

    def _params(self, problem: Problem, own: dict[str, dict[str, Tensor]], keep: list[Tensor]) -> list[int]:
        rates, seeds = problem.rates, problem.adapted_grad
        data = _dense([problem.params[name] for name in self.names], keep)
        rate = _dense([rates.get(name) for name in self.names], keep)
        seed = _dense([None if seeds is None else seeds[name] for name in self.names], keep)
        words = []
        for i, name in enumerate(self.names):
            words += [
                data[i],
                rate[i],
                seed[i],
                *(_address(own[what].get(name)) for what in ("adapted", "grad", "rate")),
            ]
        for buffer in _dense(
            [problem.net.get_buffer(name).to(self.device, self.dtype) for name in self.buffers], keep
        ):
            words += [buffer, 0, 0, 0, 0, 0]
        return words

    def _sums(
        self, problem: Problem, total: Tensor, own: dict[str, dict[str, Tensor]], grads: Gradients
    ) -> None:
        """Views of the sums over tasks, and what belongs beside them."""
        params = {param.name: param for param in self.plan.params if not param.buffer}
        if "params" in self.wrt:
            if self.is_flat and problem.prefer_flat:
                grads.flat_params = total[: self.flat_size]
            grads.params = {}
            for name, shape in self.shapes.items():
                if name not in params:
                    grads.params[name] = unread_gradient(problem, name)
                elif name in own["grad"]:
                    grads.params[name] = own["grad"][name]
                else:
                    param = params[name]
                    grads.params[name] = total[param.column : param.column + param.numel].view(shape)
        if "rule" in self.wrt:
            rows, plan = None, self.plan
            if plan.rule.wanted:
                start, count = plan.rule.column, len(self.learned)
                rows = total[start : start + plan.steps * count].view(plan.steps, count)
            grads.rule = gradients_of_numbers(problem, rows, self.learned)
        if "lr" in self.wrt:
            grads.lr = {}
            for name, rate in problem.rates.items():
                if name in own["rate"]:
                    grads.lr[name] = own["rate"][name]
                elif name in params and self.plan.flags["wants_rates"]:
                    start = params[name].rate_column
                    grads.lr[name] = total[start : start + rate.numel()].view(rate.shape)
                else:
                    grads.lr[name] = self._zeros(rate.shape)

    # ---- batches
    def _batch(
        self, which: str, batch: Batch | None, loss: Loss | None, grads: Gradients, keep: list[Tensor]
    ) -> list[int]:
        """x, y, weights, class weights and the gradients of the first three."""
        if batch is None:
            return [0] * 7
        y = None if loss is None else batch.y
        x = batch.x
        if self.plan.areas["input"].space == "user" and (x.data_ptr() % 16 or not x.is_contiguous()):
            x = x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)  # for loads of 16 bytes
        weights = None
        if loss is not None:
            weights = class_weights(loss, self.output_shape, self.channels, self.dtype, self.device)
        words = _dense([x, y, batch.weights, weights], keep)
        for field, tensor in zip(_FIELDS, (batch.x, y, batch.weights), strict=True):
            key = f"{which}_{field}"
            grad = None
            if key in self.wrt and tensor is not None:
                grad = self._zeros(tensor.shape)
                setattr(grads, key, grad)
            words.append(_address(grad))
        return words


def make_plan(problem: Problem, wrt: frozenset[str]) -> plans.Plan:
    """The plan for the device that the problem's tensors are on."""
    return plans.make_plan(problem, wrt, chip(next(iter(problem.params.values())).device))


def _numbers(rule: object) -> tuple[float, float]:
    return getattr(rule, "momentum", 0.0), getattr(rule, "weight_decay", 0.0)


def _bits(number: float) -> int:
    """A double as the word that it is passed in."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensors: list[Tensor | None], keep: list[Tensor]) -> list[int]:
    """Where each tensor lies, 0 for none; a dense copy, put into `keep`, stands for one that is not
    dense or that is to be read with the opposite sign (`torch.imag` of a conjugate)."""
    words = []
    for tensor in tensors:
        if tensor is not None and (tensor.is_neg() or not tensor.is_contiguous()):
            tensor = tensor.detach().resolve_neg().contiguous()
        if tensor is not None:
            keep.append(tensor)
        words.append(_address(tensor))
    return words
