"""What was traced of networks, kept as long as they and their losses stay what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastmeta.bounded import Bounded
from fastmeta.capture.capture import guard_of
from fastmeta.capture.guards import HOOKS, Guard
from fastmeta.inputs import signature
from fastmeta.problem import Problem
from fastmeta.update_rules import CustomRule

V = TypeVar("V")
#: States of one network that are known at once, such as training and evaluation; and losses.
_MOST_STATES, _MOST_LOSSES = 8, 16
#: States of one network, or functions as its losses, after which it is no longer traced: to trace
#: again and again costs more than it saves.
_TOO_MANY, _TOO_MANY_LOSSES = 32, 8


class _Known(Generic[V]):
    """What was traced of one network in one state, and the guards that it depends on."""

    def __init__(self, guard: Guard, entries: int) -> None:
        self.guard = guard
        self.found: Bounded[object, V | str] = Bounded(entries)
        self.losses: Bounded[int, tuple[nn.Module, Guard]] = Bounded(_MOST_LOSSES)
        self.new_losses = 0


class _States(Generic[V]):
    """What was traced of one network."""

    def __init__(self) -> None:
        self.known: list[_Known[V]] = []
        self.seen = 0

    def at(self, net: nn.Module, guard: Guard, entries: int) -> _Known[V]:
        """What is known of the state that `guard` is of."""
        for known in self.known:
            if known.guard is guard or known.guard.holds(net):
                return known
        self.seen += 1
        self.known = [*self.known[1 - _MOST_STATES :], _Known(guard, entries)]
        return self.known[-1]


class _Holder(nn.Module):
    """Holds a loss, so that what it reads is guarded as a network's attributes are."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


def guarded(function: Any) -> tuple[nn.Module, Guard]:
    """A guard of a loss of the user's own, and what it is of: `guard.holds(holder)` says whether
    the loss is still what it was."""
    holder = _Holder(function)
    return holder, Guard(holder)


#: What a function is, and the function.
Functions = Sequence[tuple[str, Any]]


def _losses_of(problem: Problem) -> Functions:
    losses = [loss for loss in (problem.loss, problem.query_loss) if loss is not None]
    return [("the loss", loss.function) for loss in losses if loss.function is not None]


def of_the_rule(problem: Problem) -> Functions:
    """Those of an update rule of the user's own."""
    rule = problem.rule
    if not problem.steps or not isinstance(rule, CustomRule):
        return []
    start = [] if rule.start is None else [("`init` of the update rule", rule.start)]
    return [("the update rule", rule.function), *start]


def functions_of(problem: Problem) -> list[Any]:
    """All functions of the user's own besides the network, each once."""
    return [*dict.fromkeys(f for _, f in (*_losses_of(problem), *of_the_rule(problem)))]


class Kept(Generic[V]):
    """What one backend has traced, by network and sort of problem.

    Args:
        entries: at most so many a network.
        functions: those of the user's own besides the network that a trace depends on, by what
            they are.
    """

    def __init__(self, entries: int, functions: Callable[[Problem], Functions] = _losses_of) -> None:
        self._entries, self._functions = entries, functions
        self._of: WeakKeyDictionary[nn.Module, _States[V]] = WeakKeyDictionary()

    def find(
        self, problem: Problem, wrt: frozenset[str], more: object, trace: Callable[[], V | str]
    ) -> V | str:
        """What was traced for problems like this one, or why nothing can be; traced once.

        Args:
            problem, wrt: as a backend has them.
            more: hashable, what else a trace depends on.
            trace: called where nothing is known.
        """
        guard = guard_of(problem.net)
        if guard is None:
            return "it is a TorchScript module"
        states = self._of.setdefault(problem.net, _States())
        known = states.at(problem.net, guard, self._entries)
        if states.seen > _TOO_MANY:
            return "the network has changed too often to be traced each time"
        reason = _unwatched(problem, known, self._functions(problem))
        if reason:
            return reason
        key = (_key(problem, wrt), more)
        found = known.found.get(key)
        return known.found.put(key, trace()) if found is None else found

    def refuse(self, problem: Problem, wrt: frozenset[str], more: object, reason: str) -> None:
        """Refuse problems like this one from now on, as long as nothing changes."""
        known = self._now(problem)
        if known is not None:
            known.found.put((_key(problem, wrt), more), reason)

    def forget(self, problem: Problem, wrt: frozenset[str], more: object) -> None:
        """Trace problems like this one anew."""
        known = self._now(problem)
        if known is not None:
            known.found.drop((_key(problem, wrt), more))

    def _now(self, problem: Problem) -> _Known[V] | None:
        states, guard = self._of.get(problem.net), guard_of(problem.net)
        return None if states is None or guard is None else states.at(problem.net, guard, self._entries)


def _unwatched(problem: Problem, known: _Known[Any], functions: Functions) -> str:
    """Why changes of the network or of these functions would go unnoticed, "" if they would not;
    forgets what was traced with one that has changed."""
    guard = known.guard
    if guard.hooked or any(getattr(m, hooks) for m in problem.net.modules() for hooks in HOOKS):
        return "it has hooks"
    if guard.entropy:
        return f"its forward reads the clock or entropy ({guard.entropy[0]})"
    if guard.unwatched:
        return f"{guard.unwatched[0]} cannot be watched for changes"
    for what, function in functions:
        modules = function.modules() if isinstance(function, nn.Module) else ()
        if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            return f"{what} is a TorchScript module"
        entry = known.losses.get(id(function))
        if entry is None or getattr(entry[0], "function", None) is not function:
            known.new_losses += 1
            if known.new_losses > _TOO_MANY_LOSSES:
                return f"{what} is another function at every call: define it once"
            entry = known.losses.put(id(function), guarded(function))
        elif not entry[1].holds(entry[0]):
            for key in [*known.found]:
                known.found.drop(key)
            known.new_losses += 1
            entry = known.losses.put(id(function), guarded(function))
        if entry[1].hooked or entry[1].entropy or entry[1].unwatched:
            why = [*entry[1].entropy, *entry[1].unwatched, "hooks"][0]
            return f"{what} cannot be watched for changes ({why})"
    return ""


def _key(problem: Problem, wrt: frozenset[str]) -> object:
    """What two problems of one network have in common that are traced alike for one task."""
    sets = [
        None if tree is None else signature(tree, 2 if batch.per_step else 1)
        for batch in (problem.support, problem.query)
        if batch is not None
        for tree in (batch.x, batch.y, batch.weights)
    ]
    shapes = [
        (name, value.shape[1:] if name in problem.per_task else value.shape, value.dtype)
        for name, value in problem.params.items()
    ]
    return (
        tuple(shapes),
        tuple(sets),
        problem.support is None,
        problem.query is None,
        tuple(problem.rates) if problem.steps else (),
        problem.steps > 0,
        frozenset(wrt),
        problem.frozen,
        problem.order,
        problem.support_step_weights is None,
        problem.batch_stats,
        problem.output_grad is None,
        None if problem.loss is None else problem.loss.key,
        None if problem.query_loss is None else problem.query_loss.key,
    )
