"""Tables of which a task reads a few rows: only those rows take part in its steps.

What an embedding's other rows are, no step reads, and their gradient is zero. So the machine
gathers the rows that the indices of a task name into a small table, once a task, and the program
runs on that: indices are then those of the small table. At the end the gradient's rows are added
where they belong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from fastmeta.trace.ir import Buffer, Gather, Instruction, Map, Scatter, Space, View
from fastmeta.trace.passes.place import rounded
from fastmeta.trace.passes.uses import Uses
from fastmeta.trace.record import contiguous

#: Spaces that hold a table's numbers, in the same place.
_READ = (Space.THETA, Space.DIRECTION)
_WRITTEN = (Space.GRAD, Space.CURVATURE)


@dataclass(frozen=True, slots=True)
class Index:
    """Indices of a table's rows.

    Args:
        positions: their places in `INTS`.
        wraps: as of `Gather`.
    """

    positions: tuple[int, ...]
    wraps: bool


@dataclass(frozen=True, slots=True)
class Table:
    """An adapted parameter, `rows` times `width`, of which a task needs `most` rows at most.

    Args:
        place: where its small table begins in THETA; all small tables come after everything else.
    """

    rows: int
    width: int
    most: int
    place: int


@dataclass(frozen=True, slots=True)
class Few:
    """The adapted parameters of a machine, some of them small tables.

    Args:
        places: where each begins in THETA, by where it would begin.
        tables: by where each would begin.
        size: of THETA.
    """

    places: Mapping[int, int]
    tables: Mapping[int, Table]
    size: int


@dataclass(frozen=True, slots=True)
class Numbered:
    """Indices that are to be put into `INTS` from `place` on, as those of a small table.

    Args:
        table: where that would begin in THETA.
    """

    table: int
    index: Index
    place: int


def tables_of(steps: Sequence[Instruction], shapes: Mapping[int, tuple[int, ...]]) -> dict[int, set[Index]]:
    """The parameters that a program reads by rows only, and the indices of those.

    Args:
        steps: in order.
        shapes: of the adapted parameters, by their places in THETA.
    """
    if not any(isinstance(step, Gather) for step in steps):
        return {}
    found = {}
    uses = Uses(steps)
    for place, shape in shapes.items():
        if len(shape) == 2 and (indices := _Search(steps, uses, place, shape).indices()) is not None:
            found[place] = indices
    return found


class _Search:
    """How a program uses one parameter."""

    def __init__(self, steps: Sequence[Instruction], uses: Uses, place: int, shape: tuple[int, ...]) -> None:
        self.steps, self.uses, self.place = steps, uses, place
        self.count, self.width = shape
        self.given: set[Buffer] = set()
        for step in steps:
            self.given |= {view.buffer for view in step.reads() if self._of_parameter(view.buffer, _READ)}
        self.sums: set[Buffer] = set()  # gradients, and what is added up to them
        for step in steps:
            if self._of_parameter(step.out.buffer, _WRITTEN):
                self.sums.add(step.out.buffer)

    def _of_parameter(self, buffer: Buffer, spaces: Iterable[Space]) -> bool:
        return buffer.space in spaces and buffer.offset == self.place

    def indices(self) -> set[Index] | None:
        """All that it is read by; None where anything but rows of it is used."""
        found: set[Index] = set()
        waiting = list(self.sums)
        while waiting:
            buffer = waiting.pop()
            for at in self.uses.writers[buffer]:
                step = self.steps[at]
                if isinstance(step, Scatter):
                    index = self.rows_of(step, step.out)
                    if index is None or not step.accumulate or step.source.buffer in self.sums:
                        return None
                    found.add(index)
                elif not self._sums_up(step):
                    return None
                for view in step.reads() if isinstance(step, Map) else ():
                    if view.buffer not in self.sums:
                        self.sums.add(view.buffer)
                        waiting.append(view.buffer)
        for buffer in self.sums | self.given:
            for at in self.uses.readers[buffer]:
                step = self.steps[at]
                if isinstance(step, Gather) and buffer in self.given:
                    index = self.rows_of(step, step.source)
                    if index is None:
                        return None
                    found.add(index)
                elif buffer in self.given or step.out.buffer not in self.sums:
                    return None
        return found

    def _sums_up(self, step: Instruction) -> bool:
        """Whether it fills a whole buffer with zeros, a copy or a sum."""
        if not isinstance(step, Map) or not self._whole(step.out):
            return False
        if step.function == "copy" and step.args == (0.0,):
            return True
        views = [a for a in step.args if isinstance(a, View) and a.buffer.space == Space.WORK]
        return (
            step.function in ("copy", "add") and len(views) == len(step.args) and all(map(self._whole, views))
        )

    def _whole(self, view: View) -> bool:
        return view.whole and view.numel == self.count * self.width

    def rows_of(self, step: Gather | Scatter, view: View) -> Index | None:
        """The indices, where each moves `view` by rows and nothing else does."""
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        if step.step != self.width or step.limit != self.count or min(view.strides, default=0) < 0:
            return None
        given = _integers(step.index, self.steps, self.uses)
        if given is None or view.offset < 0 or last >= self.width:
            return None
        return Index(given, step.wraps)


def _integers(view: View, steps: Sequence[Instruction], uses: Uses) -> tuple[int, ...] | None:
    """The places in `INTS` of the indices, each once for every dimension that it changes along."""
    writers = uses.writers[view.buffer]
    base = 0
    source = view.buffer
    if source.space == Space.WORK and len(writers) == 1:  # numbers that are copies of integers
        copy = steps[writers[0]]
        if not isinstance(copy, Map) or copy.function != "copy" or not copy.out.whole:
            return None
        given = copy.args[0]
        if not isinstance(given, View) or not given.dense or given.numel != copy.out.numel:
            return None
        source, base = given.buffer, given.offset
    if source.space != Space.INTS or source.offset is None:
        return None
    base += source.offset + view.offset
    dims = [(n, s) for n, s in zip(view.shape, view.strides, strict=True) if s and n != 1]
    steps_of = [range(0, n * s, s) for n, s in dims]
    return tuple(base + sum(at) for at in product(*steps_of))


def few_rows(
    shapes: Mapping[int, tuple[int, ...]], programs: Sequence[Mapping[int, set[Index]]]
) -> Few | None:
    """The tables that are worth it, None where none is.

    Args:
        shapes: of the adapted parameters, by their places in THETA.
        programs: what `tables_of` says of each.
    """
    sizes: dict[int, int] = {}
    for place, shape in shapes.items():
        if not all(place in found for found in programs):
            continue
        indices: set[int | tuple[int, int]] = set()
        for which, found in enumerate(programs):
            indices |= {(which, position) for index in found[place] for position in index.positions}
        if indices and 2 * len(indices) <= shape[0]:
            sizes[place] = len(indices)
    if not sizes:
        return None
    places, tables, size = {}, {}, 0
    for place, shape in shapes.items():
        if place not in sizes:
            places[place] = size
            size += rounded(_numel(shape))
    for place, most in sizes.items():
        rows, width = shapes[place]
        places[place] = size
        tables[place] = Table(rows, width, most, size)
        size += rounded(most * width)
    return Few(places, tables, size)


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def with_few_rows(
    steps: Sequence[Instruction], few: Few, shapes: Mapping[int, tuple[int, ...]], sizes: dict[Space, int]
) -> tuple[list[Instruction], list[Numbered]]:
    """The same program on small tables, and the indices that it then needs.

    Args:
        steps: in order.
        few, shapes: as of `few_rows`.
        sizes: of all spaces; changed.
    """
    uses = Uses(steps)
    numbered: dict[tuple[int, Index], Numbered] = {}
    found, small = list(steps), set[Buffer]()
    for old, table in few.tables.items():
        search = _Search(steps, uses, old, shapes[old])
        if search.indices() is None:
            raise ValueError("this parameter is not read by rows")
        size = table.most * table.width
        places = {
            buffer: Buffer(size, buffer.space, None if buffer.space == Space.WORK else table.place)
            for buffer in search.sums | search.given
        }
        small |= set(places.values())
        for at, step in enumerate(found):
            if isinstance(step, Gather) and step.source.buffer in search.given:
                index = search.rows_of(step, step.source)
                source = replace(step.source, buffer=places[step.source.buffer])
                view = _renumbered(step.index, old, index, numbered, sizes)
                found[at] = Gather(step.out, source, view, step.step, table.most)
            elif isinstance(step, Scatter) and step.out.buffer in search.sums:
                index = search.rows_of(step, step.out)
                out = replace(step.out, buffer=places[step.out.buffer])
                view = _renumbered(step.index, old, index, numbered, sizes)
                found[at] = Scatter(out, step.source, view, step.step, table.most)
            elif isinstance(step, Map) and step.out.buffer in search.sums:
                args = tuple(_small(a, places) if isinstance(a, View) else a for a in step.args)
                found[at] = Map(_small(step.out, places), step.function, args)
    _move(found, few, small)
    for space in (*_READ, *_WRITTEN):
        if space in sizes:
            sizes[space] = few.size
    return found, list(numbered.values())


def _small(view: View, places: Mapping[Buffer, Buffer]) -> View:
    buffer = places[view.buffer]
    return View(buffer, 0, (buffer.size,), (1,))


def _renumbered(
    view: View,
    table: int,
    index: Index | None,
    numbered: dict[tuple[int, Index], Numbered],
    sizes: dict[Space, int],
) -> View:
    """A view of the indices of the small table, in the shape of `view`."""
    if index is None:
        raise ValueError("these are not the indices of rows")
    known = numbered.get((table, index))
    if known is None:
        known = numbered[table, index] = Numbered(table, index, sizes.get(Space.INTS, 0))
        sizes[Space.INTS] = known.place + rounded(len(index.positions))
    kept = [n if s and n != 1 else 1 for n, s in zip(view.shape, view.strides, strict=True)]
    strides = tuple(s if n != 1 else 0 for n, s in zip(kept, contiguous(kept), strict=True))
    return View(Buffer(len(index.positions), Space.INTS, known.place), 0, view.shape, strides)


def _move(steps: Sequence[Instruction], few: Few, small: Collection[Buffer]) -> None:
    """Parameters that are no tables go to where they begin now."""
    moved: dict[Buffer, Buffer] = {}
    for step in steps:
        for view in (*step.reads(), step.out):
            old = view.buffer
            if old.space in (*_READ, *_WRITTEN) and old not in small and old not in moved:
                moved[old] = Buffer(old.size, old.space, few.places[old.offset or 0])
    for step in steps:
        for old in {view.buffer for view in (*step.reads(), step.out)} & moved.keys():
            step.replaced(old, moved[old])
