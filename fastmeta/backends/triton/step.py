"""The meta-step of all tasks as a list of launches: the algorithm of csrc/cpu/meta_step.h, generic
over layer kinds.

Source: docs/architecture.md, "The mathematics".
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource
from types import ModuleType

import torch
from torch import Tensor

from fastmeta.backends.triton.batch import StaticBatch
from fastmeta.backends.triton.state import StepState
from fastmeta.graph.nodes import Graph
from fastmeta.kernels import add, functions, reduce, sgd
from fastmeta.kernels.passes import Operand, Pass, Sink, Sinks, there
from fastmeta.layers import registry as layers
from fastmeta.problem import Problem

_FUNCTIONS = ("forward", "backward", "tangent", "tangent_backward")


def _kernels() -> dict[str, ModuleType]:
    found: dict[str, ModuleType] = {}
    for kind in layers.KINDS:
        if find_spec(f"fastmeta.kernels.{kind}") is None:
            continue
        found[kind] = import_module(f"fastmeta.kernels.{kind}")
        missing = [name for name in _FUNCTIONS if not hasattr(found[kind], name)]
        if missing:
            raise TypeError(f"fastmeta.kernels.{kind} has no {', '.join(missing)}")
    return found


#: Layer kind -> its kernels: every module of fastmeta.kernels that is called as a kind.
KINDS: dict[str, ModuleType] = _kernels()
#: The element-wise functions that `fastmeta.kernels.functions` has a formula of.
FUNCTIONS = frozenset(re.findall(r'F\.function == "(\w+)"', getsource(functions)))


class MetaStep(StepState):
    """All launches of one kind of call, and the static tensors that they work on: see
    `StepState`."""

    def __init__(
        self,
        problem: Problem,
        net: Graph,
        wrt: frozenset[str],
        memory: str,
        precision: str,
        device: torch.device,
    ) -> None:
        super().__init__(problem, net, wrt, memory, precision, device)
        self.valued = self.seeded = False  # the losses, lambda have been written to
        self.fresh = True  # lambda has not
        self._record(problem)

    def _forward(self, run: Pass) -> Tensor:
        for node in self.net.nodes:
            KINDS[node.kind].forward(run, node)
        return there(run.x[self.net.output])

    def _backward(self, run: Pass, sinks: Sinks | None) -> None:
        for node in reversed(self.net.nodes):
            KINDS[node.kind].backward(run, node, sinks)

    # ---- the inner loop

    def _record(self, problem: Problem) -> None:
        if self.rule is not None:
            self.rule.start(self._some_unused())
        for k in range(self.steps):
            self._inner_step(k)
        if self.wrt:
            self._sweep_back(problem)
        elif self.query is not None:
            self._query_values_only(problem)
        if self.losses is not None:
            reduce.mean_loss(self.emit, self.losses, self.task_weights, there(self.loss))

    def _support_gradient(self, run: Pass, k: int, sinks: Sinks | None) -> None:
        z = self._forward(run)
        self.support.emit_loss(self.emit, self.net, k, z, dz=run.d[self.net.output])  # type: ignore[union-attr]
        self._backward(run, sinks)

    def _inner_step(self, k: int) -> None:
        run = self._support_pass(k)
        if self.rule is not None:
            self._support_gradient(run, k, self._sinks(self.rule.gradient(k), adapted=True))
            self.rule.step(k)
            return
        if self.in_epilogues:
            sinks: Sinks = []
            for p in range(len(self.net.params)):
                if p >= len(self.layout.names) or not self._moves(p):
                    sinks.append(None)
                    continue
                rates = self.rates_of(k)
                rate = Operand(rates.at[self.layout.slots[p] :], rates.stride)
                sinks.append(Sink(self.theta(k + 1, p), self.theta(k, p), rate))
            self._support_gradient(run, k, sinks)
            return
        if k == 0 and self._some_unused():
            self.emit.zero(there(self.gradient))
        self._support_gradient(run, k, self._sinks(there(self.gradient), adapted=True))
        kept = None
        if self.keeps_updates:
            kept = there(self.updates)[k]
        momentum = None
        if self.mu:
            if k:
                momentum = there(self.updates)[k - 1] if self.keeps_updates else self.momentum
            kept = kept if self.keeps_updates else self.momentum
        sgd.update(
            self.emit,
            self.tasks,
            self.theta_rows(k),
            there(self.gradient),
            momentum,
            self.rates_of(k),
            self.index,
            there(self.thetas)[k],
            kept,
            self.mu,
            self.decay,
        )

    def _some_unused(self) -> bool:
        return any(p not in self.used for p in range(len(self.layout.names)))

    # ---- the query

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
        """The query pass at theta_K comes first in the sweep back, and others may follow: its
        output is put aside."""
        if k == self.steps:
            self.output = self.memory.new(*z.shape)
            add.copy(self.emit, z, self.output)

    def _query_gradient(self, problem: Problem, k: int, weight: float) -> None:
        """The query at theta_k: its share of the loss, its gradients times c_t s_k added to lambda
        and the inputs."""
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
        self._backward(run, self._sinks(there(self.lam), base=not self.fresh))
        self.fresh = False
        self._input_gradient(self.query, 0, run.d[0])

    def _input_gradient(self, batch: StaticBatch, k: int, block: Tensor | None) -> None:
        to, again = batch.gradient("x", k)
        if to is not None:
            (add.accumulate if again else add.copy)(self.emit, block, to)

    # ---- the sweep back

    def _sweep_back(self, problem: Problem) -> None:
        weights = self._step_weights(problem)
        # lambda is either there already (the seeds are copied in), or zero, or written by the first
        # gradient
        self.seeded = problem.adapted_grad is not None
        self.fresh = not self.seeded and not self._some_unused()
        if not self.seeded and self._some_unused():
            self.emit.zero(there(self.lam))
        self._query_gradient(problem, self.steps, weights[self.steps])
        if self.fresh:
            self.emit.zero(there(self.lam))
            self.fresh = False
        for k in reversed(range(self.steps)):
            self._step_back(k)
            self._query_gradient(problem, k, weights[k])
        if self.losses is not None and not self.valued:
            self.emit.zero(self.losses)
        for batch in (self.support, self.query):
            for tensor in () if batch is None else batch.unwritten():
                self.emit.zero(tensor)
        if self.rule is not None:
            self.rule.finish()
        ranges = there(self.ranges)
        reduce.over_tasks(self.emit, there(self.lam), ranges, there(self.total))
        if self.wants_rates:
            sums, totals = there(self.rate_sums), there(self.rate_total)
            for k in range(self.rate_steps):
                reduce.over_tasks(self.emit, sums[k], ranges, totals[k])

    def _step_back(self, k: int) -> None:
        run = self._support_pass(k)
        needs_updates = self.wants_rates and not self.keeps_updates and self.rule is None
        if not self.store and (self.second or needs_updates):
            sinks = self._sinks(there(self.gradient), adapted=True) if needs_updates else None
            self._support_gradient(run, k, sinks)
        if self.rule is not None:
            self.rule.back(k)
        if self.wants_rates:
            self._rate_gradient(k)
        if self.rule is not None:
            if self.second:
                self._hessian_vector(run, k)
            return
        if self.v is None:
            return
        mbar = self.mbar if self.mu and k < self.steps - 1 else None
        sgd.direction(self.emit, self.tasks, there(self.lam), mbar, self.rates_of(k), self.index, self.v)
        if self.second:
            self._hessian_vector(run, k)
        if not self.plain:
            lam = there(self.lam)
            sgd.adjoint(self.emit, self.tasks, lam, self.v, self.mbar, self.index, self.mu, self.decay)

    def _rate_gradient(self, k: int) -> None:
        """d alpha_k = -lambda_{k+1} u_k."""
        step = k if self.rate_steps > 1 else 0
        again = self.rate_steps == 1 and k < self.steps - 1
        sums = there(self.rate_sums)[step]
        if self.rule is not None:  # the rule has left it for each element
            sgd.rate_gradient(self.emit, self.tasks, None, there(self.updates)[0], self.table, sums, again)
            return
        u = there(self.updates)[k if self.keeps_updates else 0]
        if not self.keeps_updates:
            sgd.update(
                self.emit,
                self.tasks,
                self.theta_rows(k),
                there(self.gradient),
                None,
                None,
                self.index,
                None,
                u,
                0.0,
                self.decay,
            )
        sgd.rate_gradient(self.emit, self.tasks, there(self.lam), u, self.table, sums, again)

    def _hessian_vector(self, run: Pass, k: int) -> None:
        """lambda += H v; the mixed derivatives likewise into the gradients of the support set."""
        v = there(self.v)
        run.v = [self.layout.operand(v, p) for p in range(len(self.layout.names))]
        for node in self.net.nodes:
            if run.has_tangent(node.output):
                KINDS[node.kind].tangent(run, node)
        out = self.net.output
        self.support.emit_loss(  # type: ignore[union-attr]
            self.emit, self.net, k, there(run.x[out]), rz=run.rx[out], dz=run.rd[out], gradients=True
        )
        sinks = self._sinks(there(self.lam), base=True)
        for node in reversed(self.net.nodes):
            KINDS[node.kind].tangent_backward(run, node, sinks)
        self._input_gradient(self.support, k, run.rd[0])  # type: ignore[arg-type]
