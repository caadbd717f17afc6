"""Inner steps by an update rule, of all tasks, and the way back over them.

SGD with momentum and weight decay has its adjoint written out. That of every other rule is what
autograd makes of its step, which is run again for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta.backends import _inputs, _rule_tasks
from fastmeta.backends._random_state import RandomState, replayed
from fastmeta.backends._rule_tasks import start_of_all, step_of_all
from fastmeta.inputs import leaves_of, mapped
from fastmeta.network.functional import own
from fastmeta.problem import Problem
from fastmeta.update_rules import SGD, UpdateRule
from fastmeta.update_rules.rule import Named, State


class RuleSteps(Protocol):
    """The inner steps of one problem, as `fastmeta.backends._sweep` needs them."""

    def start(self, theta: Named) -> State:
        """The state before the first step; theta is [T, *shape] throughout."""

    def forward(self, theta: Named, g: Named, state: State, k: int) -> tuple[Named, State, Any]:
        """(theta', state', what `direction` needs of the step)."""

    def direction(self, kept: Any, lam: Mapping[str, Tensor], sbar: Any, k: int) -> tuple[Named, Any]:
        """(dJ/dg, what `before` needs); adds to the gradients of the rates and of learned numbers.

        Args:
            kept: of the step.
            lam: dJ/dtheta'.
            sbar: dJ/dstate' as `before` returned it; None after the last step.
            k: the step.
        """

    def before(
        self, pending: Any, lam: Mapping[str, Tensor], hv: Mapping[str, Tensor], v: Named
    ) -> tuple[Named, Any]:
        """(dJ/dtheta, dJ/dstate) before the step; `hv` is H v, or {} for first order."""

    def through_start(self, theta: Named, lam: Named, sbar: Any) -> Named:
        """dJ/dtheta_0, with what comes from the state before the first step.

        Args:
            theta: theta_0.
            lam, sbar: what `before` returned of the first step.
        """


class WrittenSteps:
    """SGD by its own adjoint.

    Args:
        p: the problem.
        names: the adapted parameters.
        rule: the rule, which is `written`.
        total_rates: the gradients of the rates, which are added to; None: they are not wanted.
    """

    def __init__(
        self, p: Problem, names: Sequence[str], rule: SGD, total_rates: dict[str, Tensor] | None
    ) -> None:
        self.p, self.names, self.rule, self.total_rates = p, names, rule, total_rates

    def start(self, theta: Named) -> Named:
        """There is no momentum yet."""
        return {}

    def forward(self, theta: Named, g: Named, state: Named, k: int) -> tuple[Named, Named, Named]:
        """The momentum is what the gradients of the rates need."""
        updated = {
            name: self.rule.update(theta[name], g[name], state.get(name), rate_at(self.p, name, k))
            for name in self.names
        }
        after = {name: pair[1] for name, pair in updated.items()}
        kept = {} if self.total_rates is None else after
        state = after if self.rule.momentum else {}
        return {name: pair[0] for name, pair in updated.items()}, state, kept

    def direction(
        self, kept: Named, lam: Mapping[str, Tensor], sbar: dict[str, Tensor | None] | None, k: int
    ) -> tuple[Named, None]:
        """By `SGD.direction`."""
        mbar = sbar or dict.fromkeys(self.names)
        v = {
            name: self.rule.direction(lam[name], mbar[name], rate_at(self.p, name, k)) for name in self.names
        }
        for name, direction in kept.items():
            rates = (self.total_rates or {})[name]
            at = k if rates.shape[0] > 1 else 0
            rates[at] -= (lam[name] * direction).sum_to_size(rates[at].shape)
        return v, None

    def before(
        self, pending: None, lam: Mapping[str, Tensor], hv: Mapping[str, Tensor], v: Named
    ) -> tuple[Named, dict[str, Tensor | None]]:
        """By `SGD.update_adjoint`."""
        pairs = {name: self.rule.update_adjoint(lam[name], hv.get(name), v[name]) for name in self.names}
        return {name: pair[0] for name, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()}

    def through_start(self, theta: Named, lam: Named, sbar: Any) -> Named:
        """There is no momentum before the first step."""
        return lam


class _Kept:
    """What the way back over a step needs: all that it was made from."""

    __slots__ = ("g", "random", "state", "theta")

    def __init__(self, theta: Named, g: Named, state: State, random: RandomState | None) -> None:
        self.theta, self.g, self.state, self.random = theta, g, state, random


class DerivedSteps:
    """Any rule by autograd: the step is run again with a graph, which is gone after it.

    Args:
        p: the problem.
        names: the adapted parameters.
        rule: the rule.
        total_rates: as of `WrittenSteps`.
        total_rule: the gradients of the learned numbers, which are added to; None: they are not
            wanted.
        back: whether there is a way back.
    """

    def __init__(
        self,
        p: Problem,
        names: Sequence[str],
        rule: UpdateRule,
        total_rates: dict[str, Tensor] | None,
        total_rule: dict[str, Tensor] | None,
        back: bool,
    ) -> None:
        self.p, self.names, self.rule = p, names, rule
        self.total_rates, self.total_rule = total_rates, total_rule
        # a rule of the user's own may draw random numbers: the same ones on the way back
        self._random = RandomState.of(p) if rule.kind == "custom" and back else None
        self._before_start: RandomState | None = None

    def start(self, theta: Named) -> State:
        """As `UpdateRule.init`, of all tasks."""
        self._before_start = None if self._random is None else self._random.anew()
        return start_of_all(self.rule, theta)

    def forward(self, theta: Named, g: Named, state: State, k: int) -> tuple[Named, State, _Kept]:
        """The step is kept as what it was made from."""
        random = None if self._random is None else self._random.anew()
        rates = {name: rate_at(self.p, name, k) for name in self.names}
        with torch.no_grad():
            moved, after = step_of_all(self.p, self.rule, theta, g, state, rates, self.p.hyper, k)
        return moved, after, _Kept(theta, g, state, random)

    def direction(
        self, kept: _Kept, lam: Mapping[str, Tensor], sbar: list[Tensor] | None, k: int
    ) -> tuple[Named, tuple[Named, list[Tensor]]]:
        """By a backward pass over the step alone."""
        leaf = {name: own(value, True) for name, value in kept.theta.items()}
        g = {name: own(value, True) for name, value in kept.g.items()}
        state = mapped(lambda value: own(value, True), kept.state)
        rates = {name: own(rate_at(self.p, name, k), self.total_rates is not None) for name in self.names}
        hyper = {name: own(value, self.total_rule is not None) for name, value in self.p.hyper.items()}
        with torch.enable_grad(), nullcontext() if kept.random is None else replayed(kept.random):
            moved, after = step_of_all(self.p, self.rule, leaf, g, state, rates, hyper, k)
        outputs, directions = [moved[name] for name in self.names], [lam[name] for name in self.names]
        if sbar is not None:
            outputs += _floating(after)
            directions += sbar
        groups = [[*leaf.values()], [*g.values()], _floating(state), [*rates.values()], [*hyper.values()]]
        found = iter(_inputs.gradients(outputs, [x for group in groups for x in group], directions))
        by_theta, by_g = ({name: next(found) for name in self.names} for _ in range(2))
        by_state = [next(found) for _ in groups[2]]
        for name in rates:
            by_rate = next(found)
            if self.total_rates is not None:
                total = self.total_rates[name]
                total[k if total.shape[0] > 1 else 0] += by_rate
        for name in hyper:
            by_number = next(found)
            if self.total_rule is not None:
                self.total_rule[name] += by_number
        return by_g, (by_theta, by_state)

    def before(
        self,
        pending: tuple[Named, list[Tensor]],
        lam: Mapping[str, Tensor],
        hv: Mapping[str, Tensor],
        v: Named,
    ) -> tuple[Named, list[Tensor]]:
        """What passes by theta and by the state directly, and H v."""
        by_theta, by_state = pending
        return {n: by_theta[n] + hv[n] if n in hv else by_theta[n] for n in self.names}, by_state

    def through_start(self, theta: Named, lam: Named, sbar: list[Tensor]) -> Named:
        """`init` may make the state of theta."""
        with nullcontext() if self._before_start is None else replayed(self._before_start):
            found = _rule_tasks.through_start(self.rule, theta, sbar)
        return {name: value + found[name] if name in found else value for name, value in lam.items()}


def steps_of(
    p: Problem,
    names: Sequence[str],
    total_rates: dict[str, Tensor] | None,
    total_rule: dict[str, Tensor] | None,
    back: bool,
) -> RuleSteps:
    """The inner steps of a problem; arguments as of `DerivedSteps`."""
    rule = p.rule
    if rule is None or (isinstance(rule, SGD) and rule.written):
        return WrittenSteps(p, names, rule or SGD(), total_rates)
    return DerivedSteps(p, names, rule, total_rates, total_rule, back)


def rate_at(p: Problem, name: str, k: int) -> Tensor:
    """alpha_k: [T or 1, *(S or 1s)]."""
    rates = p.rates[name]
    return rates[k if rates.shape[0] > 1 else 0]


def _floating(state: State) -> list[Tensor]:
    return [leaf for leaf in leaves_of(state) if leaf.is_floating_point()]
