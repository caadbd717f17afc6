"""From a problem to a machine: what is traced is kept as long as the network stays what it was."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmeta.backends import _checkpoints, _inputs, reference
from fastmeta.backends._compared import difference, finite, varied
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._native_rules import described_rule, states_of
from fastmeta.backends._random_state import RandomState, preserved_for
from fastmeta.backends._rates import RateForm, rate_form
from fastmeta.backends._sweep import THROUGH_STEPS
from fastmeta.backends._traced import Kept, of_the_rule
from fastmeta.backends.machine.choice import in_lanes
from fastmeta.backends.machine.encode import Encoder
from fastmeta.backends.machine.programs import Programs
from fastmeta.backends.torch.chunks import cut
from fastmeta.network.functional import isolated
from fastmeta.problem import STORE_AT_MOST, Problem, Result, Scratch
from fastmeta.trace.ir import Space
from fastmeta.trace.passes.place import rounded
from fastmeta.trace.passes.tables import Few
from fastmeta.trace.record import UntraceableError
from fastmeta.trace.rule import TracedRule, traced_rule
from fastmeta.trace.step import Output, Slot, Tracer, Wanted, not_traced
from fastmeta.undisturbed import asynchronous
from fastmeta.update_rules import SGD

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

#: How often the first comparison is made again with a tenth of the rates, where the steps diverge.
_SMALLER_RATES = 4
#: Programs of one network that are kept.
_MOST_PROGRAMS = 64


_kept: Kept[Programs] = Kept(_MOST_PROGRAMS)
_rules: Kept[TracedRule] = Kept(_MOST_PROGRAMS, of_the_rule)


def programs(problem: Problem, wrt: frozenset[str]) -> Programs | str:
    """What was traced for this problem, or why nothing can be; traced once, whatever the update
    rule: that is no part of a program."""
    wrt = _of_a_program(wrt)
    return _kept.find(problem, wrt, None, lambda: _traced(problem, wrt))


def own_rule(problem: Problem, wrt: frozenset[str]) -> TracedRule | str | None:
    """The program of a rule of the user's own, or why it has none; None where the rule has a
    name."""
    if not problem.steps or problem.rule is None or problem.rule.kind != "custom":
        return None
    return _rules.find(problem, wrt, problem.rule, lambda: _traced_rule(problem, wrt))


def _traced_rule(problem: Problem, wrt: frozenset[str]) -> TracedRule | str:
    with isolated(torch.device("cpu")), preserved_for(problem) as before:
        try:
            found = traced_rule(_inputs.detached(problem), bool(wrt), "rule" in wrt)
            if not RandomState.same_as(before, before.anew()):
                return "the update rule draws random numbers"
            # says here where an operator has no lowering
            found.program(next(iter(problem.params.values())).dtype, rows=False)
            return found
        except Exception as error:
            if asynchronous(error):
                raise
            return f"the update rule: {not_traced(error)}"


def remember_refusal(problem: Problem, wrt: frozenset[str], reason: str) -> None:
    """Refuse problems like this one from now on."""
    _kept.refuse(problem, _of_a_program(wrt), None, reason)


def _of_a_program(wrt: frozenset[str]) -> frozenset[str]:
    """The gradients wanted; by numbers of the rule as by rates, which no program has either."""
    return wrt - {"rule"} | {"lr"} if "rule" in wrt else wrt


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
        loss = problem.support_step_weights is not None and role == "support"
        return Wanted(
            adapted=adapted, fixed=wanted_fixed, data=data, second=second, gradient=gradient, loss=loss
        )

    support = tracer.support(wanted("support")) if problem.steps else None
    query = None
    if problem.query is not None:
        query = tracer.query(wanted("query"), problem.output_grad is not None)
    return Programs(adapted, others, tracer.sources, support, query, {}, [])


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
    few: Few | None  # tables of which some rows alone take part
    copy_bytes: int  # as of `checkpoint_bytes`
    rule: TracedRule | None  # of the user's own


def make_plan(problem: Problem, wrt: frozenset[str], found: Programs, adapted: bool) -> Plan:
    """The machine for a problem whose programs are known; `adapted`: for adapted parameters too."""
    dtype = next(iter(problem.params.values())).dtype
    few = None if adapted else _few(problem, found, dtype)
    lanes = problem.scratch.get("lanes")
    if lanes is None:
        lanes = in_lanes(problem, found, dtype, few)
    if problem.memory == "checkpoint":
        way = "checkpoint" if wrt and problem.steps else "recompute"
        return _plan(problem, wrt, found, lanes, way, few)
    for memory in ("store", "recompute"):
        if problem.memory not in ("auto", memory):
            continue
        plan = _plan(problem, wrt, found, lanes, memory, few)
        if problem.memory != "auto" or plan.machine.workspace_bytes <= STORE_AT_MOST:
            break
    return plan


def _few(problem: Problem, found: Programs, dtype: torch.dtype) -> Few | None:
    """Tables of which a task needs few rows, where only those matter: the others are what they
    were, and without a gradient."""
    support = problem.support
    if problem.adapted_grad is not None or support is None or support.per_step:
        return None
    if problem.rule is not None and not problem.rule.written:
        return None  # adjoints of rules with a root are NaN where there never was a gradient
    few = found.few(dtype, False)
    if few is None:
        return None
    kept = sum(table.most * table.width for table in few.tables.values()) * problem.tasks * dtype.itemsize
    slots = () if found.support is None else found.support.layout.slots
    by_element = {f"theta.{name}" for name in found.adapted if _form(problem, name).element}
    if kept > STORE_AT_MOST or any(s.name in by_element and s.offset in few.tables for s in slots):
        return None
    return few


def _form(problem: Problem, name: str) -> RateForm:
    shape = tuple(problem.params[name].shape)
    form = rate_form(problem, name, shape[1:] if name in problem.per_task else shape)
    if form is None:
        raise ValueError(f"{name!r} has no learning rate")
    return form


def _plan(
    problem: Problem, wrt: frozenset[str], found: Programs, lanes: bool, memory: str, few: Few | None
) -> Plan:
    dtype = next(iter(problem.params.values())).dtype
    support = found.program("support", dtype, not lanes, few)
    query = found.program("query", dtype, not lanes, few)
    sets = {"support": (support, found.support), "query": (query, found.query)}
    slots = {role: () if t is None else tuple(t.layout.slots) for role, (_, t) in sets.items()}
    fixed = _fixed(slots)
    at_query = {slot.name: slot for slot in slots["query"]}
    at_support = {slot.name: slot for slot in slots["support"]}
    theta = [at_support.get(f"theta.{n}") or at_query[f"theta.{n}"] for n in found.adapted]
    adapted = []
    tables: dict[int, tuple[int, ...]] = {}  # by their places
    for at, (name, slot) in enumerate(zip(found.adapted, theta, strict=True)):
        form = _form(problem, name)
        place, size = slot.offset, slot.size
        if few is not None:
            place = few.places[slot.offset]
        if few is not None and (table := few.tables.get(slot.offset)) is not None:
            size = table.most * table.width
            tables[slot.offset] = (at, table.rows, table.width, table.most)
        adapted.append((place, size, name in problem.per_task, form.element, form.per_task, form.per_step))
    # in the order of theta
    order = [] if few is None else list(few.tables)
    others = []
    for slot in fixed:
        name = slot.name.removeprefix("fixed.")
        gradients = [s[slot.name].gradient if slot.name in s else -1 for s in (at_support, at_query)]
        others.append(
            (
                slot.offset,
                slot.size,
                slot.name.startswith("fixed.") and name in problem.per_task,
                *gradients,
                -1,
            )
        )
    output = 0 if found.query is None else found.query.output.size
    entries = {role: tuple(s for s in slots[role] if s.space in (Space.BATCH, Space.INTS)) for role in slots}
    theta_size = (
        few.size if few is not None else max((slot.offset + rounded(slot.size) for slot in theta), default=0)
    )
    rule_fixed = fixed_size = max((slot.offset + rounded(slot.size) for slot in fixed), default=0)
    rule = own_rule(problem, wrt)
    if isinstance(rule, str):
        raise UntraceableError(rule)
    if rule is not None:
        for slot in rule.numbers:
            others.append((rule_fixed + slot.offset, slot.size, False, -1, -1, slot.gradient))
            fixed_size = rule_fixed + slot.offset + rounded(slot.size)
    described = {
        role: None
        if program is None
        else {
            **Encoder(program).described(),
            "entries": [(s.offset, s.size, s.space == Space.INTS, s.gradient) for s in entries[role]],
            "numbered": [
                (order.index(n.table), n.index.wraps, n.place, array("q", n.index.positions).tobytes())
                for n in program.numbered
            ],
        }
        for role, (program, _) in sets.items()
    }
    state_size = theta_size * states_of(problem) if rule is None else rule.state_size
    copy_bytes = checkpoint_bytes(problem, theta_size + state_size, lanes)
    second = bool(wrt & THROUGH_STEPS) and problem.order == "second" and problem.steps > 0
    machine = _C.Machine(
        {
            "is_double": dtype == torch.float64,
            "lanes": lanes,
            "steps": problem.steps,
            "second_order": second,
            "store": memory == "store",
            "schedule": _checkpoints.described(problem, copy_bytes) if memory == "checkpoint" else [],
            "support_step_weights": list(problem.support_step_weights or ()) if problem.steps else [],
            "gradient": bool(wrt),
            "wants_rates": "lr" in wrt and problem.steps > 0,
            "per_step": problem.support is not None and problem.support.per_step and problem.steps > 0,
            "rule": described_rule(problem.rule),
            "query_loss": problem.query_loss is not None,
            "output_grad": problem.output_grad is not None,
            "theta": theta_size,
            "fixed": fixed_size,
            "rule_fixed": rule_fixed,
            "state": 0 if rule is None else rule.state_size,
            "traced_rule": None if rule is None else _described_rule(rule, dtype, not lanes),
            "output": output,
            "adapted": adapted,
            "tables": [tables[place] for place in order],
            "others": others,
            **described,
        }
    )
    returned = None if found.query is None else found.query.output
    sets_of = entries["support"], entries["query"]
    return Plan(machine, found, lanes, memory, returned, *sets_of, fixed, few, copy_bytes, rule)


def _described_rule(rule: TracedRule, dtype: torch.dtype, rows: bool) -> dict[str, Any]:
    entries = [(slot.offset, slot.size, False, -1) for slot in rule.state]
    return {**Encoder(rule.program(dtype, rows)).described(), "entries": entries, "numbered": []}


def checkpoint_bytes(problem: Problem, size: int, lanes: bool) -> int:
    """What one copy of theta and the state of the rule takes, of all tasks that run at once.

    Args:
        problem: the problem.
        size: elements of both, of one task.
        lanes: whether a task is in every lane.
    """
    dtype = next(iter(problem.params.values())).dtype
    wide = int(_C.machine_lanes(dtype == torch.float64)) if lanes else 1
    groups = min(torch.get_num_threads(), -(-problem.tasks // wide))
    return groups * wide * size * dtype.itemsize


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

    The inner steps are those of SGD: other rules make much of little differences, as Adam does of
    the sign of a small gradient.

    Args:
        problem: any; its first task is taken.
        wrt: the gradients wanted.
        solve: (problem, wrt, adapted) -> Result, by the machine.
    """
    worst = ""
    found = programs(problem, wrt)
    if isinstance(found, str):
        return found
    dtype = next(iter(problem.params.values())).dtype
    few = _few(problem, found, dtype)
    lanes, few_in_lanes = in_lanes(problem, found, dtype), in_lanes(problem, found, dtype, few)
    if problem.rule is not None and not problem.rule.written:
        problem, wrt = replace(problem, rule=SGD(), hyper={}, scratch=Scratch()), _of_a_program(wrt)
    for seed in (0, 1):
        one = varied(cut(problem, 0, 1), seed)
        one.scratch["lanes"] = lanes
        with preserved_for(one):
            expected = _expected(one, wrt)
            worst = difference(solve(one, wrt, True), expected, dtype)
            if not worst and few is not None:  # the program that has small tables
                expected.adapted = None
                one.scratch["lanes"] = few_in_lanes
                worst = difference(solve(one, wrt, False), expected, dtype)
        if not worst:
            return ""
    return f"its step program differs from the module: {worst}"


def check_rule(problem: Problem, wrt: frozenset[str], solve: Any) -> str:
    """Compare two steps by a rule of the user's own with the rule itself, as `check_first`."""
    one = cut(problem, 0, 1)
    rates = {name: rate[:2] for name, rate in one.rates.items()}
    support, weights = one.support, one.support_step_weights
    if support is not None and support.per_step:
        support = _inputs.each(support, lambda tensor: tensor[:, :2])
    one = replace(
        one, steps=min(one.steps, 2), rates=rates, support=support, step_weights=None, memory_limit=None,
        support_step_weights=None if weights is None else weights[:2],
    )  # fmt: skip
    found, dtype = programs(problem, wrt), next(iter(problem.params.values())).dtype
    if isinstance(found, str):
        return found
    one = varied(one, 0)
    one.scratch["lanes"] = in_lanes(problem, found, dtype)
    with preserved_for(one):
        expected = _expected(one, wrt)
        worst = difference(solve(one, wrt, True), expected, dtype)
    return f"its program differs from the update rule: {worst}" if worst else ""


def _expected(one: Problem, wrt: frozenset[str]) -> Result:
    """The answer of the module itself, at smaller rates where it is not finite: that says
    nothing."""
    expected = reference.solve(one, wrt, True)
    for _ in range(_SMALLER_RATES):
        if finite(expected):
            break
        one.rates = {name: 0.1 * rate.detach() for name, rate in one.rates.items()}
        expected = reference.solve(one, wrt, True)
    return expected
