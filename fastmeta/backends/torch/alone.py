"""One task on its own, by autograd through its whole inner loop: one backward pass at the end.

The graph of all inner steps is kept, as `EagerSweep` with `store` keeps it; what is done is less:
no step is differentiated by itself, none is run again, and nothing is stacked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured
from fastmeta.backends._rule_tasks import step_of_one
from fastmeta.backends._sweep import goes_back
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.evaluation import evaluate_one
from fastmeta.backends.torch.features import Features
from fastmeta.inputs import Tree, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import own
from fastmeta.problem import Gradients, Problem, Result
from fastmeta.update_rules import SGD
from fastmeta.update_rules.rule import State


def alone(p: Problem, wrt: frozenset[str], adapted: bool, standing: Mapping[str, tuple[str, ...]]) -> Result:
    """The answer to a problem of one task.

    Args:
        p: its tensors detached, its step weights written out.
        wrt, adapted: as a backend has them.
        standing: what is computed once, as `features.standing` says.
    """
    return _Task(p, wrt, standing).run(adapted)


class _Task:
    def __init__(self, p: Problem, wrt: frozenset[str], standing: Mapping[str, tuple[str, ...]]) -> None:
        self.p, self.wrt = p, wrt
        self.names = list(p.rates) if p.steps else []
        wanted = "params" in wrt
        self.params = {
            name: own(value, (wanted and name not in p.frozen) or name in self.names)
            for name, value in p.params.items()
        }
        self.theta = {name: leaf[0] if name in p.per_task else leaf for name, leaf in self.params.items()}
        self.rates = {name: own(rate, "lr" in wrt) for name, rate in p.rates.items()}
        self.hyper = {name: own(value, "rule" in wrt) for name, value in p.hyper.items()}
        self.support_weights = p.support_step_weights or (0.0,) * p.steps
        self.state: State = None  # of the update rule
        # leaves by the names of `parts_of`
        self.data = {name: own(tensor, True) for name, tensor in _inputs.wanted_parts(p, wrt).items()}
        sets = {"support": p.support, "query": p.query}
        self.sets = {r: _inputs.with_parts(batch, r, self.data) for r, batch in sets.items() if batch}
        self.captured = Captured(p, keep=True)
        self.looks = bool(wrt) or p.captures is not None
        self.back = goes_back(p, wrt)
        self.second = p.order == "second" and self.back
        self.features = {role: Features(p, names) for role, names in standing.items()}
        self.terms: list[Tensor] = []  # of J
        self.task_loss: Tensor | None = None
        self.output: Tree = None

    def run(self, adapted: bool) -> Result:
        p = self.p
        for k, weight in enumerate(p.step_weights or ()):
            if p.query is not None and (weight or k == p.steps):
                with torch.set_grad_enabled(self.looks):
                    self._query(weight, k == p.steps)
            if k < p.steps:
                self._inner_step(k)
        result = Result(grads=self._gradients())
        result.output = mapped(lambda leaf: torch.stack([leaf.detach()]), self.output)
        if p.query_loss is not None and self.output is not None:
            loss, first = self.task_loss, next(iter(p.params.values()))
            result.task_losses = first.new_zeros(1) if loss is None else loss.detach().reshape(1)
        if adapted:
            result.adapted = {name: torch.stack([value.detach()]) for name, value in self.theta.items()}
        return result

    def _inner_step(self, k: int) -> None:
        support, loss, _ = _inputs.inner_loop(self.p)
        value, _ = self._evaluate("support", (0, k) if support.per_step else (0,), loss)
        if self.support_weights[k]:
            self._note(self.support_weights[k] * (value if self.looks else value.detach()))
        found = _inputs.gradients(
            [value],
            [self.theta[name] for name in self.names],
            create_graph=self.second,
            retain_graph=True if self.support_weights[k] else None,  # J is differentiated too
        )
        if self.second and k == 0:
            tasks.check_second_order(self.p, False, value, found)
        self._update(dict(zip(self.names, found, strict=True)), k)

    def _update(self, g: dict[str, Tensor], k: int) -> None:
        """The adapted parameters and the rule's state become those of step k + 1."""
        rule = self.p.rule
        rates = {name: rate[k if rate.shape[0] > 1 else 0, 0] for name, rate in self.rates.items()}
        if isinstance(rule, SGD) and rule.written:
            momentum = self.state or {}
            pairs = {n: rule.update(self.theta[n], g[n], momentum.get(n), rates[n]) for n in self.names}
            moved, self.state = ({n: pair[i] for n, pair in pairs.items()} for i in (0, 1))
        elif rule is not None:
            theta = {name: self.theta[name] for name in self.names}
            state = self.state if k else rule.init(theta)
            moved, self.state = step_of_one(self.p, rule, theta, g, state, rates, self.hyper, k)
        if self.back:
            self.theta.update(moved)
            return
        self.theta.update({name: value.detach().requires_grad_() for name, value in moved.items()})
        self.state = mapped(torch.detach, self.state)

    def _query(self, weight: float, last: bool) -> None:
        """The query at theta_k: its share of J."""
        p = self.p
        value, output = self._evaluate("query", (0,), p.query_loss)
        if p.query_loss is not None and weight:
            self._note(weight * value)
        if last:
            self.output = output
            if p.output_grad is not None:
                cotangent = mapped(lambda leaf: leaf[0], p.output_grad)
                self.terms += _inputs.products(output, cotangent)

    def _note(self, weighted: Tensor) -> None:
        self.task_loss = weighted if self.task_loss is None else self.task_loss + weighted

    def _evaluate(self, role: str, at: tuple[int, ...], loss: Loss | None) -> tuple[Tensor, Tree]:
        """(loss, output) of one set at theta_k."""
        batch = self.sets[role]
        x, y, weights = (mapped(lambda t: t[at], tree) for tree in (batch.x, batch.y, batch.weights))
        examples = x, y, weights
        known = self.features.get(role)
        replayed = [] if known is None else known.values
        forwards = None if known is None else known.replaying(replayed) if replayed else known.recording()
        value, output, _ = self.captured.evaluated(
            lambda: evaluate_one(self.p, self.theta, examples, loss, forwards=forwards),
            [*self.theta.values(), *examples, *replayed],
        )
        return value, output

    def _gradients(self) -> Gradients:
        p, wrt, captured = self.p, self.wrt, self.captured
        if self.task_loss is not None:
            self.terms.append(
                self.task_loss if p.task_weights is None else self.task_loss * p.task_weights[0]
            )
        for name, cotangent in (p.adapted_grad or {}).items():
            self.terms.append((self.theta[name] * cotangent[0]).sum())
        params = self.params if "params" in wrt else {}
        rates = self.rates if "lr" in wrt else {}
        hyper = self.hyper if "rule" in wrt else {}
        data = self.data
        leaves = [*params.values(), *rates.values(), *hyper.values(), *data.values()]
        read = captured.inputs
        # what was read may be reached through the user's own graph
        found = _inputs.gradients(self.terms, [*leaves, *read], retain_graph=bool(read) or None)
        captured.add_kept(found[len(leaves) :])
        gradients = iter(found)
        grads = Gradients(captured=captured.pairs())
        if "params" in wrt:
            grads.params = {name: next(gradients) for name in params}
        if "lr" in wrt:
            grads.lr = {name: next(gradients) for name in rates}
        if "rule" in wrt:
            grads.rule = {name: next(gradients) for name in hyper}
        _inputs.put_parts(grads, p, dict(zip(data, gradients, strict=False)))
        return grads
