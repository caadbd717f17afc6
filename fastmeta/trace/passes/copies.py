"""Copies that go: whatever fills a buffer that is only copied writes where the copy would have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastmeta.trace.ir import Gather, Instruction, Map, Product, Reduce, Scatter, Space, View
from fastmeta.trace.passes.uses import Uses, moved


def without_copies(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program, results written where they are wanted."""
    found = list(instructions)
    while True:
        uses = Uses(found)
        moves: dict[int, list[int]] = {}
        taken: set[int] = set()
        for at, copy in enumerate(found):
            if not isinstance(copy, Map) or copy.function != "copy" or not isinstance(copy.args[0], View):
                continue
            source = copy.args[0]
            writers = uses.writers[source.buffer]
            if source.buffer.space != Space.WORK or len(uses.readers[source.buffer]) != 1:
                continue
            if taken & {*writers, at} or source.buffer is copy.out.buffer:
                continue
            outs = [retargeted(found[w], source, copy.out) for w in writers]
            if not outs or any(out is None for out in outs):
                continue
            for w, instruction in zip(writers, outs, strict=True):
                if instruction is not None:
                    instruction.part = copy.part and len(writers) == 1
                    found[w] = instruction
            moves[at] = writers
            taken |= {*writers, at}
        if not moves:
            return found
        found = moved(found, moves)


def retargeted(instruction: Instruction, source: View, target: View) -> Instruction | None:
    """The same that writes to `target` what is read as `source`; None where it cannot."""
    out = instruction.out
    if isinstance(instruction, Scatter) and source.whole and target.dense:
        return replace(
            instruction, out=View(target.buffer, target.offset + out.offset, out.shape, out.strides)
        )
    if not isinstance(instruction, (Map, Reduce, Product, Gather)) or not out.whole:
        return None
    if any(view.buffer is target.buffer for view in instruction.reads()):
        return None
    if source.whole:
        view = target if target.shape == out.shape else target.reshape(out.shape)
    else:
        view = _turned(out, source, target)
    if view is None:
        return None
    if isinstance(instruction, Product):
        return _product_into(instruction, view)
    if isinstance(instruction, Map):
        args = tuple(view if isinstance(a, View) and a.same_elements(out) else a for a in instruction.args)
        return Map(view, instruction.function, args)
    if isinstance(instruction, Reduce):
        return Reduce(
            view,
            instruction.function,
            instruction.x,
            instruction.accumulate,
            instruction.steps,
            instruction.start,
        )
    if isinstance(instruction, Gather):
        i = instruction
        return Gather(view, i.source, i.index, i.step, i.limit, i.wraps)
    return None


def _product_into(product: Product, out: View) -> Product | None:
    """Rows of what a product writes lie in one piece."""
    m, n = out.shape[-2:]
    if n == 1 or out.strides[-1] == 1:
        return Product(out, product.a, product.b, product.accumulate)
    if m == 1 or out.strides[-2] == 1:
        swap = [*range(len(out.shape) - 2), len(out.shape) - 1, len(out.shape) - 2]
        return Product(
            out.permute(swap), product.b.permute(swap), product.a.permute(swap), product.accumulate
        )
    return None


def _turned(out: View, source: View, target: View) -> View | None:
    """`target` in the order of `out`, where `source` reads all of `out` in another order of
    dimensions."""
    if source.offset != out.offset or source.numel != out.numel:
        return None
    places = {(s, n): d for d, (s, n) in enumerate(zip(source.strides, source.shape, strict=True)) if n != 1}
    strides = []
    for s, n in zip(out.strides, out.shape, strict=True):
        if n == 1:
            strides.append(0)
            continue
        at = places.pop((s, n), None)
        if at is None:
            return None
        strides.append(target.strides[at])
    if places:
        return None
    return View(target.buffer, target.offset, out.shape, tuple(strides))
