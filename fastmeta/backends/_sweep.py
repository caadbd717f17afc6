"""The meta-step in PyTorch: one sweep forward over the inner steps and one back.

The mathematics is that of docs/architecture.md; the way back over the update rule is in
`_rule_steps`. A backend brings the three pieces: the gradient of an inner step, its
Hessian-vector product, and the query pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._rule_steps import steps_of
from fastmeta.inputs import Tree, mapped
from fastmeta.problem import Gradients, Problem, Result

#: What a piece keeps of an inner step for the way back.
K = TypeVar("K")
#: Gradients that have to be followed back through the inner steps.
THROUGH_STEPS = frozenset({"params", "lr", "rule", "support_x", "support_y", "support_weights"})


@dataclass(slots=True)
class _Step(Generic[K]):
    """What the sweep back needs of one inner step."""

    kept: K
    query_grad: dict[str, Tensor]  # s_k grad Q(theta_k); empty where s_k is zero
    rule: Any  # what `RuleSteps.direction` needs


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
        self.support_weights = p.support_step_weights or (0.0,) * p.steps
        self.names = list(p.rates) if p.steps else []
        self.stacked = p.per_task | frozenset(self.names)
        self.back = goes_back(p, wrt)
        self.task_losses: Tensor | None = None
        self.output: Tree = None
        self.total_rates = {name: torch.zeros_like(rate) for name, rate in p.rates.items()}
        self.total_rule = {name: torch.zeros_like(value) for name, value in p.hyper.items()}
        rates, rule = ("lr" in wrt and self.total_rates) or None, ("rule" in wrt and self.total_rule) or None
        self.rule = steps_of(p, self.names, rates, rule, self.back)
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
        """H_k v, of second order; adds d<g_k, v> / d everything else to the totals.

        Where the support loss L of step k is in the objective with a weight w, that is J's part of
        it too: H_k v + c w g_k, and d(<g_k, v> + c w L) / d everything else.
        """

    def support_term(self, kept: K, k: int) -> Mapping[str, Tensor]:
        """c w g_k of first order; adds d(c w L) / d everything else to the totals."""
        raise NotImplementedError

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
        return self.swept(adapted)

    def swept(self, adapted: bool) -> Result:
        """The sweep forward and back: all of `run` but what a subclass adds."""
        p = self.p
        theta = first = {name: stack(p, name) for name in self.names}
        state = self.rule.start(theta) if p.steps else None
        steps: list[_Step[K]] = []
        for k in range(p.steps):
            query_grad = self.query(theta, k) if self.step_weights[k] else {}
            values, kept = self.support_gradient(theta, k)
            theta, state, rule = self.rule.forward(
                theta, dict(zip(self.names, values, strict=True)), state, k
            )
            if self.back:
                steps.append(_Step(kept, query_grad, rule))
            del values, kept, rule  # a graph, where that is not wanted
        lam, sbar = self.last(theta), None
        if not self.reaches_steps():
            steps.clear()
        for k in reversed(range(len(steps))):
            step = steps.pop()
            lam, sbar = self.step_back(step.kept, step.query_grad, step.rule, lam, sbar, k)
        if sbar is not None:
            lam = self.rule.through_start(first, lam, sbar)
        return self.result(theta, lam, adapted)

    def last(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """dJ/d theta_K, as far as it does not come from the inner steps."""
        lam, cotangents = self.query(theta, self.p.steps), self.p.adapted_grad
        if cotangents is None:
            return lam
        return {name: lam[name] + cotangents[name] for name in self.names}

    def result(self, theta: Mapping[str, Tensor], lam: Mapping[str, Tensor], adapted: bool) -> Result:
        """The answer, from theta_K and dJ/d theta_0."""
        p = self.p
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

    def note_support(self, losses: Tensor, k: int) -> None:
        """Keep the support losses at theta_k, [T], detached, where they are in the objective."""
        weight = self.support_weights[k]
        if weight:
            kept = 0 if self.task_losses is None else self.task_losses
            self.task_losses = kept + weight * losses

    def support_seed(self, losses: Tensor, k: int) -> Tensor:
        """c_t w_k of all tasks, [T]."""
        share = self.support_weights[k] / self.p.tasks
        weights = self.p.task_weights
        return torch.full_like(losses, share) if weights is None else weights * share

    def add(self, keys: Sequence[str], found: Sequence[Tensor], k: int) -> None:
        """Add gradients found at step k to the totals of these keys."""
        for key, gradient in zip(keys, found, strict=True):
            one_step = key.startswith("support_") and _inputs.inner_loop(self.p)[0].per_step
            total = self.total[key][:, k] if one_step else self.total[key]
            total += gradient

    def step_back(
        self,
        kept: K,
        query_grad: Mapping[str, Tensor],
        rule: Any,
        lam: Mapping[str, Tensor],
        sbar: Any,
        k: int,
    ) -> tuple[dict[str, Tensor], Any]:
        """(dJ/d theta_k, dJ/d state_k) from those of step k + 1; adds to the totals what passes
        through g_k."""
        v, pending = self.rule.direction(rule, lam, sbar, k)
        hv: Mapping[str, Tensor] = {}
        if self.p.order == "second":
            hv = self.hessian_product(kept, v, k)
        elif self.support_weights[k]:
            hv = self.support_term(kept, k)
        before, sbar = self.rule.before(pending, lam, hv, v)
        for name, gradient in query_grad.items():
            before[name] = before[name] + gradient
        return before, sbar

    def _gradients(self, lam: Mapping[str, Tensor]) -> Gradients:
        """The gradients asked for; `lam` is dJ/d theta_0."""
        grads = Gradients(lr=self.total_rates if "lr" in self.wrt else None)
        grads.rule = self.total_rule if "rule" in self.wrt else None
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
