"""Sums of products and of sums: each adds to what is there, instead of a buffer and an addition."""

from __future__ import annotations

from collections.abc import Sequence

from fastmeta.trace.ir import Instruction, Map, Product, Reduce, Space, View
from fastmeta.trace.passes.copies import _retargeted
from fastmeta.trace.passes.uses import Uses


def with_accumulation(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program, in which products and sums that are added up share one buffer."""
    found = list(instructions)
    while True:
        uses = Uses(found)
        moves: dict[int, list[int]] = {}
        taken: set[int] = set()
        for at, add in enumerate(found):
            if not isinstance(add, Map) or add.function != "add":
                continue
            a, b = add.args
            if not (isinstance(a, View) and isinstance(b, View)) or a.buffer is b.buffer:
                continue
            if any(view.buffer.space != Space.WORK or len(uses.readers[view.buffer]) != 1 for view in (a, b)):
                continue
            first, second = uses.writers[a.buffer], uses.writers[b.buffer]
            if taken & {*first, *second, at} or not all(_adds(found[w]) for w in (*first, *second)):
                continue
            new = [_retargeted(found[w], a, add.out) for w in first]
            new += [_retargeted(found[w], b, add.out) for w in second]
            if any(n is None for n in new):
                continue
            joined = [*first, *second]
            for w, n in zip(joined, new, strict=True):
                if n is not None:
                    found[w] = n
            head = found[second[0]]
            if isinstance(head, (Product, Reduce)):
                head.accumulate = True
            moves[at] = joined
            taken |= {*joined, at}
        if not moves:
            return found
        moved = {w for writers in moves.values() for w in writers}
        order: list[Instruction] = []
        for at, instruction in enumerate(found):
            if at in moves:
                order += [found[w] for w in moves[at]]
            elif at not in moved:
                order.append(instruction)
        found = order


def _adds(instruction: Instruction) -> bool:
    return isinstance(instruction, Product) or (
        isinstance(instruction, Reduce) and instruction.function == "sum"
    )
