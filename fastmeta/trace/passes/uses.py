"""Who reads and who writes each buffer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fastmeta.trace.ir import RESULTS, Buffer, Instruction, Space, written


class Uses:
    """Readers and writers of every buffer, by their places in the order."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.readers: dict[Buffer, list[int]] = defaultdict(list)
        self.writers: dict[Buffer, list[int]] = defaultdict(list)
        for at, instruction in enumerate(instructions):
            own = {view.buffer for view in written(instruction)}
            for buffer in own:
                self.writers[buffer].append(at)
            for buffer in {view.buffer for view in instruction.reads()} - own:
                self.readers[buffer].append(at)


def moved(instructions: Sequence[Instruction], moves: Mapping[int, Sequence[int]]) -> list[Instruction]:
    """The same instructions, but that at each place of `moves` those of the places under it stand,
    in the place of what stood there."""
    gone = {at for places in moves.values() for at in places}
    order: list[Instruction] = []
    for at, instruction in enumerate(instructions):
        if at in moves:
            order += [instructions[place] for place in moves[at]]
        elif at not in gone:
            order.append(instruction)
    return order


def alive(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Those that some result depends on."""
    needed: set[Buffer] = set()
    kept = []
    for instruction in reversed(instructions):
        out = instruction.out.buffer
        if out.space in RESULTS or out in needed:
            kept.append(instruction)
            needed.update(view.buffer for view in instruction.reads() if view.buffer.space == Space.WORK)
    return kept[::-1]
