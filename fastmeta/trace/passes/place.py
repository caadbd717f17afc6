"""Memory of a program: buffers that are never needed at once share a place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fastmeta.trace.ir import Buffer, Fused, Instruction, Space, written

#: Buffers begin at whole vectors.
ALIGNMENT = 16


def rounded(size: int) -> int:
    """A size up to the next whole vector."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def placed(
    stages: Sequence[Sequence[Instruction]], constants: dict[Space, int]
) -> tuple[dict[Buffer, tuple[Space, int]], dict[Space, int]]:
    """Where each buffer lies, and how large each planned space is, in elements.

    Args:
        stages: the instructions of what runs at different times: once a task, with theta, with the
            direction. What one stage leaves to a later one is kept.
        constants: sizes of spaces that are planned already.
    """
    made: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for stage, instructions in enumerate(stages):
        for step in instructions:
            for view in written(step):
                made.setdefault(view.buffer, stage)
            for view in (*step.reads(), *written(step)):
                last[view.buffer] = stage
    places: dict[Buffer, tuple[Space, int]] = {}
    sizes: dict[Space, int] = defaultdict(int, constants)
    for buffer, stage in made.items():
        if buffer.space == Space.WORK and last[buffer] > stage:
            space = Space.ONCE if stage == 0 else Space.KEPT
            places[buffer] = (space, sizes[space])
            sizes[space] += rounded(buffer.size) + ALIGNMENT
    for instructions in stages:
        _work(instructions, places, sizes)
    return places, dict(sizes)


def _work(
    instructions: Sequence[Instruction],
    places: dict[Buffer, tuple[Space, int]],
    sizes: dict[Space, int],
) -> None:
    """Places of buffers that one stage alone needs."""
    ends: dict[Buffer, int] = {}
    for at, step in enumerate(instructions):
        inner = step.inner if isinstance(step, Fused) else frozenset()
        for view in (*step.reads(), *written(step)):
            if view.buffer.space == Space.WORK and view.buffer not in places and view.buffer not in inner:
                ends[view.buffer] = at
    dying: dict[int, list[Buffer]] = defaultdict(list)
    for buffer, at in ends.items():
        dying[at].append(buffer)
    free: list[tuple[int, int]] = []  # (offset, size), in order
    top = 0
    for at, step in enumerate(instructions):
        for view in written(step):
            buffer = view.buffer
            if buffer not in ends or buffer in places:
                continue
            need = rounded(buffer.size) + ALIGNMENT
            fits = [hole for hole in free if hole[1] >= need]
            if fits:
                hole = min(fits, key=lambda h: h[1])
                free.remove(hole)
                if hole[1] > need:
                    free.append((hole[0] + need, hole[1] - need))
                places[buffer] = (Space.WORK, hole[0])
            else:
                places[buffer] = (Space.WORK, top)
                top += need
        for buffer in dying[at]:
            if buffer in places and places[buffer][0] == Space.WORK:
                free = _joined([*free, (places[buffer][1], rounded(buffer.size) + ALIGNMENT)])
    sizes[Space.WORK] = max(sizes[Space.WORK], top)


def _joined(holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, size in sorted(holes):
        if merged and merged[-1][0] + merged[-1][1] == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((offset, size))
    return merged


def constants_of(instructions: Sequence[Instruction]) -> dict[Buffer, int]:
    """Places of all constants that are read."""
    found: dict[Buffer, int] = {}
    top = 0
    for step in instructions:
        for view in step.reads():
            if view.buffer.space == Space.CONST and view.buffer not in found:
                found[view.buffer] = top
                top += rounded(view.buffer.size) + ALIGNMENT
    return found


Places = Mapping[Buffer, tuple[Space, int]]
