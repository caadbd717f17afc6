"""Products as the machine runs them: rows of the right factor and of the result in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastmeta.trace.ir import Buffer, Instruction, Map, Product, View
from fastmeta.trace.record import contiguous


def in_rows(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program; right factors that lie across are turned round, each of them once."""
    found: list[Instruction] = []
    turned: dict[tuple[Buffer, int, tuple[int, ...], tuple[int, ...]], View] = {}
    for step in instructions:
        if isinstance(step, Product):
            step = _narrow(step)
            b = step.b
            if b.strides[-1] != 1 and step.out.shape[-1] > 1 and not _by_elements(step):
                core = _without_broadcast(b)
                key = (core.buffer, core.offset, core.shape, core.strides)
                if key not in turned:
                    whole = View(Buffer(core.numel), 0, core.shape, contiguous(core.shape))
                    found.append(Map(whole, "copy", (core,)))
                    turned[key] = whole
                step = replace(step, b=turned[key].expand(b.shape))
        found.append(step)
    return found


def _without_broadcast(b: View) -> View:
    """Its batch dimensions, where all batches are the same, of one element."""
    shape = tuple(
        1 if s == 0 and d < len(b.shape) - 2 else n
        for d, (n, s) in enumerate(zip(b.shape, b.strides, strict=True))
    )
    return View(b.buffer, b.offset, shape, b.strides)


def _by_elements(step: Product) -> bool:
    """Few results, each a sum over what lies in one piece on both sides."""
    return step.a.strides[-1] == 1 and step.b.strides[-2] == 1 and step.out.shape[-1] <= 2


def _narrow(step: Product) -> Product:
    """A product of one column as one of one row, where that lies in one piece."""
    m, n = step.out.shape[-2:]
    if n != 1 or m == 1 or step.a.strides[-2] != 1 or step.out.strides[-2] != 1:
        return step
    swap = [*range(len(step.out.shape) - 2), len(step.out.shape) - 1, len(step.out.shape) - 2]
    return Product(step.out.permute(swap), step.b.permute(swap), step.a.permute(swap), step.accumulate)
