"""Maps of one shape become one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastmeta.trace.ir import Buffer, Fused, Instruction, Map, Space, View, written
from fastmeta.trace.passes.uses import Uses

#: Of one pass.
MOST_INPUTS, MOST_OUTPUTS, MOST_MAPS = 24, 16, 48


class _Unit:
    """Instructions that run as one."""

    def __init__(self, at: int, step: Instruction, stage: int) -> None:
        self.steps = {at: step}
        self.stage = stage
        self.shape = _squeezed(step.out).shape if isinstance(step, Map) else None
        self.before: set[_Unit] = set()
        self.after: set[_Unit] = set()
        self.closed = not isinstance(step, Map)


def _squeezed(view: View) -> View:
    kept = [d for d, n in enumerate(view.shape) if n != 1]
    return View(
        view.buffer,
        view.offset,
        tuple(view.shape[d] for d in kept),
        tuple(view.strides[d] for d in kept),
    )


def squeezed(step: Map) -> Map:
    """The same map without dimensions of one element."""
    args = tuple(_squeezed(a) if isinstance(a, View) else a for a in step.args)
    return Map(_squeezed(step.out), step.function, args, part=step.part)


def fused(instructions: Sequence[Instruction], stages: Mapping[Buffer, int]) -> list[Instruction]:
    """The same program with neighbouring maps in one `Fused` each, in an order that works.

    Args:
        instructions: in order.
        stages: of each buffer that is written; maps of different stages stay apart.
    """
    steps = [squeezed(s) if isinstance(s, Map) else s for s in instructions]
    uses = Uses(steps)
    units = [_Unit(at, step, stages[step.out.buffer]) for at, step in enumerate(steps)]
    _connect(steps, units, uses)
    single = {b for b, writers in uses.writers.items() if len(writers) == 1}
    owner = dict(enumerate(units))
    for at, step in enumerate(steps):
        if not isinstance(step, Map):
            continue
        if any(isinstance(a, View) and a.buffer is step.out.buffer for a in step.args):
            owner[at].closed = True  # it adds to what is there
            continue
        for producer in _producers(step, uses, steps, single):
            _merge(owner, at, producer)
        for sibling in _siblings(step, at, uses, steps):
            _merge(owner, at, sibling)
    remaining = list(dict.fromkeys(owner[at] for at in range(len(steps))))
    return [_instruction(unit, uses) for unit in _sorted(remaining)]


def _connect(steps: Sequence[Instruction], units: Sequence[_Unit], uses: Uses) -> None:
    """Edges from writers to readers, and between writers of the same elements in their order."""

    def edge(a: int, b: int) -> None:
        units[a].after.add(units[b])
        units[b].before.add(units[a])

    for buffer, writers in uses.writers.items():
        for reader in uses.readers.get(buffer, ()):
            for writer in writers:
                edge(writer, reader)
        for i, later in enumerate(writers):
            for earlier in writers[:i]:
                if not (steps[later].part and steps[earlier].part):
                    edge(earlier, later)


def _producers(step: Map, uses: Uses, steps: Sequence[Instruction], single: set[Buffer]) -> list[int]:
    found = []
    for a in step.args:
        if isinstance(a, View) and a.buffer in single:
            at = uses.writers[a.buffer][0]
            made = steps[at]
            if isinstance(made, Map) and made.out.same_elements(a):
                found.append(at)
    return found


def _siblings(step: Map, at: int, uses: Uses, steps: Sequence[Instruction]) -> list[int]:
    """Maps before this one that read the same elements."""
    found: dict[int, None] = {}
    for a in step.args:
        if isinstance(a, View) and all(a.strides):
            for reader in uses.readers.get(a.buffer, ()):
                other = steps[reader]
                if (
                    reader < at
                    and isinstance(other, Map)
                    and any(isinstance(o, View) and o.same_elements(a) for o in other.args)
                ):
                    found[reader] = None
    return list(found)[-4:]


def _merge(owner: dict[int, _Unit], a: int, b: int) -> None:
    one, two = owner[a], owner[b]
    if one is two or one.closed or two.closed or one.shape != two.shape or one.stage != two.stage:
        return
    steps = {**one.steps, **two.steps}
    if len(steps) > MOST_MAPS or not _one_pass(steps.values()):
        return
    if _path(one, two) or _path(two, one):
        return
    if len(one.steps) < len(two.steps):
        one, two = two, one
    one.steps = steps
    one.before = (one.before | two.before) - {one, two}
    one.after = (one.after | two.after) - {one, two}
    for unit in two.before:
        unit.after.discard(two)
        if unit is not one:
            unit.after.add(one)
    for unit in two.after:
        unit.before.discard(two)
        if unit is not one:
            unit.before.add(one)
    for at in two.steps:
        owner[at] = one


def _one_pass(steps: Iterable[Instruction]) -> bool:
    """Whether all maps read what others of them write at the element at hand, and are not too
    many."""
    maps = [step for step in steps if isinstance(step, Map)]
    outs: dict[Buffer, list[View]] = {}
    for step in maps:
        outs.setdefault(step.out.buffer, []).append(step.out)
    inputs: set[tuple[object, ...]] = set()
    for step in maps:
        for a in step.args:
            if not isinstance(a, View):
                continue
            made = outs.get(a.buffer)
            if made is None:
                inputs.add((a.buffer, a.offset, a.strides))
            elif len(made) > 1 or not a.same_elements(made[0]):
                return False
    return len(inputs) <= MOST_INPUTS and len(outs) <= MOST_OUTPUTS + MOST_MAPS // 2


def _path(start: _Unit, end: _Unit) -> bool:
    """Whether `end` comes after `start` by way of a third unit."""
    seen: set[_Unit] = {start}
    stack = [unit for unit in start.after if unit is not end]
    while stack:
        unit = stack.pop()
        if unit is end:
            return True
        if unit not in seen:
            seen.add(unit)
            stack += unit.after
    return False


def _sorted(units: Sequence[_Unit]) -> list[_Unit]:
    """An order in which each comes after what it needs, as near to that of before as can be."""
    from heapq import heapify, heappop, heappush

    waiting = {unit: len(unit.before) for unit in units}
    key = {unit: max(unit.steps) for unit in units}
    ready = [(key[unit], id(unit), unit) for unit in units if not waiting[unit]]
    heapify(ready)
    order = []
    while ready:
        _, _, unit = heappop(ready)
        order.append(unit)
        for after in unit.after:
            waiting[after] -= 1
            if not waiting[after]:
                heappush(ready, (key[after], id(after), after))
    if len(order) != len(units):
        raise RuntimeError("instructions depend on one another in a circle")
    return order


def _instruction(unit: _Unit, uses: Uses) -> Instruction:
    steps = [unit.steps[at] for at in sorted(unit.steps)]
    maps = [step for step in steps if isinstance(step, Map)]
    if len(maps) != len(steps):
        return steps[0]
    inner: set[Buffer] = set()
    at_home = set(unit.steps)
    for m in maps:
        buffer = m.out.buffer
        aligned = all(
            a.same_elements(m.out) for o in maps for a in o.args if isinstance(a, View) and a.buffer is buffer
        )
        private = at_home.issuperset(uses.readers.get(buffer, ())) and len(uses.writers[buffer]) == 1
        if buffer.space == Space.WORK and private and aligned:
            inner.add(buffer)
    return Fused(maps[-1].out, maps, frozenset(inner))


def stages_of(instructions: Sequence[Instruction], last: int = 2) -> dict[Buffer, int]:
    """0 for what nothing of these reaches, 1 for what theta does, 2 for what the direction or the
    seed of a loss does; results are of the stage that is read for them. `last` at most."""
    start = {Space.THETA: 1, Space.DIRECTION: 2, Space.SEED: 2}
    least = {Space.GRAD: 1, Space.OUTPUT: 1, Space.OTHER: 2, Space.CURVATURE: 2}
    stages: dict[Buffer, int] = {}
    changed = True
    while changed:  # all writers of a buffer are of one stage
        changed = False
        for step in instructions:
            own = max((stages.get(v.buffer, start.get(v.buffer.space, 0)) for v in step.reads()), default=0)
            for view in written(step):
                stage = min(last, max(own, least.get(view.buffer.space, 0), stages.get(view.buffer, 0)))
                if stages.get(view.buffer) != stage:
                    stages[view.buffer] = stage
                    changed = True
    return stages
