"""One task's step by an update rule of the user's own, recorded, and the way back over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta.inputs import Form, flatten
from fastmeta.network.functional import Conventions, own
from fastmeta.problem import Problem
from fastmeta.trace import operators  # noqa: F401
from fastmeta.trace.ir import Space
from fastmeta.trace.lower import OPERATORS
from fastmeta.trace.program import StepProgram
from fastmeta.trace.record import NoReads, Recorder, Ref, UntraceableError, Value, name_of
from fastmeta.trace.step import Layout, Output, Placed, Slot, Traced, gradients, one_task
from fastmeta.update_rules import CustomRule


@dataclass(frozen=True, slots=True)
class TracedRule:
    """A rule's step as a program. It has spaces of its own, with the adapted parameters in the
    order of theta wherever there is something for each of them:

    THETA goes in: theta, the gradient, the rates of all elements, the state
    OUTPUT comes out: theta', the state
    DIRECTION: dJ/d OUTPUT
    CURVATURE: dJ/d THETA
    FIXED, OTHER: the parameters of the rule, and dJ by them
    """

    traced: Traced
    state: tuple[Slot, ...]  # leaves of the state; offsets count from its beginning
    form: Form  # of the state
    floating: tuple[bool, ...]  # whether each leaf is; the others are kept as floating-point numbers too
    state_size: int  # elements
    reaches: bool  # the state before the first step depends on theta
    lowered: dict[tuple[torch.dtype, bool], StepProgram] = field(default_factory=dict)

    def program(self, dtype: torch.dtype, rows: bool) -> StepProgram:
        """The program, lowered once; arguments as of `Traced.lowered`."""
        if (dtype, rows) not in self.lowered:
            self.lowered[dtype, rows] = self.traced.lowered(dtype, rows)
        return self.lowered[dtype, rows]

    @property
    def numbers(self) -> tuple[Slot, ...]:
        """The parameters of the rule."""
        return tuple(slot for slot in self.traced.layout.slots if slot.space == Space.FIXED)


def traced_rule(problem: Problem, back: bool, learned: bool) -> TracedRule:
    """Record the rule of a problem.

    Args:
        problem: its rule is a `CustomRule`; its tensors are detached, on the CPU.
        back: with the way back.
        learned: gradients by the parameters of the rule are wanted.

    Raises:
        UntraceableError: it cannot be recorded.
    """
    rule = problem.rule
    if not isinstance(rule, CustomRule):
        raise TypeError("the rule is none of the user's own")
    recorder, layout = Recorder(OPERATORS), Layout()

    def leaf(name: str, value: Tensor, space: Space, grad: bool, wanted: bool = False) -> Tensor:
        copied = value.detach().clone(memory_format=torch.contiguous_format)
        slot = layout.add(name, tuple(value.shape), space, wanted)
        recorder.register(copied, slot.name)
        return copied.requires_grad_(grad)

    first = {name: own(one_task(problem, name).detach().clone(), True) for name in problem.rates}
    start, form = flatten(rule.init(first))
    for what, value in (*(("the state", value) for value in start), *problem.hyper.items()):
        if not value.numel():
            raise UntraceableError(f"{what} of the update rule holds a tensor without elements")
    reaches = any(value.requires_grad for value in start)
    dtype = next(iter(first.values())).dtype
    for value in start:
        if value.is_complex() or (value.is_floating_point() and value.dtype != dtype):
            raise UntraceableError(f"the state of the update rule holds a tensor of {value.dtype}")
    inputs: dict[str, dict[str, Tensor]] = {part: {} for part in ("theta", "gradient", "rate")}
    for part, leaves in inputs.items():
        for name, value in first.items():
            leaves[name] = leaf(f"{part}.{name}", value, Space.THETA, back)
    theta_size = layout.sizes.get(Space.THETA, 0) // 3
    # counts are kept as floating-point numbers
    floats = [value.to(dtype) for value in start]
    state = [leaf(f"state.{i}", value, Space.THETA, back) for i, value in enumerate(floats)]
    numbers = {
        name: leaf(f"rule.{name}", value, Space.FIXED, learned, learned)
        for name, value in problem.hyper.items()
    }
    slots = tuple(
        Slot(s.name, s.shape, s.space, s.offset - 3 * theta_size)
        for s in layout.slots
        if s.name.startswith("state.")
    )
    cotangents = []
    if back:
        for name, value in first.items():
            cotangents.append(leaf(f"lambda.{name}", value, Space.DIRECTION, False))
        for i, value in enumerate(floats):
            cotangents.append(leaf(f"mbar.{i}", value, Space.DIRECTION, False))
    everything = [*(x for leaves in inputs.values() for x in leaves.values()), *state]
    with (
        torch.set_grad_enabled(True),
        Conventions("module", decompose=True),
        recorder,
        NoReads(recorder),
    ):
        given = form.build([one.to(value.dtype) for one, value in zip(state, start, strict=True)])
        moved, then = rule.step(inputs["theta"], inputs["gradient"], given, inputs["rate"], numbers, 0)
        after, form_after = flatten(then)
        if form_after != form:
            raise UntraceableError("the state of the update rule holds what is no tensor, and changes it")
        for one, other in zip(after, start, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise UntraceableError("the state of the update rule changes its shapes or dtypes")
        outputs = [*(moved[name] for name in first), *(value.to(dtype) for value in after)]
        found: list[Tensor | None] = []
        if back:
            by = [*everything, *(numbers.values() if learned else ())]
            found = gradients(list(zip(outputs, cotangents, strict=True)), by)
    at = [slot.offset for slot in layout.slots if slot.space == Space.THETA]
    places = [*at[: len(first)], *(theta_size + slot.offset for slot in slots)]
    results: list[Placed] = [
        (recorder.ref(value.detach()), tuple(value.shape), Space.OUTPUT, place)
        for value, place in zip(outputs, places, strict=True)
    ]
    if back:
        targets = [(Space.CURVATURE, place, x) for place, x in zip(at, everything, strict=True)]
        fixed = [slot for slot in layout.slots if slot.gradient >= 0]
        targets += [(Space.OTHER, slot.gradient, numbers[slot.name.removeprefix("rule.")]) for slot in fixed]
        results += [
            (0.0 if g is None else recorder.ref(g.detach()), tuple(x.shape), space, place)
            for g, (space, place, x) in zip(found, targets, strict=True)
        ]
    _check_counts(results, start)
    size = layout.sizes.get(Space.THETA, 0) - 3 * theta_size
    traced = Traced(layout, tuple(results), 2 if back else 1, Output.of(()))
    floating = tuple(value.is_floating_point() for value in start)
    return TracedRule(traced, slots, form, floating, size, reaches)


#: Integers of a state that are kept as floating-point numbers exactly, and stay so for long.
_LARGEST = 1 << 20
_COUNTS = frozenset({torch.bool, torch.int32, torch.int64})
#: Operators that make integers large, or wrap around.
_GROWS = ("mul", "pow", "prod", "cumprod", "bitwise_left_shift")


def _check_counts(results: Sequence[Placed], start: Sequence[Tensor]) -> None:
    """Check that floating-point numbers hold what integers of the state do.

    Raises:
        UntraceableError: they may not.
    """
    for first in start:
        whole = not first.is_floating_point()
        if whole and (
            first.dtype not in _COUNTS
            or int(first.abs().max() if first.dtype != torch.bool else 0) > _LARGEST
        ):
            raise UntraceableError("the state of the update rule holds integers that are no small counts")
    pending = [ref.value for ref, *_ in results if isinstance(ref, Ref)]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen or value.maker is None:
            continue
        seen.add(id(value))
        made = value.maker
        whole = not value.dtype.is_floating_point and value.dtype != torch.bool
        if whole and not isinstance(made.function, str) and name_of(made.function).split(".")[0] in _GROWS:
            raise UntraceableError("it multiplies integers of the state of the update rule")
        pending += [ref.value for ref in made.refs()]
        pending += [item for item in made.args if isinstance(item, Value)]
