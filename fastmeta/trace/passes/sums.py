"""Sums of products and of sums: each adds to what is there, instead of a buffer and an addition."""

from __future__ import annotations

from collections.abc import Sequence

from fastmeta.trace.ir import Instruction, Map, Product, Reduce, Space, View
from fastmeta.trace.passes.copies import retargeted
from fastmeta.trace.passes.uses import Uses, moved


def with_accumulation(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program, in which products and sums that are added up share one buffer."""
    found = _products_first(instructions)
    while True:
        uses = Uses(found)
        moves: dict[int, list[int]] = {}
        taken: set[int] = set()
        for at, add in enumerate(found):
            pair = _pair(add)
            if pair is None:
                continue
            a, b = pair
            if any(view.buffer.space != Space.WORK or len(uses.readers[view.buffer]) != 1 for view in (a, b)):
                continue
            first, second = uses.writers[a.buffer], uses.writers[b.buffer]
            if taken & {*first, *second, at} or not all(_adds(found[w]) for w in (*first, *second)):
                continue
            new = [retargeted(found[w], a, add.out) for w in first]
            new += [retargeted(found[w], b, add.out) for w in second]
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
        found = moved(found, moves)


def _products_first(instructions: Sequence[Instruction]) -> list[Instruction]:
    """(p + x) + q with products p and q and anything else x becomes (p + q) + x, where p + x is
    read once."""
    found = list(instructions)
    uses = Uses(found)

    def of_products(view: View) -> bool:
        writers = uses.writers[view.buffer]
        own = view.buffer.space == Space.WORK and len(uses.readers[view.buffer]) == 1
        return own and bool(writers) and view.whole and all(_adds(found[w]) for w in writers)

    for at, outer in enumerate(found):
        pair = _pair(outer)
        if pair is None or not isinstance(outer, Map):
            continue
        for view, other in (pair, pair[::-1]):
            writers = uses.writers[view.buffer]
            single = view.buffer.space == Space.WORK and len(uses.readers[view.buffer]) == 1 == len(writers)
            inner = found[writers[0]] if single else None
            inside = _pair(inner)
            if (
                not single
                or inside is None
                or not isinstance(inner, Map)
                or not inner.out.same_elements(view)
            ):
                continue
            if not of_products(other) or of_products(view):
                continue
            for p, x in (inside, inside[::-1]):
                if of_products(p) and not of_products(x) and p.shape == other.shape:
                    # p + other takes the place of p + x, behind all that it reads
                    inner.args, outer.args = (p, other), (view, x)
                    found[writers[0]], found[at] = inner, outer
                    moved = found.pop(writers[0])
                    found.insert(at - 1, moved)
                    uses = Uses(found)
                    break
            else:
                continue
            break
    return found


def _pair(step: Instruction | None) -> tuple[View, View] | None:
    """The two views that a map adds up."""
    if not isinstance(step, Map) or step.function != "add":
        return None
    a, b = step.args
    return (a, b) if isinstance(a, View) and isinstance(b, View) and a.buffer is not b.buffer else None


def _adds(instruction: Instruction) -> bool:
    return isinstance(instruction, Product) or (
        isinstance(instruction, Reduce) and instruction.function == "sum"
    )
