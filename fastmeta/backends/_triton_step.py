"""The meta-step of all tasks as a list of launches: the algorithm of csrc/engine/meta_step.h, generic over layer kinds.

Source: docs/architecture.md, "The mathematics".
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastmeta.backends._triton_batch import StaticBatch
from fastmeta.backends._triton_memory import Memory, ParameterLayout
from fastmeta.backends._triton_network import Network
from fastmeta.kernels import (
    add,
    avg_pool2d,
    batch_norm,
    concat,
    conv2d,
    elementwise,
    group_norm,
    layer_norm,
    linear,
    max_pool2d,
    reduce,
    reshape,
    sgd,
)
from fastmeta.kernels.launch import Recorder
from fastmeta.kernels.passes import Operand, Pass, Sink, Sinks
from fastmeta.problem import Problem

KINDS: dict[str, ModuleType] = {
    "add": add,
    "avg_pool2d": avg_pool2d,
    "batch_norm": batch_norm,
    "concat": concat,
    "conv2d": conv2d,
    "elementwise": elementwise,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "max_pool2d": max_pool2d,
    "reshape": reshape,
}


class MetaStep:
    """All launches of one kind of call, and the static tensors that they work on.

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
        net: Network,
        wrt: frozenset[str],
        memory: str,
        precision: str,
        device: torch.device,
    ) -> None:
        first = next(iter(problem.params.values()))
        self.net, self.wrt, self.precision = net, wrt, precision
        self.tasks = problem.tasks
        self.steps = problem.steps if problem.support is not None else 0
        self.second = problem.order == "second" and self.steps > 0 and bool(wrt)
        self.store = memory == "store"
        rule = problem.rule
        self.mu, self.decay = (rule.momentum, rule.weight_decay) if rule is not None else (0.0, 0.0)
        self.plain = self.mu == 0 and self.decay == 0
        self.wants_rates = "lr" in wrt and self.steps > 0 and bool(problem.rates)
        self.memory = Memory(device, first.dtype)
        self.emit = Recorder()
        self.valued = self.seeded = False  # the losses, lambda have been written to
        self.fresh = True  # lambda has not
        count = len(problem.params)
        self.layout = ParameterLayout(net, problem, count)
        self._allocate(problem, count)
        self._record(problem)

    # ---- static tensors -------------------------------------------------------------------------------------------

    def _allocate(self, problem: Problem, count: int) -> None:
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
        self.index = index if self.memory.device.type == "meta" else index.to(self.memory.device)
        if self.memory.device.type == "meta":
            self.index = index.to("meta")
        self.table = layout.table().to(self.memory.device)
        net, wrt = self.net, self.wrt
        self.support = self.query = None
        if problem.support is not None and steps:
            self.support = StaticBatch(self.memory, net, problem.support, problem.loss, wrt, "support")
        if problem.query is not None:
            self.query = StaticBatch(self.memory, net, problem.query, problem.query_loss, wrt, "query")
        self.task_weights = None if problem.task_weights is None else new(tasks)
        self.output_grad = None if problem.output_grad is None else new(*problem.output_grad.shape)
        self.losses = new(tasks) if self.query is not None and self.query.loss is not None else None
        self.loss = new() if self.losses is not None else None
        self.output: Tensor | None = None  # the last query pass's own
        self.gradient = self.lam = self.v = self.mbar = self.momentum = self.updates = None
        self.rate_sums = self.rate_total = self.total = self.ranges = None
        self.keeps_updates = self.wants_rates and (self.store or self.mu != 0)
        self.in_epilogues = self.plain and not self.keeps_updates and not any(layout.elementwise)
        if steps and (not self.in_epilogues or self.wants_rates):
            self.gradient = new(tasks, size)
        if self.mu and steps:
            self.momentum = new(tasks, size)
        if self.keeps_updates:
            self.updates = new(steps, tasks, size)
        if wrt:
            self.lam = new(tasks, size)
            if steps and (self.second or not self.plain):
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
        self._values = _PassMemory(self, self.support, self.second, steps if self.store else min(steps, 1))
        self._query_values = _PassMemory(self, self.query, False, 1)

    # ---- parameters and rates -------------------------------------------------------------------------------------

    def theta(self, k: int, p: int) -> Operand:
        """theta_k of parameter p; of a buffer, itself."""
        count = len(self.layout.names)
        if p >= count:
            return Operand(self.buffers[p - count], 0)
        if k == 0 or not self._moves(p):
            return self.layout.operand(self.theta0, p)
        return self.layout.operand(self.thetas[k - 1], p)  # type: ignore[index]

    def _moves(self, p: int) -> bool:
        """Whether an inner step writes parameter p: one without a gradient moves by weight decay alone."""
        return self.layout.adapted[p] and (p in self.net.used or not self.in_epilogues)

    def _rates(self, k: int) -> Operand:
        rows = self.rates[k if self.rate_steps > 1 else 0]
        return Operand(rows.reshape(-1), rows.shape[1] if self.rate_tasks > 1 else 0)

    def _sinks(self, rows: Tensor, base: bool = False, adapted: bool = False) -> Sinks:
        """A sink for every parameter that some layer reads, or of those the adapted ones."""
        sinks: Sinks = []
        for p in range(len(self.layout.names)):
            if p not in self.net.used or (adapted and not self.layout.adapted[p]):
                sinks.append(None)
                continue
            to = self.layout.operand(rows, p)
            sinks.append(Sink(to, to if base else None))
        return sinks + [None] * len(self.buffers)

    # ---- passes ---------------------------------------------------------------------------------------------------

    def _support_pass(self, k: int) -> Pass:
        run = self._values.at(k if self.store else 0, self.support.step("x", k))  # type: ignore[union-attr]
        run.theta = [self.theta(k, p) for p in range(len(self.net.params))]
        return run

    def _query_pass(self, k: int) -> Pass:
        run = self._query_values.at(0, self.query.tensors["x"])  # type: ignore[union-attr]
        run.theta = [self.theta(k, p) for p in range(len(self.net.params))]
        return run

    def _forward(self, run: Pass) -> Tensor:
        for node in self.net.nodes:
            KINDS[node.kind].forward(run, node)
        return run.x[self.net.output]

    def _backward(self, run: Pass, sinks: Sinks | None) -> None:
        for node in reversed(self.net.nodes):
            KINDS[node.kind].backward(run, node, sinks)

    # ---- the inner loop -------------------------------------------------------------------------------------------

    def _record(self, problem: Problem) -> None:
        for k in range(self.steps):
            self._inner_step(k)
        if self.wrt:
            self._sweep_back(problem)
        elif self.query is not None:
            self._query_values_only(problem)
        if self.losses is not None:
            reduce.mean_loss(self.emit, self.losses, self.task_weights, self.loss)

    def _support_gradient(self, run: Pass, k: int, sinks: Sinks | None) -> None:
        z = self._forward(run)
        self.support.emit_loss(self.emit, self.net, k, z, dz=run.d[self.net.output])  # type: ignore[union-attr]
        self._backward(run, sinks)

    def _inner_step(self, k: int) -> None:
        run = self._support_pass(k)
        if self.in_epilogues:
            sinks: Sinks = []
            for p in range(len(self.net.params)):
                if p >= len(self.layout.names) or not self._moves(p):
                    sinks.append(None)
                    continue
                rates = self._rates(k)
                rate = Operand(rates.at[self.layout.slots[p] :], rates.stride)
                sinks.append(Sink(self.theta(k + 1, p), self.theta(k, p), rate))
            self._support_gradient(run, k, sinks)
            return
        if k == 0 and self._some_unused():
            self.emit.zero(self.gradient)
        self._support_gradient(run, k, self._sinks(self.gradient, adapted=True))  # type: ignore[arg-type]
        kept = None
        if self.keeps_updates:
            kept = self.updates[k]  # type: ignore[index]
        momentum = None
        if self.mu:
            momentum = (self.updates[k - 1] if self.keeps_updates else self.momentum) if k else None  # type: ignore[index]
            kept = kept if self.keeps_updates else self.momentum
        sgd.update(
            self.emit,
            self.tasks,
            self._theta_rows(k),
            self.gradient,
            momentum,
            self._rates(k),
            self.index,
            self.thetas[k],  # type: ignore[index]
            kept,
            self.mu,
            self.decay,
        )

    def _theta_rows(self, k: int) -> Operand:
        rows = self.theta0 if k == 0 else self.thetas[k - 1]  # type: ignore[index]
        return Operand(rows, self.layout.size if rows.dim() > 1 else 0)

    def _some_unused(self) -> bool:
        return any(p not in self.net.used for p in range(len(self.layout.names)))

    # ---- the query ------------------------------------------------------------------------------------------------

    def _step_weights(self, problem: Problem) -> list[float]:
        if self.query is None or self.query.loss is None:
            return [0.0] * (self.steps + 1)
        return list(problem.step_weights or (0.0,) * self.steps + (1.0,))

    def _query_values_only(self, problem: Problem) -> None:
        weights, written = self._step_weights(problem), False
        for k in range(self.steps + 1):
            if weights[k] == 0 and k < self.steps:
                continue
            run = self._query_pass(k)
            z = self._forward(run)
            if weights[k] != 0:
                self.query.emit_loss(  # type: ignore[union-attr]
                    self.emit, self.net, 0, z, dz=None, value=self.losses, add_value=written, step=weights[k]
                )
                written = True
            self._keep_output(k, z)
        if self.losses is not None and not written:
            self.emit.zero(self.losses)

    def _keep_output(self, k: int, z: Tensor) -> None:
        """The query pass at theta_K comes first in the sweep back, and others may follow: its output is put aside."""
        if k == self.steps:
            self.output = self.memory.new(*z.shape)
            add.copy(self.emit, z, self.output)

    def _query_gradient(self, problem: Problem, k: int, weight: float) -> None:
        """The query at theta_k: its share of the loss, its gradients times c_t s_k added to lambda and the inputs."""
        last = k == self.steps
        if self.query is None or (weight == 0 and not last):
            return
        run = self._query_pass(k)
        z = self._forward(run)
        if last:
            self._keep_output(k, z)
        dz = run.d[self.net.output]
        if weight != 0:
            self.query.emit_loss(
                self.emit,
                self.net,
                0,
                z,
                dz=dz,
                value=self.losses,
                add_value=self.valued,
                step=weight,
                scale=weight / self.tasks,
                task_weights=self.task_weights,
                gradients=True,
            )
            self.valued = True
            if last and self.output_grad is not None:
                add.accumulate(self.emit, self.output_grad, dz)
        elif self.output_grad is not None:
            add.copy(self.emit, self.output_grad, dz)
        else:
            return
        self._backward(run, self._sinks(self.lam, base=not self.fresh))  # type: ignore[arg-type]
        self.fresh = False
        self._input_gradient(self.query, 0, run.d[0])

    def _input_gradient(self, batch: StaticBatch, k: int, block: Tensor | None) -> None:
        to, again = batch.gradient("x", k)
        if to is not None:
            (add.accumulate if again else add.copy)(self.emit, block, to)

    # ---- the sweep back -------------------------------------------------------------------------------------------

    def _sweep_back(self, problem: Problem) -> None:
        weights = self._step_weights(problem)
        # lambda is either there already (the seeds are copied in), or zero, or written by the first gradient
        self.seeded = problem.adapted_grad is not None
        self.fresh = not self.seeded and not self._some_unused()
        if not self.seeded and self._some_unused():
            self.emit.zero(self.lam)
        self._query_gradient(problem, self.steps, weights[self.steps])
        if self.fresh:
            self.emit.zero(self.lam)
            self.fresh = False
        for k in reversed(range(self.steps)):
            self._step_back(k)
            self._query_gradient(problem, k, weights[k])
        if self.losses is not None and not self.valued:
            self.emit.zero(self.losses)
        for batch in (self.support, self.query):
            for tensor in () if batch is None else batch.unwritten():
                self.emit.zero(tensor)
        reduce.over_tasks(self.emit, self.lam, self.ranges, self.total)
        if self.wants_rates:
            for k in range(self.rate_steps):
                reduce.over_tasks(self.emit, self.rate_sums[k], self.ranges, self.rate_total[k])  # type: ignore[index]

    def _step_back(self, k: int) -> None:
        run = self._support_pass(k)
        needs_updates = self.wants_rates and not self.keeps_updates
        if not self.store and (self.second or needs_updates):
            sinks = self._sinks(self.gradient, adapted=True) if needs_updates else None  # type: ignore[arg-type]
            self._support_gradient(run, k, sinks)
        if self.wants_rates:
            self._rate_gradient(k)
        if self.v is None:
            return
        mbar = self.mbar if self.mu and k < self.steps - 1 else None
        sgd.direction(self.emit, self.tasks, self.lam, mbar, self._rates(k), self.index, self.v)
        if self.second:
            self._hessian_vector(run, k)
        if not self.plain:
            sgd.adjoint(self.emit, self.tasks, self.lam, self.v, self.mbar, self.index, self.mu, self.decay)

    def _rate_gradient(self, k: int) -> None:
        """d alpha_k = -lambda_{k+1} u_k."""
        u = self.updates[k if self.keeps_updates else 0]  # type: ignore[index]
        if not self.keeps_updates:
            sgd.update(
                self.emit,
                self.tasks,
                self._theta_rows(k),
                self.gradient,
                None,
                None,
                self.index,
                None,
                u,
                0.0,
                self.decay,
            )
        step = k if self.rate_steps > 1 else 0
        again = self.rate_steps == 1 and k < self.steps - 1
        sgd.rate_gradient(self.emit, self.tasks, self.lam, u, self.table, self.rate_sums[step], again)  # type: ignore[index]

    def _hessian_vector(self, run: Pass, k: int) -> None:
        """lambda += H v; the mixed derivatives likewise into the gradients of the support set."""
        run.v = [self.layout.operand(self.v, p) for p in range(len(self.layout.names))]  # type: ignore[arg-type]
        for node in self.net.nodes:
            if run.has_tangent(node.output):
                KINDS[node.kind].tangent(run, node)
        out = self.net.output
        self.support.emit_loss(  # type: ignore[union-attr]
            self.emit, self.net, k, run.x[out], rz=run.rx[out], dz=run.rd[out], gradients=True
        )
        sinks = self._sinks(self.lam, base=True)  # type: ignore[arg-type]
        for node in reversed(self.net.nodes):
            KINDS[node.kind].tangent_backward(run, node, sinks)
        self._input_gradient(self.support, k, run.rd[0])  # type: ignore[arg-type]


class _PassMemory:
    """The buffers of one sort of pass: values and gradients of `copies` steps, tangents once."""

    def __init__(self, owner: MetaStep, batch: StaticBatch | None, second: bool, copies: int) -> None:
        self.owner, self.batch, self.second = owner, batch, second
        if batch is None:
            return
        net, self.device = owner.net, owner.memory.device
        self.wants_input = "x" in batch.grads
        self.states: list[dict[tuple[int, str], Tensor]] = [{} for _ in range(copies)]
        needs_delta = bool(owner.wrt) or batch is owner.support
        makes = {net.root[node.output] for node in net.nodes}
        roots = sorted(makes | {0})

        def block(root: int) -> Tensor:
            return owner.memory.new(owner.tasks, batch.examples * net.values[root].size)

        def blocks_of(wanted: list[int]) -> list[Tensor | None]:
            own = {root: block(root) for root in wanted}
            return [own.get(root) for root in net.root]

        moving = {net.root[v] for v in range(len(net.values)) if net.from_params[v]}
        deltas = [
            root for root in roots if needs_delta and root not in net.no_delta and (root in moving or self.wants_input)
        ]
        values = [root for root in roots if root in makes and root not in net.no_value]
        self.x = [blocks_of(values) for _ in range(copies)]
        self.d = [blocks_of(deltas) for _ in range(copies)]
        curves = [root for root in net.curved if root in makes] if second else []
        self.curve = [blocks_of(curves) for _ in range(copies)]
        tangents = [root for root in roots if root in moving and root not in net.no_tangent]
        self.rx = blocks_of(tangents if second else [])
        self.rd = blocks_of(deltas if second else [])

    def at(self, copy: int, x: Tensor | None) -> Pass:
        """The pass that works on one copy, on these inputs."""
        owner, net = self.owner, self.owner.net
        values = list(self.x[copy])
        for value, root in enumerate(net.root):
            if root == 0:
                values[value] = x
        return Pass(
            owner.emit,
            net.nodes,
            net.values,
            owner.tasks,
            self.batch.examples,  # type: ignore[union-attr]
            owner.precision,
            self.second,
            net.from_params,
            self.wants_input,
            values,
            self.d[copy],
            self.rx,
            self.rd,
            self.curve[copy],
            self.states[copy],
            new_state=owner.memory.new,
            scratch=owner.memory.scratch,
        )
