"""From a problem to a machine: what is traced is kept as long as the network stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastmeta.backends import _inputs, reference
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._random_state import RandomState, preserved_for
from fastmeta.backends._rates import rate_form
from fastmeta.backends.machine.cost import in_lanes
from fastmeta.backends.machine.encode import Encoder
from fastmeta.backends.torch.chunks import cut
from fastmeta.bounded import Bounded
from fastmeta.capture.capture import guard_of
from fastmeta.capture.guards import HOOKS, Guard
from fastmeta.inputs import leaves_of, mapped, signature
from fastmeta.network.functional import isolated
from fastmeta.problem import STORE_AT_MOST, Batch, Problem, Result
from fastmeta.trace.ir import Space
from fastmeta.trace.program import StepProgram
from fastmeta.trace.record import UntraceableError
from fastmeta.trace.step import Output, Slot, Sources, Traced, Tracer, Wanted, not_traced
from fastmeta.undisturbed import asynchronous

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

#: Programs of one network that are kept.
_MOST_PROGRAMS = 64
#: Largest relative difference from the module itself that rounding explains.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
#: Gradients that have to be followed back through the inner steps.
_THROUGH_STEPS = frozenset({"params", "lr", "support_x", "support_y", "support_weights"})


@dataclass(frozen=True, slots=True)
class Programs:
    """What was traced for one sort of problem."""

    adapted: tuple[str, ...]
    others: tuple[str, ...]  # parameters that do not adapt
    sources: Sources
    support: Traced | None
    query: Traced | None
    lowered: dict[tuple[str, bool], StepProgram]

    def program(self, role: str, dtype: torch.dtype, rows: bool) -> StepProgram | None:
        """The step program of a set, lowered once."""
        traced = self.support if role == "support" else self.query
        if traced is None:
            return None
        if (role, rows) not in self.lowered:
            self.lowered[role, rows] = traced.lowered(dtype, rows)
        return self.lowered[role, rows]


class _Known:
    """Programs of one network, and the guard that they depend on."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.programs: Bounded[object, Programs | str] = Bounded(_MOST_PROGRAMS)
        self.losses: dict[int, tuple[nn.Module, Guard]] = {}


class _Holder(nn.Module):
    """Holds a loss, so that what it reads is guarded as a network's attributes are."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def programs(problem: Problem, wrt: frozenset[str]) -> Programs | str:
    """What was traced for this problem, or why nothing can be; traced once."""
    guard = guard_of(problem.net)
    if guard is None:
        return "it is a TorchScript module"
    known = _known.get(problem.net)
    if known is None or known.guard is not guard:
        known = _known[problem.net] = _Known(guard)
    reason = _unwatched(problem, known)
    if reason:
        return reason
    key = _key(problem, wrt)
    found = known.programs.get(key)
    if found is None:
        found = known.programs.put(key, _traced(problem, wrt))
    return found


def remember_refusal(problem: Problem, wrt: frozenset[str], reason: str) -> None:
    """Refuse problems like this one from now on."""
    known = _known.get(problem.net)
    if known is not None:
        known.programs.put(_key(problem, wrt), reason)


def _unwatched(problem: Problem, known: _Known) -> str:
    """Why changes of the network or of a loss would go unnoticed, "" if they would not."""
    guard = known.guard
    if guard.hooked or any(getattr(m, hooks) for m in problem.net.modules() for hooks in HOOKS):
        return "it has hooks"
    if guard.entropy:
        return f"its forward reads the clock or entropy ({guard.entropy[0]})"
    if guard.unwatched:
        return f"{guard.unwatched[0]} cannot be watched for changes"
    for loss in (problem.loss, problem.query_loss):
        if loss is None or loss.function is None:
            continue
        entry = known.losses.get(id(loss.function))
        if entry is None or getattr(entry[0], "function", None) is not loss.function:
            holder = _Holder(loss.function)
            entry = known.losses[id(loss.function)] = (holder, Guard(holder))
        elif not entry[1].holds(entry[0]):
            known.programs.clear()
            entry = known.losses[id(loss.function)] = (entry[0], Guard(entry[0]))
        if entry[1].hooked or entry[1].entropy or entry[1].unwatched:
            what = [*entry[1].entropy, *entry[1].unwatched, "hooks"][0]
            return f"the loss cannot be watched for changes ({what})"
    return ""


def _key(problem: Problem, wrt: frozenset[str]) -> object:
    sets = [
        None if t is None else signature(t, 2 if b.per_step else 1)
        for b in (problem.support, problem.query)
        if b is not None
        for t in (b.x, b.y, b.weights)
    ]
    return (
        tuple(
            (name, v.shape[1:] if name in problem.per_task else v.shape, v.dtype)
            for name, v in problem.params.items()
        ),
        tuple(sets),
        problem.support is None,
        problem.query is None,
        tuple(problem.rates) if problem.steps else (),
        problem.steps > 0,
        frozenset(wrt),
        problem.frozen,
        problem.order,
        problem.batch_stats,
        problem.output_grad is None,
        None if problem.loss is None else problem.loss.key,
        None if problem.query_loss is None else problem.query_loss.key,
    )


def _traced(problem: Problem, wrt: frozenset[str]) -> Programs | str:
    with isolated(torch.device("cpu")), preserved_for(problem) as before:
        try:
            p = _inputs.detached(problem)
            if p.steps and _inputs.runs(p) and (state := carries_state(p)):
                return f"the network carries `{state}` over from pass to pass"
            found = _recorded(p, wrt)
            if not RandomState.same_as(before, before.anew()):
                return "its forward draws random numbers"
            return found
        except UntraceableError as error:
            return str(error)
        except Exception as error:
            if asynchronous(error):
                raise
            return not_traced(error)


def _recorded(problem: Problem, wrt: frozenset[str]) -> Programs:
    adapted = tuple(problem.rates) if problem.steps else ()
    others = tuple(name for name in problem.params if name not in adapted)
    wanted_fixed = frozenset(others) - problem.frozen if "params" in wrt else frozenset()
    tracer = Tracer(problem, wanted_fixed)
    gradient = bool(wrt)
    through = bool(wrt & _THROUGH_STEPS)

    def wanted(role: str) -> Wanted:
        data = frozenset(name for name in wrt if name.startswith(role))
        second = gradient and through and problem.order == "second" and role == "support"
        return Wanted(adapted=adapted, fixed=wanted_fixed, data=data, second=second, gradient=gradient)

    support = tracer.support(wanted("support")) if problem.steps else None
    query = None
    if problem.query is not None:
        query = tracer.query(wanted("query"), problem.output_grad is not None)
    return Programs(adapted, others, tracer.sources, support, query, {})


@dataclass(frozen=True, slots=True)
class Plan:
    """A machine, and how the tensors of a call are handed to it."""

    machine: Any
    programs: Programs
    lanes: bool
    memory: str
    output: Output | None
    support: tuple[Slot, ...]
    query: tuple[Slot, ...]
    fixed: tuple[Slot, ...]  # of the whole machine


def make_plan(problem: Problem, wrt: frozenset[str], found: Programs) -> Plan:
    """The machine for a problem whose programs are known."""
    dtype = next(iter(problem.params.values())).dtype
    lanes = problem.scratch.get("lanes")
    if lanes is None:
        lanes = in_lanes(problem, found, dtype)
    for memory in ("store", "recompute"):
        if problem.memory not in ("auto", memory):
            continue
        plan = _plan(problem, wrt, found, dtype, lanes, memory)
        if problem.memory != "auto" or plan.machine.workspace_bytes <= STORE_AT_MOST:
            break
    return plan


def _plan(
    problem: Problem, wrt: frozenset[str], found: Programs, dtype: torch.dtype, lanes: bool, memory: str
) -> Plan:
    support = found.program("support", dtype, not lanes)
    query = found.program("query", dtype, not lanes)
    sets = {"support": (support, found.support), "query": (query, found.query)}
    slots = {role: () if t is None else tuple(t.layout.slots) for role, (_, t) in sets.items()}
    fixed = _fixed(slots)
    at_query = {slot.name: slot for slot in slots["query"]}
    at_support = {slot.name: slot for slot in slots["support"]}
    theta = [at_support.get(f"theta.{n}") or at_query[f"theta.{n}"] for n in found.adapted]
    adapted = []
    for name, slot in zip(found.adapted, theta, strict=True):
        form = rate_form(problem, name, slot.shape)
        if form is None:
            raise ValueError(f"{name!r} has no learning rate")
        adapted.append(
            (slot.offset, slot.size, name in problem.per_task, form.element, form.per_task, form.per_step)
        )
    others = []
    for slot in fixed:
        name = slot.name.removeprefix("fixed.")
        gradients = [s[slot.name].gradient if slot.name in s else -1 for s in (at_support, at_query)]
        others.append(
            (slot.offset, slot.size, slot.name.startswith("fixed.") and name in problem.per_task, *gradients)
        )
    output = 0 if found.query is None else found.query.output.size
    rule = problem.rule
    entries = {role: tuple(s for s in slots[role] if s.space in (Space.BATCH, Space.INTS)) for role in slots}
    theta_size = max((slot.offset + -(-slot.size // 16) * 16 for slot in theta), default=0)
    fixed_size = max((slot.offset + -(-slot.size // 16) * 16 for slot in fixed), default=0)
    described = {
        role: None
        if program is None
        else {
            **Encoder(program).described(),
            "entries": [(s.offset, s.size, s.space == Space.INTS, s.gradient) for s in entries[role]],
        }
        for role, (program, _) in sets.items()
    }
    second = bool(wrt & _THROUGH_STEPS) and problem.order == "second" and problem.steps > 0
    machine = _C.Machine(
        {
            "is_double": dtype == torch.float64,
            "lanes": lanes,
            "steps": problem.steps,
            "second_order": second,
            "store": memory == "store",
            "gradient": bool(wrt),
            "wants_rates": "lr" in wrt and problem.steps > 0,
            "per_step": problem.support is not None and problem.support.per_step and problem.steps > 0,
            "momentum": 0.0 if rule is None else rule.momentum,
            "weight_decay": 0.0 if rule is None else rule.weight_decay,
            "query_loss": problem.query_loss is not None,
            "output_grad": problem.output_grad is not None,
            "theta": theta_size,
            "fixed": fixed_size,
            "output": output,
            "adapted": adapted,
            "others": others,
            **described,
        }
    )
    returned = None if found.query is None else found.query.output
    return Plan(machine, found, lanes, memory, returned, entries["support"], entries["query"], fixed)


def _fixed(slots: dict[str, tuple[Slot, ...]]) -> tuple[Slot, ...]:
    """What does not adapt, of both programs: the common part lies alike in both."""
    found: dict[str, Slot] = {}
    for role in ("support", "query"):
        for slot in slots[role]:
            if slot.space == Space.FIXED:
                known = found.setdefault(slot.name, slot)
                if known.offset != slot.offset:
                    raise UntraceableError("two losses with weights of their own")
    return tuple(found.values())


def check_first(problem: Problem, wrt: frozenset[str], solve: Any) -> str:
    """Compare a machine with the module itself, on one task and other numbers than it was traced
    with; why it cannot be used, "" if it agrees.

    Args:
        problem: any; its first task is taken.
        wrt: the gradients wanted.
        solve: (problem, wrt, adapted) -> Result, by the machine.
    """
    worst = ""
    found = programs(problem, wrt)
    if isinstance(found, str):
        return found
    lanes = in_lanes(problem, found, next(iter(problem.params.values())).dtype)
    for seed in (0, 1):
        one = _varied(cut(problem, 0, 1), seed)
        one.scratch["lanes"] = lanes
        with preserved_for(one):
            expected = reference.solve(one, wrt, True)
            answer = solve(one, wrt, True)
        worst = _difference(answer, expected, next(iter(one.params.values())).dtype)
        if not worst:
            return ""
    return f"its step program differs from the module: {worst}"


def _varied(problem: Problem, seed: int) -> Problem:
    generator = torch.Generator("cpu").manual_seed(seed)

    def noisy(tensor: Tensor | None, share: float) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor)
        return tensor.detach() + share * noise * tensor.detach().abs().mean()

    def batch(b: Batch | None) -> Batch | None:
        if b is None:
            return None
        return replace(b, x=mapped(lambda x: noisy(x, 0.3), b.x))

    return replace(
        problem,
        params={name: noisy(value, 0.05) for name, value in problem.params.items()},  # type: ignore[misc]
        support=batch(problem.support),
        query=batch(problem.query),
        scratch=type(problem.scratch)(),
        captures=None,
    )


def _difference(found: Result, expected: Result, dtype: torch.dtype) -> str:
    """What differs most, "" if nothing does by more than rounding."""
    pairs = list(_pairs(found, expected))
    sizes = [float(e.norm()) for what, _, e in pairs if what.startswith("the gradient")]
    floor = 1e-3 * max(sizes, default=0.0)
    for what, f, e in pairs:
        if f is None or f.shape != e.shape:
            return f"{what} is missing"
        size, off = float(e.norm()), float((f.to(e.dtype) - e).norm())
        if isfinite(size) and not off <= _TOLERANCE[dtype] * (size + floor) + 1e-12:
            return f"{what} by {off / size if size else off:.1e}"
    return ""


def _pairs(found: Result, expected: Result) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(what, that of the machine, that of the module), floating-point."""
    groups = {
        "the losses": (found.task_losses, expected.task_losses),
        "the output": (found.output, expected.output),
    }
    groups["what was adapted"] = (
        list((found.adapted or {}).values()),
        list((expected.adapted or {}).values()),
    )
    mine, theirs = found.grads, expected.grads
    for field in ("params", "lr"):
        of: dict[str, Tensor] = getattr(theirs, field) or {}
        own = getattr(mine, field) or {}
        groups[f"the gradient by {field}"] = ([own.get(name) for name in of], list(of.values()))
    for field in ("support_x", "support_y", "support_weights", "query_x", "query_y", "query_weights"):
        groups[f"the gradient by {field}"] = (getattr(mine, field), getattr(theirs, field))
    for what, (f, e) in groups.items():
        leaves = leaves_of(e)
        own_leaves = leaves_of(f) if f is not None else [None] * len(leaves)
        for left, right in zip_longest(own_leaves, leaves):
            if right is not None:
                yield what, left, right.to(left.dtype) if left is not None else right
