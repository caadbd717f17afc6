"""The static tensors of one meta-step, and how passes, updates and sums find their parts of
them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.backends.triton.batch import StaticBatch
from fastmeta.backends.triton.memory import Memory, ParameterLayout
from fastmeta.backends.triton.pass_memory import PassMemory
from fastmeta.backends.triton.update_rule import UpdateRuleSteps
from fastmeta.graph.nodes import Graph
from fastmeta.kernels import reduce
from fastmeta.kernels.launch import Recorder
from fastmeta.kernels.passes import Operand, Pass, Sink, Sinks, there
from fastmeta.problem import Problem
from fastmeta.update_rules import UpdateRule


class StepState:
    """What the launches of one kind of call work on.

    Args:
        problem: what is asked; its tensors' values are not read.
        wrt: the gradients wanted.
        memory: "store" or "recompute".
        precision: of the products, see `kernels.tile`.
        device: may be "meta", to know the launches alone.
    """

    def __init__(
        self,
        problem: Problem,
        net: Graph,
        wrt: frozenset[str],
        memory: str,
        precision: str,
        device: torch.device,
    ) -> None:
        first = next(iter(problem.params.values()))
        self.net, self.wrt, self.precision = net, wrt, precision
        self.used = net.used
        self.tasks = problem.tasks
        self.steps = problem.steps if problem.support is not None else 0
        self.second = problem.order == "second" and self.steps > 0 and bool(wrt)
        self.store = memory == "store"
        rule = problem.rule
        # the rule, where it is not SGD with momentum and weight decay as plain numbers
        general = None if rule is None or rule.written or not self.steps else rule
        self.mu, self.decay = (0.0, 0.0)
        if rule is not None and general is None:
            self.mu, self.decay = rule.momentum, rule.weight_decay
        self.plain = general is None and self.mu == 0 and self.decay == 0
        self.wants_rates = "lr" in wrt and self.steps > 0 and bool(problem.rates)
        self.memory = Memory(device, first.dtype)
        self.emit = Recorder()
        count = len(problem.params)
        self.layout = ParameterLayout(net, problem, count)
        self._allocate(problem, count, general)

    # ---- static tensors

    def _allocate(self, problem: Problem, count: int, general: UpdateRule | None) -> None:
        new, layout, tasks, steps = self.memory.new, self.layout, self.tasks, self.steps
        size = layout.size
        own = bool(problem.per_task)
        self.theta0 = new(tasks, size) if own else new(size)
        buffers = self.net.shapes[count:]
        self.buffers = [new(*shape) for shape in buffers]
        self.thetas = new(steps, tasks, size) if steps else None
        rates = list(problem.rates.values())
        self.rate_steps = max([rate.shape[0] for rate in rates], default=1)
        self.rate_tasks = max([rate.shape[1] for rate in rates], default=1)
        self.rates = new(self.rate_steps, self.rate_tasks, max(layout.row, 1))
        index = layout.index()
        self.index = index.to(self.memory.device)
        self.table = layout.table().to(self.memory.device)
        net, wrt = self.net, self.wrt
        shape = () if problem.program is None else problem.program.output_shape
        self.support = self.query = None
        if problem.support is not None and steps:
            self.support = StaticBatch(self.memory, net, problem.support, problem.loss, wrt, "support", shape)
        if problem.query is not None:
            self.query = StaticBatch(self.memory, net, problem.query, problem.query_loss, wrt, "query", shape)
        self.task_weights = None if problem.task_weights is None else new(tasks)
        self.channels = net.values[net.output].channels  # the output is [T, N, d..., C]
        self.output_grad = None
        if problem.output_grad is not None:
            shape = problem.output_grad.shape
            self.output_grad = new(*(shape[:2] + shape[3:] + shape[2:3] if self.channels else shape))
        self.losses = new(tasks) if self.query is not None and self.query.loss is not None else None
        self.loss = new() if self.losses is not None else None
        self.output: Tensor | None = None  # the last query pass's own
        self.gradient = self.lam = self.v = self.mbar = self.momentum = self.updates = None
        self.rate_sums = self.rate_total = self.total = self.ranges = None
        self.keeps_updates = self.wants_rates and general is None and (self.store or self.mu != 0)
        self.in_epilogues = self.plain and not self.keeps_updates and not any(layout.elementwise)
        if steps and general is None and (not self.in_epilogues or self.wants_rates):
            self.gradient = new(tasks, size)
        if self.mu and steps:
            self.momentum = new(tasks, size)
        if self.keeps_updates:
            self.updates = new(steps, tasks, size)
        if wrt:
            self.lam = new(tasks, size)
            if steps and general is None and (self.second or not self.plain):
                self.v = new(tasks, size)
            if self.mu and steps:
                self.mbar = new(tasks, size)
            self.ranges = new(reduce.RANGES, max(size, layout.row))
            self.total = new(size)
        if self.wants_rates:
            self.rate_sums = new(self.rate_steps, tasks, layout.row)
            self.rate_total = new(self.rate_steps, layout.row)
            if not self.keeps_updates and self.updates is None:
                self.updates = new(1, tasks, size)
        self.rule = None if general is None else UpdateRuleSteps(self, problem, general)
        if self.rule is not None and self.rule.wants_v:
            self.v = new(tasks, size)
        self._values = PassMemory(self, self.support, self.second, steps if self.store else min(steps, 1))
        self._query_values = PassMemory(self, self.query, False, 1)

    def tensors(self) -> list[Tensor]:
        """All static tensors."""
        constants = [] if self.rule is None else [self.rule.plain]
        return [*self.memory.made, self.index, self.table, *constants]

    # ---- parameters and rates

    def theta(self, k: int, p: int) -> Operand:
        """theta_k of parameter p; of a buffer, itself."""
        count = len(self.layout.names)
        if p >= count:
            return Operand(self.buffers[p - count], 0)
        if k == 0 or not self._moves(p):
            return self.layout.operand(self.theta0, p)
        return self.layout.operand(there(self.thetas)[k - 1], p)

    def _moves(self, p: int) -> bool:
        """Whether an inner step writes parameter p: one without a gradient moves by weight decay
        alone."""
        return self.layout.adapted[p] and (p in self.used or not self.in_epilogues)

    def theta_rows(self, k: int) -> Operand:
        """theta_k of all parameters, those that move."""
        rows = self.theta0 if k == 0 else there(self.thetas)[k - 1]
        return Operand(rows, self.layout.size if rows.dim() > 1 else 0)

    def rates_of(self, k: int) -> Operand:
        """The row of rates [L] of step k."""
        rows = self.rates[k if self.rate_steps > 1 else 0]
        return Operand(rows.reshape(-1), rows.shape[1] if self.rate_tasks > 1 else 0)

    def _sinks(self, rows: Tensor, base: bool = False, adapted: bool = False) -> Sinks:
        """A sink for every parameter that some layer reads, or of those the adapted ones."""
        sinks: Sinks = []
        for p in range(len(self.layout.names)):
            if p not in self.used or (adapted and not self.layout.adapted[p]):
                sinks.append(None)
                continue
            to = self.layout.operand(rows, p)
            sinks.append(Sink(to, to if base else None))
        return sinks + [None] * len(self.buffers)

    # ---- passes

    def _support_pass(self, k: int) -> Pass:
        run = self._values.at(k if self.store else 0, self.support.step("x", k))  # type: ignore[union-attr]
        run.theta = [self.theta(k, p) for p in range(len(self.net.params))]
        return run

    def _query_pass(self, k: int) -> Pass:
        run = self._query_values.at(0, self.query.tensors["x"])  # type: ignore[union-attr]
        run.theta = [self.theta(k, p) for p in range(len(self.net.params))]
        return run
