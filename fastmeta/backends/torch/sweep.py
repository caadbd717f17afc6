"""The meta-step of the `torch` backend: the pieces of the sweep by autograd, on the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Captured, Watch
from fastmeta.backends._random_state import RandomState, preserved_for
from fastmeta.backends._sweep import Sweep, needs_sweep_back, stack
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.evaluation import Evaluation
from fastmeta.backends.torch.features import Body, Features, recorded
from fastmeta.backends.torch.replay import Replay
from fastmeta.inputs import Tree
from fastmeta.losses import Loss
from fastmeta.network.functional import own
from fastmeta.problem import Batch, Problem, Result


@dataclass(slots=True)
class _Gradient:
    """g_k, and where it has a graph the leaves of that."""

    theta: dict[str, Tensor]
    others: dict[str, Tensor]  # by their keys in `Sweep.total`
    values: list[Tensor]  # [T, *shape] for every adapted parameter
    losses: Tensor  # [T]
    captured: Watch


@dataclass(slots=True)
class Kept:
    """What is kept of one inner step."""

    theta: dict[str, Tensor]  # before the step
    replay: Replay | None  # to run it again
    gradient: _Gradient | None  # with its graph; None: to be run again


class EagerSweep(Sweep[Kept]):
    """Solves one problem, once.

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
        super().__init__(p, wrt)
        self.vectorised, self.store = vectorised, store
        # whether J depends on a support set otherwise than by theta
        self.through_support = p.order == "second" or any(self.support_weights)
        self.captured = Captured(p)
        again = self.back and not store and self.through_support and p.steps > 0
        self.bodies: dict[str, Body] = {}
        self.bodies = self._bodies(standing)
        self._replays = again
        self._random_state: RandomState | None = None

    def _now(self) -> RandomState:
        """The random state; the same object as long as nothing is drawn."""
        last = self._random_state
        now = RandomState.of(self.p) if last is None else last.anew()
        if last is None or not now.same_as(last):
            self._random_state = now
            return now
        return last

    def run(self, adapted: bool) -> Result:
        """The answer, with gradients by what was captured."""
        result = self.swept(adapted)
        result.grads.captured = self.captured.pairs()
        return result

    def reaches_steps(self) -> bool:
        """Also where the network or a loss was found to read something that wants a gradient."""
        return needs_sweep_back(self.wrt) or bool(self.captured)

    def finish(self) -> None:
        """From what stands still to what it was made of."""
        for role, body in self.bodies.items():
            self._body_back(role, body)

    def support_gradient(self, theta: dict[str, Tensor], k: int) -> tuple[list[Tensor], Kept]:
        """g_k, and its graph or what it takes to run the step again."""
        replay = Replay(self._now()) if self._replays else None
        gradient = self._gradient(theta, k, create_graph=self.store)
        self.note_support(gradient.losses.detach(), k)
        if replay is not None:
            replay.keep(gradient.losses)
        values = [g.detach() for g in gradient.values]
        return values, Kept(theta, replay, gradient if self.store else None)

    def hessian_product(self, kept: Kept, v: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """From the graph of g_k."""
        gradient = kept.gradient
        if gradient is None:
            replay = kept.replay or Replay(RandomState.of(self.p))
            with replay.again():
                gradient = self._gradient(kept.theta, k, create_graph=True)
            replay.check(gradient.losses)
        seen = gradient.captured
        leaves = [*gradient.theta.values(), *gradient.others.values(), *seen.inputs]
        outputs, directions = gradient.values, [v[name] for name in self.names]
        if self.support_weights[k]:
            outputs = [*outputs, gradient.losses]
            directions.append(self.support_seed(gradient.losses.detach(), k))
        products = _inputs.gradients(outputs, leaves, directions, retain_graph=seen.through or None)
        self._add(gradient.others, products[len(gradient.theta) :], k, seen)
        return dict(zip(gradient.theta, products, strict=False))

    def support_term(self, kept: Kept, k: int) -> dict[str, Tensor]:
        """By one more pass over the support set."""
        support, loss, _ = _inputs.inner_loop(self.p)
        leaves = {name: own(value, requires_grad=True) for name, value in kept.theta.items()}
        others = self._leaves("support", k)
        replay = kept.replay or Replay(RandomState.of(self.p))
        with replay.again():
            batch = tasks.step_of(support, k)
            losses, _, seen = self._evaluate(leaves, others, "support", batch, loss)
        replay.check(losses)
        wanted = [*leaves.values(), *others.values(), *seen.inputs]
        seed = self.support_seed(losses.detach(), k)
        found = _inputs.gradients([losses], wanted, [seed], retain_graph=seen.through or None)
        self._add(others, found[len(leaves) :], k, seen)
        return dict(zip(leaves, found, strict=False))

    def _gradient(self, theta: Mapping[str, Tensor], k: int, create_graph: bool) -> _Gradient:
        """g_k at theta."""
        support, loss, _ = _inputs.inner_loop(self.p)
        leaves = {name: own(value, requires_grad=True) for name, value in theta.items()}
        others = self._leaves("support", k) if create_graph else {}
        losses, _, seen = self._evaluate(leaves, others, "support", tasks.step_of(support, k), loss)
        values = _inputs.gradients([losses.sum()], list(leaves.values()), create_graph=create_graph)
        if create_graph:
            tasks.check_second_order(self.p, self.vectorised, losses, values)
        return _Gradient(leaves, others, values, losses if create_graph else losses.detach(), seen)

    def query(self, theta: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """By a backward pass over what J holds of the query set."""
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
            if k == p.steps and p.output_grad is not None:
                terms += _inputs.products(output, p.output_grad)
        self.note(losses.detach(), output, k)
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
            params |= {name: stack(self.p, name) for name in self.names}
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
                if made.requires_grad and (role == "query" or self.through_support):
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
        self.add([*others], found[: len(others)], k)
