"""One task on its own, by autograd through its whole inner loop: one backward pass at the end.

The graph of all inner steps is kept, as `Sweep` with `store` keeps it; what is done is less: no step is differentiated
by itself, and nothing is stacked. Tensors that the network or a loss reads past its arguments are found in the graph;
then `Sweep`, which knows what to do with them, has to run the task.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends.torch import features
from fastmeta.losses import Loss
from fastmeta.network.functional import call, own
from fastmeta.problem import Gradients, Problem, Result

_PARTS = ("x", "y", "weights")


class Captures(Exception):
    """The network or a loss reads a tensor that requires grad, and its gradient is wanted."""


def alone(p: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """The answer to a problem of one task.

    Args:
        p: its step weights written out.
        wrt, adapted: as a backend has them.

    Raises:
        Captures: see there; random numbers have been drawn.
    """
    return _Task(p, wrt).run(adapted)


class _Task:
    def __init__(self, p: Problem, wrt: frozenset[str]) -> None:
        self.p, self.wrt = p, wrt
        self.names = list(p.rates) if p.steps else []
        wanted = "params" in wrt
        self.params = {
            name: own(value, (wanted and name not in p.frozen) or name in self.names)
            for name, value in p.params.items()
        }
        self.theta = {name: leaf[0] if name in p.per_task else leaf for name, leaf in self.params.items()}
        self.rates = {name: own(rate, "lr" in wrt) for name, rate in p.rates.items()}
        self.data: dict[str, Tensor] = {}  # leaves by their names in `wrt`
        for role in ("support", "query"):
            for part in _PARTS:
                tensor = getattr(getattr(p, role), part, None)
                if tensor is not None:
                    self.data[f"{role}_{part}"] = own(tensor, f"{role}_{part}" in wrt)
        self.task_weight = None if p.task_weights is None else own(p.task_weights)[0]
        self.looks = p.captures is not None
        self.back = bool(wrt) or self.looks
        self.second = p.order == "second" and self.back
        self.features = {role: found for role in ("support", "query") if (found := features.of(p, role)) is not None}
        self.terms: list[Tensor] = []
        self.task_loss: Tensor | None = None
        self.output: Tensor | None = None

    def run(self, adapted: bool) -> Result:
        p, momentum = self.p, dict[str, Tensor]()
        for k, weight in enumerate(p.step_weights or ()):
            if p.query is not None and (weight or k == p.steps):
                with torch.set_grad_enabled(self.back):
                    self._query(weight, k == p.steps)
            if k < p.steps:
                self._inner_step(k, momentum)
        result = Result(grads=self._gradients())
        if self.output is not None:
            result.output = torch.stack([self.output.detach()])
        if p.query_loss is not None and self.output is not None:
            loss = self.task_loss
            result.task_losses = self.output.new_zeros(1) if loss is None else loss.detach().reshape(1)
        if adapted:
            result.adapted = {name: torch.stack([value.detach()]) for name, value in self.theta.items()}
        return result

    def _inner_step(self, k: int, momentum: dict[str, Tensor]) -> None:
        support, loss, rule = _inputs.inner_loop(self.p)
        value, _ = self._evaluate("support", (0, k) if support.per_step else (0,), loss)
        found = _inputs.gradients([value], [self.theta[name] for name in self.names], create_graph=self.second)
        for name, g in zip(self.names, found, strict=True):
            rate = self.rates[name]
            rate = rate[k if rate.shape[0] > 1 else 0, 0]
            theta, momentum[name] = rule.update(self.theta[name], g, momentum.get(name), rate)
            self.theta[name] = theta if self.back else theta.detach().requires_grad_()

    def _query(self, weight: float, last: bool) -> None:
        """The query at theta_k: its share of J."""
        p = self.p
        value, output = self._evaluate("query", (0,), p.query_loss)
        if p.query_loss is not None and weight:
            weighted = weight * value
            self.task_loss = weighted if self.task_loss is None else self.task_loss + weighted
        if last:
            self.output = output
            if p.output_grad is not None:
                self.terms.append((output * own(p.output_grad)[0]).sum())

    def _evaluate(self, role: str, at: tuple[int, ...], loss: Loss | None) -> tuple[Tensor, Tensor]:
        """(loss, output) of one set at theta_k."""
        x, y, weights = (self.data[f"{role}_{part}"][at] if f"{role}_{part}" in self.data else None for part in _PARTS)
        known = self.features.get(role)
        replayed = known.values if known is not None else []
        with nullcontext() if known is None else known.replay(replayed) if replayed else known.record():
            output = call(self.p.net, self.theta, cast(Tensor, x), batch_stats=self.p.batch_stats)
        value = output.new_zeros(()) if loss is None or y is None else loss(output, y, weights)
        if self.looks and _reads_more((value, output), (*self.theta.values(), x, y, weights, *replayed)):
            raise Captures
        return value, output

    def _gradients(self) -> Gradients:
        p, wrt = self.p, self.wrt
        grads = Gradients(captured=[] if self.looks else None)
        if not wrt:
            return grads
        if self.task_loss is not None:
            self.terms.append(self.task_loss if self.task_weight is None else self.task_loss * self.task_weight)
        for name, cotangent in (p.adapted_grad or {}).items():
            self.terms.append((self.theta[name] * own(cotangent)[0]).sum())
        params = self.params if "params" in wrt else {}
        rates = self.rates if "lr" in wrt else {}
        data = {key: leaf for key, leaf in self.data.items() if key in wrt and leaf.is_floating_point()}
        found = iter(_inputs.gradients(self.terms, [*params.values(), *rates.values(), *data.values()]))
        if "params" in wrt:
            grads.params = {name: next(found) for name in params}
        if "lr" in wrt:
            grads.lr = {name: next(found) for name in rates}
        for key in data:
            setattr(grads, key, next(found))
        return grads


def _reads_more(outputs: Iterable[Tensor], given: Iterable[Tensor | None]) -> bool:
    """Whether the graph of `outputs` has leaves behind other tensors than those given."""
    leaves, seen = set(), {None}
    for tensor in given:
        if tensor is not None and tensor.requires_grad:
            if tensor.grad_fn is None:
                leaves.add(id(tensor))
            else:
                seen.add(tensor.grad_fn)  # type: ignore[arg-type]
    pending = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node in seen or node is None:
            continue
        seen.add(node)  # type: ignore[arg-type]
        edges = node.next_functions
        pending += [edge[0] for edge in edges]
        if not edges and (leaf := getattr(node, "variable", None)) is not None and id(leaf) not in leaves:
            return True
    return False
