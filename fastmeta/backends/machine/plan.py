"""From a problem to a machine: what is traced is kept as long as the network stays what it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastmeta.backends import _inputs, reference
from fastmeta.backends._compared import difference, varied
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._random_state import RandomState, preserved_for
from fastmeta.backends._rates import rate_form
from fastmeta.backends._sweep import THROUGH_STEPS
from fastmeta.backends._traced import Kept
from fastmeta.backends.machine.cost import in_lanes
from fastmeta.backends.machine.encode import Encoder
from fastmeta.backends.machine.programs import Programs
from fastmeta.backends.torch.chunks import cut
from fastmeta.network.functional import isolated
from fastmeta.problem import STORE_AT_MOST, Problem
from fastmeta.trace.ir import Space
from fastmeta.trace.passes.place import rounded
from fastmeta.trace.record import UntraceableError
from fastmeta.trace.step import Output, Slot, Tracer, Wanted, not_traced
from fastmeta.undisturbed import asynchronous

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

#: Programs of one network that are kept.
_MOST_PROGRAMS = 64


_kept: Kept[Programs] = Kept(_MOST_PROGRAMS)


def programs(problem: Problem, wrt: frozenset[str]) -> Programs | str:
    """What was traced for this problem, or why nothing can be; traced once."""
    return _kept.find(problem, wrt, None, lambda: _traced(problem, wrt))


def remember_refusal(problem: Problem, wrt: frozenset[str], reason: str) -> None:
    """Refuse problems like this one from now on."""
    _kept.refuse(problem, wrt, None, reason)


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
        except Exception as error:
            if asynchronous(error):
                raise
            return not_traced(error)


def _recorded(problem: Problem, wrt: frozenset[str]) -> Programs:
    adapted = tuple(problem.rates) if problem.steps else ()
    others = tuple(name for name in problem.params if name not in adapted)
    wanted_fixed = frozenset(others) - problem.frozen if "params" in wrt else frozenset()
    tracer = Tracer(problem)
    gradient = bool(wrt)
    through = bool(wrt & THROUGH_STEPS)

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
    theta_size = max((slot.offset + rounded(slot.size) for slot in theta), default=0)
    fixed_size = max((slot.offset + rounded(slot.size) for slot in fixed), default=0)
    described = {
        role: None
        if program is None
        else {
            **Encoder(program).described(),
            "entries": [(s.offset, s.size, s.space == Space.INTS, s.gradient) for s in entries[role]],
        }
        for role, (program, _) in sets.items()
    }
    second = bool(wrt & THROUGH_STEPS) and problem.order == "second" and problem.steps > 0
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
        one = varied(cut(problem, 0, 1), seed)
        one.scratch["lanes"] = lanes
        with preserved_for(one):
            expected = reference.solve(one, wrt, True)
            answer = solve(one, wrt, True)
        worst = difference(answer, expected, next(iter(one.params.values())).dtype)
        if not worst:
            return ""
    return f"its step program differs from the module: {worst}"
