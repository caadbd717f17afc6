"""Who reads and who writes each buffer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
