"""The meta-step of the `torch` backend with memory="checkpoint": theta and the state of the rule
are kept for a few steps, and the steps between them are run again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.backends import _checkpoints
from fastmeta.backends._checkpoints import ADVANCE, BACK, RESTORE, SAVE, copy_bytes, schedule, slots_for
from fastmeta.backends._random_state import RandomState, replayed
from fastmeta.backends._sweep import stack
from fastmeta.backends.torch.replay import Replay
from fastmeta.backends.torch.sweep import EagerSweep, Kept
from fastmeta.inputs import Tree
from fastmeta.problem import Problem, Result
from fastmeta.update_rules.rule import Named, State


def check(p: Problem, tasks: int) -> None:
    """Check that `memory_limit` leaves room for one copy; arguments as of `copy_bytes`.

    Raises:
        ValueError: it does not.
    """
    if p.steps:
        slots_for(p.steps, copy_bytes(p, tasks), p.memory_limit)


def said(p: Problem, tasks: int) -> str:
    """What is kept and what it costs, for `explain()`; arguments as of `copy_bytes`."""
    return _checkpoints.said(p, copy_bytes(p, tasks))


@dataclass(slots=True)
class _Ran:
    """What it takes to run a step again as it was run first."""

    query: RandomState | None  # before the query pass; None: there is none
    support: Replay
    rule: RandomState | None  # before the rule; None: it draws nothing


class CheckpointedSweep(EagerSweep):
    """Solves one problem, once.

    Args:
        p, wrt, vectorised, standing: as of `EagerSweep`.
    """

    def __init__(
        self,
        p: Problem,
        wrt: frozenset[str],
        vectorised: bool,
        standing: Mapping[str, tuple[str, ...]],
    ) -> None:
        super().__init__(p, wrt, vectorised, False, standing)
        self._ran: dict[int, _Ran] = {}
        self._noted = False  # whether what `note` is told of is known already

    def swept(self, adapted: bool) -> Result:
        """As `Sweep.swept`, by the schedule of `_checkpoints`."""
        p = self.p
        if not self.back or not p.steps:
            return super().swept(adapted)
        first = {name: stack(p, name) for name in self.names}
        theta: Named = first
        state: State = self.rule.start(theta)
        saved: dict[int, tuple[Named, State]] = {}
        final: Named = {}  # theta_K
        lam: Named = {}
        sbar: Any = None
        slots = slots_for(p.steps, copy_bytes(p, p.tasks), p.memory_limit)
        for kind, at, to in schedule(p.steps, slots):
            if kind == SAVE:
                saved[to] = theta, state
            elif kind == RESTORE:
                theta, state = saved[to]
            elif kind == ADVANCE:
                for k in range(at, to):
                    theta, state, _, _ = self._step(theta, state, k, graph=False)
            elif kind == BACK:
                after, _, kept, rule = self._step(theta, state, at, graph=True)
                if at == p.steps - 1:
                    final, lam = after, self.last(after)
                    if not self.reaches_steps():
                        break
                lam, sbar = self.step_back(kept, self._query_again(theta, at), rule, lam, sbar, at)
                del kept, rule, after
        if sbar is not None:
            lam = self.rule.through_start(first, lam, sbar)
        return self.result(final, lam, adapted)

    def note(self, losses: Tensor, output: Tree, k: int) -> None:
        """As `Sweep.note`, once for every step."""
        if not self._noted:
            super().note(losses, output, k)

    def _step(self, theta: Named, state: State, k: int, graph: bool) -> tuple[Named, State, Kept, Any]:
        """(theta_{k+1}, its state, what is kept of g_k, what is kept of the rule)."""
        ran = self._ran.get(k)
        create = graph and self.p.order == "second"
        if ran is None:
            query = self._note_query(theta, k)
            support = Replay(self._now())
            gradient = self._gradient(theta, k, create_graph=create)
            support.keep(gradient.losses)
            self.note_support(gradient.losses.detach(), k)
            custom = self.p.rule is not None and self.p.rule.kind == "custom"
            ran = self._ran[k] = _Ran(query, support, self._now() if custom else None)
            random = None
        else:
            with ran.support.again():
                gradient = self._gradient(theta, k, create_graph=create)
            ran.support.check(gradient.losses)
            random = ran.rule
        g = {name: value.detach() for name, value in zip(self.names, gradient.values, strict=True)}
        with nullcontext() if random is None else replayed(random):
            theta_after, state, rule = self.rule.forward(theta, g, state, k)
        return theta_after, state, Kept(theta, ran.support, gradient if create else None), rule

    def _note_query(self, theta: Named, k: int) -> RandomState | None:
        """Query losses of a step in the middle, without gradients; the random state before it."""
        p = self.p
        if p.query is None or not self.step_weights[k]:
            return None
        before = self._now()
        with torch.no_grad():
            losses, output, _ = self._evaluate(theta, {}, "query", p.query, p.query_loss)
        self.note(losses, output, k)
        return before

    def _query_again(self, theta: Named, k: int) -> Named:
        """s_k grad Q(theta_k); {} where s_k is zero."""
        before = self._ran[k].query
        if before is None:
            return {}
        self._noted = True
        with replayed(before):
            found = self.query(theta, k)
        self._noted = False
        return found
