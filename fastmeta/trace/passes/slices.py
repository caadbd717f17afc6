"""What is only read in slices is computed in slices, so that each can join those that read it."""

from __future__ import annotations

from collections.abc import Sequence

from fastmeta.trace.ir import Buffer, Instruction, Map, Space, View
from fastmeta.trace.passes.uses import Uses
from fastmeta.trace.record import contiguous


def in_slices(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The same program, in which no map writes more than its readers need at once."""
    found = list(instructions)
    while True:
        uses = Uses(found)
        new: dict[int, list[Instruction]] = {}
        for at, step in enumerate(found):
            if not isinstance(step, Map) or not step.out.whole or step.out.buffer.space != Space.WORK:
                continue
            if len(uses.writers[step.out.buffer]) == 1:
                parts = _parts(step, [found[r] for r in uses.readers[step.out.buffer]])
                if parts:
                    new[at] = parts
        if not new:
            return found
        found = [s for at, step in enumerate(found) for s in new.get(at, [step])]


def _parts(step: Map, readers: Sequence[Instruction]) -> list[Instruction]:
    """`step` once for each slice that its readers, maps all of them, read; they are changed to read
    those. Empty where that cannot be or would be more work."""
    out = step.out
    if not readers or not all(isinstance(reader, Map) for reader in readers):
        return []
    views = [view for reader in readers for view in reader.reads() if view.buffer is out.buffer]
    slices: dict[tuple[object, ...], View] = {}
    for view in views:
        n = tuple(size for size in view.shape)
        slices.setdefault((view.offset, n, view.strides), view)
    if len(slices) == 1 and next(iter(slices.values())).numel == out.numel:
        only = next(iter(slices.values()))
        if only.same_elements(out) or only.dense:
            return []
    if sum(view.numel for view in slices.values()) > out.numel:
        return []
    made: dict[tuple[object, ...], View] = {}
    parts: list[Instruction] = []
    for key, view in slices.items():
        index = _index(view, out)
        if index is None:
            return []
        args = tuple(_through(a, view, index) if isinstance(a, View) else a for a in step.args)
        whole = View(Buffer(view.numel), 0, view.shape, contiguous(view.shape))
        parts.append(Map(whole, step.function, args))
        made[key] = whole
    for reader in readers:
        if isinstance(reader, Map):
            reader.args = tuple(
                made[(a.offset, a.shape, a.strides)] if isinstance(a, View) and a.buffer is out.buffer else a
                for a in reader.args
            )
    return parts


#: For each dimension of a slice (dimension of what it is of, step), and the first index in each.
_Index = tuple[list[tuple[int, int] | None], list[int]]


def _index(view: View, out: View) -> _Index | None:
    """Which indices of `out`, dense, a view of its buffer reads; None where it is no slice."""
    rest, first = view.offset, []
    for n, s in zip(out.shape, out.strides, strict=True):
        at = rest // s if n > 1 else 0
        first.append(at)
        rest -= at * s
    if rest or any(at < 0 or at >= max(n, 1) for at, n in zip(first, out.shape, strict=True)):
        return None
    dims: list[tuple[int, int] | None] = []
    used: set[int] = set()
    for n, s in zip(view.shape, view.strides, strict=True):
        if n == 1:
            dims.append(None)
            continue
        if s <= 0:
            return None
        fits = [
            d
            for d, (size, stride) in enumerate(zip(out.shape, out.strides, strict=True))
            if d not in used and size > 1 and s % stride == 0 and first[d] + (n - 1) * (s // stride) < size
        ]
        if not fits:
            return None
        used.add(fits[0])
        dims.append((fits[0], s // out.strides[fits[0]]))
    return dims, first


def _through(arg: View, view: View, index: _Index) -> View:
    """What of `arg` the slice `view` of a map's result depends on."""
    dims, first = index
    offset = arg.offset + sum(at * s for at, s in zip(first, arg.strides, strict=True))
    strides = tuple(0 if d is None else arg.strides[d[0]] * d[1] for d in dims)
    return View(arg.buffer, offset, view.shape, strides)
