"""The meta-step in PyTorch: one sweep forward over the inner steps and one back.

The mathematics is that of docs/architecture.md; the update rule brings its own adjoint
(`fastmeta.update_rules`). A backend brings the three pieces: the gradient of an inner step, its
Hessian-vector product, and the query pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.inputs import Tree, mapped
from fastmeta.problem import Gradients, Problem, Result

#: What a piece keeps of an inner step for the way back.
K = TypeVar("K")
#: Gradients that have to be followed back through the inner steps.
THROUGH_STEPS = frozenset({"params", "lr", "support_x", "support_y", "support_weights"})


@dataclass(slots=True)
class _Step(Generic[K]):
    """What the sweep back needs of one inner step."""

    kept: K
    query_grad: dict[str, Tensor]  # s_k grad Q(theta_k); empty where s_k is zero
    directions: dict[str, Tensor] = field(default_factory=dict)  # m', for the gradients of the rates


def needs_sweep_back(wrt: frozenset[str]) -> bool:
    """Whether a gradient in `wrt` has to be followed back through the inner steps."""
    return bool(wrt & THROUGH_STEPS)


def goes_back(problem: Problem, wrt: frozenset[str]) -> bool:
    """Whether any gradient has to be."""
    return needs_sweep_back(wrt) or (problem.captures is not None and problem.captures.gradients)


def stack(problem: Problem, name: str) -> Tensor:
    """Parameter `name` of every task: [T, *shape], not copied."""
    value = problem.params[name]
    return value if name in problem.per_task else value.expand(problem.tasks, *value.shape)


class Sweep(ABC, Generic[K]):
    """Solves one problem, once.

    Adapted parameters are [T, *shape] throughout; where K = 0 none counts as adapted. `total` sums
    up the gradients of everything else: the data by their names in `wrt`, parameters that are not
    adapted as "params.<name>".

    Args:
        p: the problem, its tensors detached, its step weights written out.
        wrt: the gradients wanted.
    """

    def __init__(self, p: Problem, wrt: frozenset[str]) -> None:
        self.p, self.wrt = p, wrt
        self.step_weights = p.step_weights or ()
        self.names = list(p.rates) if p.steps else []
        self.stacked = p.per_task | frozenset(self.names)
        self.back = goes_back(p, wrt)
        self.task_losses: Tensor | None = None
        self.output: Tree = None
        self.total_rates = {name: torch.zeros_like(rate) for name, rate in p.rates.items()}
        self.total: dict[str, Tensor] = {}
        if "params" in wrt:
            self.total = {
                f"params.{n}": torch.zeros_like(v) for n, v in p.params.items() if n not in self.names
            }
        self.total |= {name: torch.zeros_like(x) for name, x in _inputs.wanted_parts(p, wrt).items()}

    @abstractmethod
    def support_gradient(self, theta: dict[str, Tensor], k: int) -> tuple[list[Tensor], K]:
        """(g_k, detached, [T, *shape] for every adapted parameter; what is kept of the step)."""

    @abstractmethod
    def hessian_product(self, kept: K, v: Mapping[str, Tensor], k: int) -> Mapping[str, Tensor]:
        """H_k v; adds d<g_k, v> / d everything else to the totals."""

    @abstractmethod
    def query(self, theta: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The gradient of what J holds of the query set at theta_k, for adapted parameters; hands
        losses and output to `note`, and adds what there is by everything else to the totals."""

    def reaches_steps(self) -> bool:
        """After the query pass: whether anything is wanted that goes through the inner steps."""
        return needs_sweep_back(self.wrt)

    def finish(self) -> None:
        """After the sweep back, before gradients are read from the totals."""

    def run(self, adapted: bool) -> Result:
        """The answer; `adapted`: with theta_K."""
        p = self.p
        theta = {name: stack(p, name) for name in self.names}
        momentum: dict[str, Tensor] = {}
        steps: list[_Step[K]] = []
        for k in range(p.steps):
            query_grad = self.query(theta, k) if self.step_weights[k] else {}
            values, kept = self.support_gradient(theta, k)
            theta, momentum = self._update(theta, momentum, values, k)
            if self.back:
                steps.append(_Step(kept, query_grad, momentum if "lr" in self.wrt else {}))
            del values, kept  # a graph, where that is not wanted
        lam = self.query(theta, p.steps)
        if p.adapted_grad is not None:
            lam = {name: lam[name] + p.adapted_grad[name] for name in self.names}
        mbar: dict[str, Tensor | None] = dict.fromkeys(self.names)
        if not self.reaches_steps():
            steps.clear()
        for k in reversed(range(len(steps))):
            lam, mbar = self._step_back(steps.pop(), lam, mbar, k)
        self.finish()
        result = Result(self.task_losses, self.output, grads=self._gradients(lam))
        if adapted:
            final = {name: theta.get(name, stack(p, name)) for name in p.params}
            result.adapted = {
                name: value.clone(memory_format=torch.contiguous_format) for name, value in final.items()
            }
        return result

    def note(self, losses: Tensor, output: Tree, k: int) -> None:
        """Keep what the query set gives at theta_k.

        Args:
            losses: [T], detached.
            output: [T, M, *out].
            k: of the step.
        """
        p = self.p
        if p.query_loss is not None and self.step_weights[k]:
            kept = 0 if self.task_losses is None else self.task_losses
            self.task_losses = kept + self.step_weights[k] * losses
        if k == p.steps:
            self.output = mapped(torch.detach, output)
            if self.task_losses is None and p.query_loss is not None:
                self.task_losses = torch.zeros_like(losses)

    def add(self, keys: Sequence[str], found: Sequence[Tensor], k: int) -> None:
        """Add gradients found at step k to the totals of these keys."""
        for key, gradient in zip(keys, found, strict=True):
            one_step = key.startswith("support_") and _inputs.inner_loop(self.p)[0].per_step
            total = self.total[key][:, k] if one_step else self.total[key]
            total += gradient

    def _update(
        self, theta: dict[str, Tensor], momentum: dict[str, Tensor], values: Sequence[Tensor], k: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(theta_{k+1}, m')."""
        _, _, rule = _inputs.inner_loop(self.p)
        updated = {
            name: rule.update(theta[name], g, momentum.get(name), self._rate(name, k))
            for name, g in zip(self.names, values, strict=True)
        }
        return {name: pair[0] for name, pair in updated.items()}, {
            name: pair[1] for name, pair in updated.items()
        }

    def _step_back(
        self, step: _Step[K], lam: Mapping[str, Tensor], mbar: Mapping[str, Tensor | None], k: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """(dJ/d theta_k, dJ/d m_k) from those of step k + 1; adds to the totals what passes through
        g_k."""
        _, _, rule = _inputs.inner_loop(self.p)
        v = {name: rule.direction(lam[name], mbar[name], self._rate(name, k)) for name in self.names}
        for name, direction in step.directions.items():
            rates = self.total_rates[name]
            at = k if rates.shape[0] > 1 else 0
            rates[at] -= (lam[name] * direction).sum_to_size(rates[at].shape)
        hv = self.hessian_product(step.kept, v, k) if self.p.order == "second" else {}
        before = {name: rule.update_adjoint(lam[name], hv.get(name), v[name]) for name in self.names}
        lam = {name: pair[0] for name, pair in before.items()}
        for name, gradient in step.query_grad.items():
            lam[name] = lam[name] + gradient
        return lam, {name: pair[1] for name, pair in before.items()}

    def _gradients(self, lam: Mapping[str, Tensor]) -> Gradients:
        """The gradients asked for; `lam` is dJ/d theta_0."""
        grads = Gradients(lr=self.total_rates if "lr" in self.wrt else None)
        if "params" in self.wrt:
            grads.params = {name: self._params_gradient(name, lam) for name in self.p.params}
        _inputs.put_parts(grads, self.p, self.total)
        return grads

    def _params_gradient(self, name: str, lam: Mapping[str, Tensor]) -> Tensor:
        own_per_task = name in self.p.per_task
        if name in lam:
            return lam[name].clone() if own_per_task else lam[name].sum(0)
        total = self.total[f"params.{name}"]
        if self.p.adapted_grad is not None:
            cotangent = self.p.adapted_grad[name]
            total += cotangent if own_per_task else cotangent.sum(0)
        return total

    def _rate(self, name: str, k: int) -> Tensor:
        """alpha_k: [T or 1, *(S or 1s)]."""
        rates = self.p.rates[name]
        return rates[k if rates.shape[0] > 1 else 0]
