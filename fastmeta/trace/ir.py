"""The instructions of a step program, over strided views of buffers.

A buffer is memory in one of a few spaces. Every instruction writes one view and reads others. A
buffer that is put together out of parts has several writers; they all come before its first reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from torch import Tensor

from fastmeta.trace.record import contiguous, numel


class Space(IntEnum):
    """Where a buffer lies. Those from `CONST` on are filled, or read, by whoever runs a program."""

    WORK = 0  # as long as an instruction needs it
    KEPT = 1  # of an inner step, from the gradient to the Hessian-vector product
    ONCE = 2  # of a task: what depends on neither theta nor the direction
    CONST = 3  # the same for all tasks
    THETA = 4  # adapted parameters
    FIXED = 5  # all other parameters, buffers, weights of losses
    BATCH = 6  # floating-point inputs, targets, example weights
    INTS = 7  # integer and boolean ones
    DIRECTION = 8  # v of the Hessian-vector product
    SEED = 9  # the cotangents of loss and output
    GRAD = 10  # by theta
    OTHER = 11  # by everything else that is wanted
    OUTPUT = 12  # the loss, and the output
    CURVATURE = 13  # the Hessian-vector product


#: Spaces that a program writes for others to read.
RESULTS = frozenset({Space.GRAD, Space.OTHER, Space.OUTPUT, Space.CURVATURE})


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of `size` elements; `offset` is its place in the space, None where that is planned."""

    size: int
    space: Space = Space.WORK
    offset: int | None = None
    constant: Tensor | None = None


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a buffer, in a shape."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return numel(self.shape)

    @property
    def dense(self) -> bool:
        """Whether it lies in one piece, the last dimension fastest."""
        want = contiguous(self.shape)
        return all(n == 1 or s == w for n, s, w in zip(self.shape, self.strides, want, strict=True))

    @property
    def whole(self) -> bool:
        """Whether it is all of its buffer, in order."""
        return self.dense and self.offset == 0 and self.numel == self.buffer.size

    def same_elements(self, other: View) -> bool:
        """Whether it reads the same elements in the same order."""
        return (
            self.buffer is other.buffer
            and self.offset == other.offset
            and self.shape == other.shape
            and all(n == 1 or s == t for n, s, t in zip(self.shape, self.strides, other.strides, strict=True))
        )

    def expand(self, shape: Sequence[int]) -> View:
        """Broadcast to a shape."""
        lead = len(shape) - len(self.shape)
        strides = [0] * lead + [
            0 if n == 1 and to != 1 else s
            for n, s, to in zip(self.shape, self.strides, shape[lead:], strict=True)
        ]
        return View(self.buffer, self.offset, tuple(shape), tuple(strides))

    def permute(self, order: Sequence[int]) -> View:
        """Dimensions in another order."""
        return View(
            self.buffer,
            self.offset,
            tuple(self.shape[d] for d in order),
            tuple(self.strides[d] for d in order),
        )

    def unsqueeze(self, at: int) -> View:
        """One more dimension of one element."""
        at %= len(self.shape) + 1
        return View(
            self.buffer,
            self.offset,
            (*self.shape[:at], 1, *self.shape[at:]),
            (*self.strides[:at], 0, *self.strides[at:]),
        )

    def slice(self, dim: int, start: int, stop: int, step: int = 1) -> View:
        """Elements start, start + step, .. below stop of one dimension."""
        n = max(0, -(-(stop - start) // step))
        shape = (*self.shape[:dim], n, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], self.strides[dim] * step, *self.strides[dim + 1 :])
        return View(self.buffer, self.offset + start * self.strides[dim], shape, strides)

    def flip(self, dim: int) -> View:
        """The same, from the end of a dimension to its beginning."""
        strides = (*self.strides[:dim], -self.strides[dim], *self.strides[dim + 1 :])
        last = (self.shape[dim] - 1) * self.strides[dim]
        return View(self.buffer, self.offset + last, self.shape, strides)

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements in another shape; None where that needs a copy."""
        from torch import empty

        if not self.numel:
            return View(self.buffer, self.offset, tuple(shape), contiguous(shape))
        strides = tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))
        if min(strides, default=0) < 0:
            return None
        try:
            like = empty(1, device="meta").as_strided(self.shape, strides).view(tuple(shape))
        except RuntimeError:
            return None
        return View(self.buffer, self.offset, tuple(shape), tuple(like.stride()))


Operand = View | float


@dataclass(eq=False, slots=True)
class Instruction:
    """What all instructions have: the view that they write."""

    out: View
    #: Its writers of other parts of the same buffer write other elements than it does.
    part: bool = field(default=False, kw_only=True)

    def reads(self) -> list[View]:
        """The views that it reads; its own, if it adds to what is there."""
        raise NotImplementedError

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        """Read and write `new`, from element `shift` on, instead of `old`."""
        if self.out.buffer is old:
            self.out = replace(self.out, buffer=new, offset=self.out.offset + shift)


def _moved(view: View, old: Buffer, new: Buffer, shift: int) -> View:
    return replace(view, buffer=new, offset=view.offset + shift) if view.buffer is old else view


@dataclass(eq=False, slots=True)
class Map(Instruction):
    """out = function(args), element by element; every view argument has the shape of `out`."""

    function: str
    args: tuple[Operand, ...]

    def reads(self) -> list[View]:
        return [a for a in self.args if isinstance(a, View)]

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        Instruction.replaced(self, old, new, shift)
        self.args = tuple(_moved(a, old, new, shift) if isinstance(a, View) else a for a in self.args)


@dataclass(eq=False, slots=True)
class Reduce(Instruction):
    """out (+)= the sum, or the maximum, over the last dimensions of x, those that `out` lacks.

    "argmax" gives the place of the first maximum: start + sum of index * step over all dimensions
    of x.
    """

    function: str  # "sum" | "max" | "argmax"
    x: View
    accumulate: bool = False
    steps: tuple[int, ...] = ()  # of argmax, for the dimensions of x
    start: int = 0

    def reads(self) -> list[View]:
        return [self.x, self.out] if self.accumulate else [self.x]

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        Instruction.replaced(self, old, new, shift)
        self.x = _moved(self.x, old, new, shift)


@dataclass(eq=False, slots=True)
class Product(Instruction):
    """out (+)= a @ b: [*B, M, N], [*B, M, K], [*B, K, N]; with what follows at once.

    Args:
        more: two more factors, whose product is added; their K may be another.
        start: [*B, M, N], added.
        gate: [*B, M, N]; the result is zero where this is at most zero.
        relu: negative results are zero.
    """

    a: View
    b: View
    accumulate: bool = False
    more: tuple[View, View] | None = None
    start: View | None = None
    gate: View | None = None
    relu: bool = False

    @property
    def bare(self) -> bool:
        """Whether it is nothing but a sum of products."""
        return self.start is None and self.gate is None and not self.relu

    def reads(self) -> list[View]:
        found = [self.a, self.b, *(self.more or ())]
        found += [view for view in (self.start, self.gate) if view is not None]
        return [*found, self.out] if self.accumulate else found

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        Instruction.replaced(self, old, new, shift)
        self.a, self.b = _moved(self.a, old, new, shift), _moved(self.b, old, new, shift)
        if self.more is not None:
            a, b = self.more
            self.more = _moved(a, old, new, shift), _moved(b, old, new, shift)
        if self.start is not None:
            self.start = _moved(self.start, old, new, shift)
        if self.gate is not None:
            self.gate = _moved(self.gate, old, new, shift)


@dataclass(eq=False, slots=True)
class Gather(Instruction):
    """out[i] = source[i] moved on by index[i] * step; views of one shape.

    An index below zero counts from the end where `wraps`; one outside of [0, limit) is an error
    when the program runs.
    """

    source: View
    index: View
    step: int
    limit: int
    wraps: bool = False

    def reads(self) -> list[View]:
        return [self.source, self.index]

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        Instruction.replaced(self, old, new, shift)
        self.source, self.index = _moved(self.source, old, new, shift), _moved(self.index, old, new, shift)


@dataclass(eq=False, slots=True)
class Scatter(Instruction):
    """out[i] moved on by index[i] * step: += source[i], or = source[i]; see `Gather`."""

    source: View
    index: View
    step: int
    limit: int
    wraps: bool = False
    accumulate: bool = True

    def reads(self) -> list[View]:
        return [self.source, self.index, self.out]

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        Instruction.replaced(self, old, new, shift)
        self.source, self.index = _moved(self.source, old, new, shift), _moved(self.index, old, new, shift)


@dataclass(eq=False, slots=True)
class Fused(Instruction):
    """Maps of one shape in one pass; `maps` in order, what only they read is never stored."""

    maps: list[Map]
    inner: frozenset[Buffer]  # never stored

    def reads(self) -> list[View]:
        return [v for m in self.maps for v in m.reads() if v.buffer not in self.inner]

    def writes(self) -> Iterator[View]:
        """Every view that is stored."""
        return (m.out for m in self.maps if m.out.buffer not in self.inner)

    def replaced(self, old: Buffer, new: Buffer, shift: int = 0) -> None:
        for m in self.maps:
            m.replaced(old, new, shift)
        Instruction.replaced(self, old, new, shift)


def written(instruction: Instruction) -> list[View]:
    """The views that an instruction writes."""
    return list(instruction.writes()) if isinstance(instruction, Fused) else [instruction.out]
