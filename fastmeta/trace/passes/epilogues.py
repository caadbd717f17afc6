"""What follows a product at once, done while its result is in registers: a second product, a sum, a
relu or the gate of its derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastmeta.trace.ir import Buffer, Instruction, Map, Product, Space, View
from fastmeta.trace.passes.uses import Uses


def with_epilogues(
    instructions: Sequence[Instruction], rows: bool, stages: Mapping[Buffer, int]
) -> list[Instruction]:
    """The same program with products that do more.

    Args:
        instructions: in order; maps are single ones.
        rows: right factors lie in rows.
        stages: of each buffer that is written; a product does nothing of a later stage.
    """
    found: list[Instruction | None] = list(_pairs(instructions, rows))
    uses = Uses([step for step in found if step is not None])
    for at, step in enumerate(found):
        if not isinstance(step, Map):
            continue
        for i, argument in enumerate(step.args):
            if not isinstance(argument, View) or argument.buffer.space != Space.WORK:
                continue
            writers = uses.writers[argument.buffer]
            if len(writers) != 1 or uses.readers[argument.buffer] != [at]:
                continue
            product = found[writers[0]]
            if not isinstance(product, Product) or not argument.same_elements(_as(product.out, argument)):
                continue
            if stages[argument.buffer] != stages[step.out.buffer]:
                continue
            longer = _followed(product, step, i)
            if longer is not None:
                found[writers[0]], found[at] = None, longer
                break
    return [step for step in found if step is not None]


def _as(out: View, like: View) -> View:
    """`out` in the shape of another view, itself where it has no such shape."""
    return out if out.shape == like.shape else out.reshape(like.shape) or out


def _followed(product: Product, step: Map, i: int) -> Product | None:
    """A product that does what `step` does to its result, which is argument i; None if none can."""
    if product.relu or product.gate is not None or product.accumulate:
        return None
    out = _in_place_of(step.out, product)
    if out is None:
        return None
    if step.function == "relu":
        return replace(product, out=out, relu=True, part=step.part)
    if len(step.args) != 2:
        return None
    other = step.args[1 - i]
    if not isinstance(other, View) or other.buffer.space == Space.INTS:
        return None
    if other.buffer is step.out.buffer or other.buffer is product.out.buffer:
        return None
    other_there = _in_place_of(other, product)
    if other_there is None:
        return None
    if step.function == "add" and product.start is None:
        return replace(product, out=out, start=other_there, part=step.part)
    if step.function == "gate" and i == 1:
        return replace(product, out=out, gate=other_there, part=step.part)
    return None


def _in_place_of(view: View, product: Product) -> View | None:
    """`view` in the shape of what the product writes; None where that is not one view."""
    return view if view.shape == product.out.shape else view.reshape(product.out.shape)


def _pairs(instructions: Sequence[Instruction], rows: bool) -> list[Instruction]:
    """Two products that follow each other in one buffer are one."""
    uses = Uses(instructions)
    found: list[Instruction | None] = list(instructions)
    for writers in uses.writers.values():
        at = 0
        while at + 1 < len(writers):
            one, two = found[writers[at]], found[writers[at + 1]]
            if _a_pair(one, two, rows) and isinstance(one, Product) and isinstance(two, Product):
                found[writers[at]] = None
                found[writers[at + 1]] = replace(one, more=(two.a, two.b), part=one.part and two.part)
                at += 2
            else:
                at += 1
    return [step for step in found if step is not None]


def _a_pair(one: Instruction | None, two: Instruction | None, rows: bool) -> bool:
    if not isinstance(one, Product) or not isinstance(two, Product) or not two.accumulate:
        return False
    if one.more is not None or two.more is not None or not one.out.same_elements(two.out):
        return False
    along = [rows and p.b.strides[-1] == 1 for p in (one, two)]
    return along[0] == along[1]
