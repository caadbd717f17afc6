"""The meta-step of the `torch` backend: one sweep forward over the inner steps and one back.

The mathematics is that of docs/architecture.md; the update rule brings its own adjoint
(`fastmeta.update_rules`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured, Watch
from fastmeta.backends._random_state import RandomState, preserved_for
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.evaluation import Evaluation
from fastmeta.backends.torch.features import Body, Features, recorded
from fastmeta.backends.torch.replay import Replay
from fastmeta.inputs import Tree, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import own
from fastmeta.problem import Batch, Gradients, Problem, Result

#: Gradients that have to be followed back through the inner steps.
_THROUGH_STEPS = frozenset({"params", "lr", "support_x", "support_y", "support_weights"})


@dataclass(slots=True)
class _Gradient:
    """g_k, and where it has a graph the leaves of that."""

    theta: dict[str, Tensor]
    others: dict[str, Tensor]  # by their keys in `Sweep.total`
    values: list[Tensor]  # [T, *shape] for every adapted parameter
    losses: Tensor  # [T], detached
    captured: Watch


@dataclass(slots=True)
class _Step:
    """What the sweep back needs of one inner step."""

    theta: dict[str, Tensor]  # before the step
    replay: Replay | None  # to run it again
    gradient: _Gradient | None  # with its graph; None: to be run again
    query_grad: dict[str, Tensor]  # s_k grad Q(theta_k); empty where s_k is zero
    directions: dict[str, Tensor] = field(default_factory=dict)  # m', for the gradients of the rates


def needs_sweep_back(wrt: frozenset[str]) -> bool:
    """Whether a gradient in `wrt` has to be followed back through the inner steps."""
    return bool(wrt & _THROUGH_STEPS)


def goes_back(problem: Problem, wrt: frozenset[str]) -> bool:
    """Whether any gradient has to be."""
    return needs_sweep_back(wrt) or (problem.captures is not None and problem.captures.gradients)


class Sweep:
    """Solves one problem, once.

    Adapted parameters are [T, *shape] throughout; where K = 0 none counts as adapted. `total` sums
    up the gradients
    of everything else: the data by their names in `wrt`, parameters that are not adapted as
    "params.<name>".

    Args:
        p: the problem, its tensors detached.
        wrt: the gradients wanted.
        vectorised: tasks by vmap instead of a loop.
        store: keep the graph of every step's gradient instead of running it again on the way back.
        standing: what is computed once, as `features.standing` says.
    """

    def __init__(
        self,
        p: Problem,
        wrt: frozenset[str],
        vectorised: bool,
        store: bool,
        standing: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.p, self.wrt, self.vectorised = p, wrt, vectorised
        self.step_weights = p.step_weights or ()
        self.names = list(p.rates) if p.steps else []
        self.stacked = p.per_task | frozenset(self.names)
        self.captured = Captured(p)
        self.back = goes_back(p, wrt)
        self.store = store
        self.task_losses: Tensor | None = None
        self.output: Tree = None
        self.total_rates = {name: torch.zeros_like(rate) for name, rate in p.rates.items()}
        self.total: dict[str, Tensor] = {}
        if "params" in wrt:
            self.total = {
                f"params.{n}": torch.zeros_like(v) for n, v in p.params.items() if n not in self.names
            }
        self.total |= {name: torch.zeros_like(x) for name, x in _inputs.wanted_parts(p, wrt).items()}
        self.bodies: dict[str, Body] = {}
        self.bodies = self._bodies(standing)

    def run(self, adapted: bool) -> Result:
        """The answer; `adapted`: with theta_K."""
        p = self.p
        theta = {name: tasks.stack(p, name) for name in self.names}
        momentum: dict[str, Tensor] = {}
        steps: list[_Step] = []
        again = self.back and not self.store and p.order == "second" and p.steps > 0
        random_state = RandomState.of(p) if again else None
        for k in range(p.steps):
            query_grad = self._query(theta, k) if self.step_weights[k] else {}
            before = theta
            replay = None if random_state is None else Replay(random_state.anew())
            gradient = self._support_gradient(theta, k, create_graph=self.store)
            theta, momentum = self._update(theta, momentum, gradient, k)
            if replay is not None:
                replay.keep(gradient.losses)
            if self.back:
                directions = momentum if "lr" in self.wrt else {}
                steps.append(_Step(before, replay, gradient if self.store else None, query_grad, directions))
            del gradient  # its graph, where that is not kept
        lam = self._query(theta, p.steps)
        if p.adapted_grad is not None:
            lam = {name: lam[name] + p.adapted_grad[name] for name in self.names}
        mbar: dict[str, Tensor | None] = dict.fromkeys(self.names)
        if not (needs_sweep_back(self.wrt) or self.captured):
            steps.clear()
        for k in reversed(range(len(steps))):
            lam, mbar = self._step_back(steps.pop(), lam, mbar, k)
        for role, body in self.bodies.items():
            self._body_back(role, body)
        result = Result(self.task_losses, self.output, grads=self._gradients(lam))
        if adapted:
            final = {name: theta.get(name, tasks.stack(p, name)) for name in p.params}
            result.adapted = {
                name: value.clone(memory_format=torch.contiguous_format) for name, value in final.items()
            }
        return result

    def _update(
        self, theta: dict[str, Tensor], momentum: dict[str, Tensor], gradient: _Gradient, k: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(theta_{k+1}, m')."""
        _, _, rule = _inputs.inner_loop(self.p)
        updated = {
            name: rule.update(theta[name], g.detach(), momentum.get(name), self._rate(name, k))
            for name, g in zip(self.names, gradient.values, strict=True)
        }
        return {name: pair[0] for name, pair in updated.items()}, {
            name: pair[1] for name, pair in updated.items()
        }

    def _step_back(
        self, step: _Step, lam: Mapping[str, Tensor], mbar: Mapping[str, Tensor | None], k: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """(dJ/d theta_k, dJ/d m_k) from those of step k + 1; adds to the totals what passes through
        g_k."""
        _, _, rule = _inputs.inner_loop(self.p)
        v = {name: rule.direction(lam[name], mbar[name], self._rate(name, k)) for name in self.names}
        for name, direction in step.directions.items():
            rates = self.total_rates[name]
            at = k if rates.shape[0] > 1 else 0
            rates[at] -= (lam[name] * direction).sum_to_size(rates[at].shape)
        hv: Mapping[str, Tensor] = self._hessian_product(step, v, k) if self.p.order == "second" else {}
        before = {name: rule.update_adjoint(lam[name], hv.get(name), v[name]) for name in self.names}
        lam = {name: pair[0] for name, pair in before.items()}
        for name, gradient in step.query_grad.items():
            lam[name] = lam[name] + gradient
        return lam, {name: pair[1] for name, pair in before.items()}

    def _hessian_product(self, step: _Step, v: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """H_k v; adds d<g_k, v> / d everything else to the totals."""
        gradient = step.gradient
        if gradient is None:
            replay = step.replay or Replay(RandomState.of(self.p))
            with replay.again():
                gradient = self._support_gradient(step.theta, k, create_graph=True)
            replay.check(gradient.losses)
        seen = gradient.captured
        leaves = [*gradient.theta.values(), *gradient.others.values(), *seen.inputs]
        directions = [v[name] for name in self.names]
        products = _inputs.gradients(gradient.values, leaves, directions, retain_graph=seen.through or None)
        self._add(gradient.others, products[len(gradient.theta) :], k, seen)
        return dict(zip(gradient.theta, products, strict=False))

    def _support_gradient(self, theta: Mapping[str, Tensor], k: int, create_graph: bool) -> _Gradient:
        """g_k at theta."""
        support, loss, _ = _inputs.inner_loop(self.p)
        leaves = {name: own(value, requires_grad=True) for name, value in theta.items()}
        others = self._leaves("support", k) if create_graph else {}
        losses, _, seen = self._evaluate(leaves, others, "support", tasks.step_of(support, k), loss)
        values = _inputs.gradients([losses.sum()], list(leaves.values()), create_graph=create_graph)
        if create_graph:
            tasks.check_second_order(self.p, self.vectorised, losses, values)
        return _Gradient(leaves, others, values, losses.detach(), seen)

    def _query(self, theta: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The gradient of what J holds of the query set at theta_k; keeps losses and output."""
        p = self.p
        if p.query is None:
            return {name: torch.zeros_like(value) for name, value in theta.items()}
        leaves = {name: own(value, requires_grad=self.back) for name, value in theta.items()}
        others = self._leaves("query", k)
        with torch.set_grad_enabled(bool(self.wrt) or p.captures is not None):
            losses, output, seen = self._evaluate(leaves, others, "query", p.query, p.query_loss)
            terms = []
            if p.query_loss is not None and self.step_weights[k]:
                weighted = self.step_weights[k] * losses
                terms.append(
                    (weighted if p.task_weights is None else weighted * p.task_weights).sum() / p.tasks
                )
                kept = 0 if self.task_losses is None else self.task_losses
                self.task_losses = kept + weighted.detach()
            if k == p.steps:
                self.output = mapped(torch.detach, output)
                if self.task_losses is None and p.query_loss is not None:
                    self.task_losses = torch.zeros_like(losses)
                if p.output_grad is not None:
                    terms += _inputs.products(output, p.output_grad)
        wanted = [*leaves.values(), *others.values(), *seen.inputs]
        found = _inputs.gradients(terms, wanted, retain_graph=seen.through or None)
        self._add(others, found[len(leaves) :], k, seen)
        return dict(zip(leaves, found, strict=False))

    def _evaluate(
        self,
        theta: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        role: str,
        batch: Batch,
        loss: Loss | None,
    ) -> tuple[Tensor, Tree, Watch]:
        """Losses and outputs of all tasks, with the leaves `others` in the place of what they stand
        for, and what was captured."""
        params = {name: others.get(f"params.{name}", value) for name, value in self.p.params.items()}
        batch = _inputs.with_parts(batch, role, others)
        params |= theta
        body = self.bodies.get(role)
        return Evaluation(
            problem=self.p,
            params=params,
            stacked=self.stacked,
            batch=batch,
            loss=loss,
            vectorised=self.vectorised,
            features=None if body is None else body.features,
            values=() if body is None else [others.get(key, value) for key, value in body.values.items()],
        ).watched(self.captured)

    def _bodies(self, standing: Mapping[str, tuple[str, ...]]) -> dict[str, Body]:
        """What stands still, of the support and the query sets, computed; its gradients get places
        in `total`."""
        bodies = {}
        for role, names in standing.items():
            batch, features = getattr(self.p, role), Features(self.p, names)
            others = self._leaves(role, 0)
            params = {name: others.get(f"params.{name}", value) for name, value in self.p.params.items()}
            params |= {name: tasks.stack(self.p, name) for name in self.names}
            batch = _inputs.with_parts(batch, role, others)
            given = features, self.p, params, self.stacked, batch, self.vectorised
            # the rest of the network may draw random numbers: that is for the passes to come
            with preserved_for(self.p):
                values, seen = self.captured.watched(partial(recorded, *given), [*params.values(), batch.x])
            keys = [f"{role}_features.{i}" for i in range(len(values))]
            leaves = dict(zip(keys, map(own, values), strict=True))
            bodies[role] = Body(features, leaves, values, others, seen)
        for role, body in bodies.items():
            for (key, value), made in zip(body.values.items(), body.made, strict=True):
                if made.requires_grad and (role == "query" or self.p.order == "second"):
                    self.total[key] = torch.zeros_like(value)
        return bodies

    def _body_back(self, role: str, body: Body) -> None:
        """From the gradients of what stands still to those of what it was made of."""
        cotangents = [self.total.pop(key, None) for key in body.values]
        pairs = [(made, c) for made, c in zip(body.made, cotangents, strict=True) if c is not None]
        if not pairs:
            return
        made, directions = zip(*pairs, strict=True)
        wanted = [*body.others.values(), *body.seen.inputs]
        found = _inputs.gradients(made, wanted, directions, retain_graph=body.seen.through or None)
        self._add(body.others, found, 0, body.seen)

    def _leaves(self, role: str, k: int) -> dict[str, Tensor]:
        """A leaf for everything in `total` that a pass over the support or the query set at step k
        depends on."""
        if not self.total:
            return {}
        batch = self.p.query if role == "query" else tasks.step_of(_inputs.inner_loop(self.p)[0], k)
        sources = {f"params.{name}": value for name, value in self.p.params.items()}
        sources |= _inputs.parts_of(batch, role)
        sources |= self.bodies[role].values if role in self.bodies else {}
        return {key: own(sources[key], requires_grad=True) for key in self.total if key in sources}

    def _add(self, others: Mapping[str, Tensor], found: Sequence[Tensor], k: int, seen: Watch) -> None:
        """Add gradients found at step k, by `others` and then by what was captured, to the
        totals."""
        self.captured.add(seen, found[len(others) :])
        for key, gradient in zip(others, found, strict=False):
            one_step = key.startswith("support_") and _inputs.inner_loop(self.p)[0].per_step
            total = self.total[key][:, k] if one_step else self.total[key]
            total += gradient

    def _gradients(self, lam: Mapping[str, Tensor]) -> Gradients:
        """The gradients asked for; `lam` is dJ/d theta_0."""
        grads = Gradients(lr=self.total_rates if "lr" in self.wrt else None, captured=self.captured.pairs())
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
