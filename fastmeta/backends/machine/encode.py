"""Step programs as the numbers that `_C.Machine` reads; csrc/cpu/machine/program.cpp reads them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from fastmeta.trace.ir import (
    Buffer,
    Fused,
    Gather,
    Instruction,
    Map,
    Product,
    Reduce,
    Scatter,
    Space,
    View,
)
from fastmeta.trace.program import StepProgram
from fastmeta.trace.record import numel

try:
    from fastmeta import _C

    _FUNCTIONS = {name: at for at, name in enumerate(_C.machine_functions())}
except ImportError:  # the backend says so
    _FUNCTIONS = {}

_REDUCTIONS = {"sum": 0, "max": 1, "argmax": 2}


class Encoder:
    """The words of one program."""

    def __init__(self, program: StepProgram) -> None:
        self._places = program.places
        self.words = array("q")
        self.numbers = array("d")
        counts = [sum(self._step(step) for step in stage) for stage in program.stages]
        self._counts = array("q", counts)
        self._program = program

    def described(self) -> dict[str, Any]:
        """A part of what `_C.Machine` is made of."""
        sizes = array("q", [self._program.sizes.get(space, 0) for space in Space])
        return {
            "words": self.words.tobytes(),
            "numbers": self.numbers.tobytes(),
            "stages": self._counts.tobytes(),
            "sizes": sizes.tobytes(),
            "constants": array("d", self._program.constants).tobytes(),
        }

    def _step(self, step: Instruction) -> int:
        """Write one instruction; how many were written: none for one without elements."""
        if isinstance(step, Fused):
            if not numel(step.maps[0].out.shape):
                return 0
            self._maps(step.maps, step.inner)
        elif not step.out.numel:
            return 0
        elif isinstance(step, Map):
            self._maps([step], frozenset())
        elif isinstance(step, Reduce):
            self._reduce(step)
        elif isinstance(step, Product):
            self._product(step)
        elif isinstance(step, (Gather, Scatter)):
            self._gather(step)
        return 1

    def _address(self, view: View) -> tuple[int, int]:
        buffer = view.buffer
        if buffer.offset is not None:
            return int(buffer.space), buffer.offset + view.offset
        space, offset = self._places[buffer]
        return int(space), offset + view.offset

    def _view(self, view: View, strides: Sequence[int] | None = None) -> None:
        self.words.extend((*self._address(view), *(view.strides if strides is None else strides)))

    def _written(self, view: View, strides: Sequence[int] | None = None) -> None:
        space, offset = self._address(view)
        ends = view.offset + view.numel == view.buffer.size
        self.words.extend((space, offset, int(ends), *(view.strides if strides is None else strides)))

    def _maps(self, maps: Sequence[Map], inner: frozenset[Buffer]) -> None:
        order = _memory_order(maps[-1].out)
        shape = [maps[-1].out.shape[d] for d in order]
        inputs: dict[tuple[Any, ...], View] = {}
        numbers: dict[float, int] = {}
        written = {m.out.buffer for m in maps} if len(maps) > 1 else set()
        for m in maps:
            for a in m.args:
                if isinstance(a, float):
                    numbers.setdefault(a, len(numbers))
                elif isinstance(a, View) and a.buffer not in written:
                    inputs.setdefault(_same(a), a)
        stored = [m.out for m in maps if m.out.buffer not in inner]
        registers, temps = _registers(maps, inner)
        at_input = {key: temps + i for i, key in enumerate(inputs)}
        first_number = temps + len(inputs)
        first_out = first_number + len(numbers)
        at_out: dict[tuple[Any, ...], int] = {_same(v): first_out + i for i, v in enumerate(stored)}
        self.words.extend((0, len(shape), *shape, len(inputs)))
        for view in inputs.values():
            self._view(view, [view.strides[d] for d in order])
        self.words.append(len(stored))
        for view in stored:
            self._written(view, [view.strides[d] for d in order])
        self.words.extend((temps, len(self.numbers), len(numbers), len(maps)))
        self.numbers.extend(numbers)
        for i, m in enumerate(maps):
            places = []
            for j, a in enumerate(m.args):
                if isinstance(a, float):
                    places.append(first_number + numbers[a])
                elif isinstance(a, View) and a.buffer in inner:
                    places.append(registers[i, j])
                elif isinstance(a, View) and a.buffer in written:
                    places.append(at_out[_same(a)])
                elif isinstance(a, View):
                    places.append(at_input[_same(a)])
            to = registers[i, -1] if m.out.buffer in inner else at_out[_same(m.out)]
            places += [places[0]] * (3 - len(places))
            self.words.extend((_FUNCTIONS[m.function], to, *places))

    def _reduce(self, step: Reduce) -> None:
        reduced = len(step.x.shape) - len(step.out.shape)
        self.words.extend((1, len(step.x.shape), *step.x.shape, reduced))
        self.words.extend((_REDUCTIONS[step.function], int(step.accumulate)))
        self._view(step.x)
        self._written(step.out, (*step.out.strides, *[0] * reduced))
        self.words.append(step.start)
        self.words.extend(step.steps or [0] * len(step.x.shape))

    def _product(self, step: Product) -> None:
        (*batch, m, n), k = step.out.shape, step.a.shape[-1]
        more = () if step.more is None else step.more
        self.words.extend((2, len(batch) + 3, *batch, m, n, k, int(step.accumulate)))
        self.words.extend((more[0].shape[-1] if more else 0, int(step.relu)))
        self.words.extend((int(step.start is not None), int(step.gate is not None)))
        self._written(step.out, (*step.out.strides, 0))
        for a, b in ((step.a, step.b), *((more,) if more else ())):
            self._view(a, (*a.strides[:-1], 0, a.strides[-1]))
            self._view(b, (*b.strides[:-2], 0, b.strides[-1], b.strides[-2]))
        for view in (step.start, step.gate):
            if view is not None:
                self._view(view, (*view.strides, 0))

    def _gather(self, step: Gather | Scatter) -> None:
        scatter = isinstance(step, Scatter)
        accumulate = int(step.accumulate) if isinstance(step, Scatter) else 0
        shape = step.index.shape
        self.words.extend((4 if scatter else 3, len(shape), *shape, int(step.wraps), accumulate))
        self.words.extend((step.step, step.limit))
        self._written(step.out)
        self._view(step.source)
        self._view(step.index)


def _same(view: View) -> tuple[Any, ...]:
    return (view.buffer, view.offset, view.shape, view.strides)


def _memory_order(view: View) -> list[int]:
    """Dimensions, those that lie closest together last."""
    return sorted(range(len(view.shape)), key=lambda d: (-abs(view.strides[d]), d))


def _registers(maps: Sequence[Map], inner: frozenset[Buffer]) -> tuple[Mapping[tuple[int, int], int], int]:
    """The register of every argument, and under -1 of every result, that is never stored."""
    last: dict[Buffer, int] = {}
    for i, m in enumerate(maps):
        for a in m.args:
            if isinstance(a, View) and a.buffer in inner:
                last[a.buffer] = i
    places: dict[tuple[int, int], int] = {}
    held: dict[Buffer, int] = {}
    free: list[int] = []
    count = 0
    for i, m in enumerate(maps):
        for j, a in enumerate(m.args):
            if isinstance(a, View) and a.buffer in inner:
                places[i, j] = held[a.buffer]
        for buffer in {a.buffer for a in m.args if isinstance(a, View) and a.buffer in inner}:
            if last[buffer] == i:
                free.append(held.pop(buffer))
        if m.out.buffer in inner:
            if free:
                register = free.pop()
            else:
                register, count = count, count + 1
            held[m.out.buffer] = places[i, -1] = register
            if m.out.buffer not in last:
                free.append(held.pop(m.out.buffer))
    return places, count
