"""Makes instructions: buffers, constants, and nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.trace.ir import (
    Buffer,
    Gather,
    Instruction,
    Map,
    Operand,
    Product,
    Reduce,
    Scatter,
    Space,
    View,
)
from fastmeta.trace.record import contiguous, numel


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a sum that is zero elsewhere: `source` at these elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source: View


@dataclass(frozen=True, slots=True)
class Sparse:
    """A value of `size` elements: the sum of its pieces, and of `base` where there is one."""

    size: int
    pieces: tuple[Piece, ...]
    base: View | None = None  # [size]


class Builder:
    """The instructions of one program, as they are made."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.instructions: list[Instruction] = []
        self._known: dict[object, View] = {}
        self._constants: dict[object, Buffer] = {}
        self._alive: list[object] = []

    def new(self, shape: Sequence[int], strides: Sequence[int] | None = None) -> View:
        """A new buffer; with `strides` dense in that order of dimensions."""
        shape = tuple(shape)
        return View(Buffer(numel(shape)), 0, shape, tuple(strides or contiguous(shape)))

    def constant(self, tensor: Tensor) -> Operand:
        """A constant, as a number where all elements are equal."""
        values = tensor.detach().to(self.dtype)
        if values.numel() and bool((values == values.reshape(-1)[0]).all()):
            return float(values.reshape(-1)[0])
        return self.array(values)

    def array(self, tensor: Tensor) -> View:
        """A constant in memory."""
        values = tensor.detach().to(self.dtype).contiguous().clone()
        key = (tuple(values.shape), values.numpy().tobytes())
        buffer = self._constants.get(key)
        if buffer is None:
            buffer = self._constants[key] = Buffer(values.numel(), Space.CONST, None, values.reshape(-1))
        return View(buffer, 0, tuple(values.shape), contiguous(values.shape))

    def emit(self, instruction: Instruction) -> View:
        """Add an instruction; the view that it writes."""
        self.instructions.append(instruction)
        return instruction.out

    def map(
        self,
        function: str,
        *args: Operand,
        shape: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> View:
        """function(args), broadcast to a new buffer; the one of before if it was made before."""
        if shape is None:
            shape = torch.broadcast_shapes(*[a.shape for a in args if isinstance(a, View)])
        views = tuple(a.expand(shape) if isinstance(a, View) else float(a) for a in args)
        if simple := _simplified(function, views):
            return simple
        key = (function, *[_key(a) for a in views])
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self.emit(Map(self.new(shape, strides), function, views))
            self._alive += views
        return known

    def copy(self, x: Operand, shape: Sequence[int], strides: Sequence[int] | None = None) -> View:
        """A dense copy."""
        view = x.expand(shape) if isinstance(x, View) else x
        return self.emit(Map(self.new(shape, strides), "copy", (view,)))

    def reduce(self, function: str, x: View, dims: Sequence[int], keep: bool = False) -> View:
        """Over some dimensions of x; all of them where there are none."""
        dims = sorted(d % len(x.shape) for d in dims) if dims else list(range(len(x.shape)))
        kept = [d for d in range(len(x.shape)) if d not in dims]
        key = (function, tuple(dims), _key(x))
        known = self._known.get(key)
        if known is None:
            out = self.new([x.shape[d] for d in kept])
            known = self._known[key] = self.emit(Reduce(out, function, x.permute([*kept, *dims])))
            self._alive.append(x)
        if not keep:
            return known
        for d in dims:
            known = known.unsqueeze(d)
        return known

    def product(self, a: View, b: View) -> View:
        """a @ b: [*B, M, K] and [*B, K, N]; a new [*B, M, N]."""
        key = ("product", _key(a), _key(b))
        known = self._known.get(key)
        if known is None:
            out = self.new((*a.shape[:-1], b.shape[-1]))
            known = self._known[key] = self.emit(Product(out, a, b))
            self._alive += (a, b)
        return known

    def gather(self, source: View, index: View, step: int, limit: int, wraps: bool = False) -> View:
        """As `Gather`, to a new buffer."""
        return self.emit(Gather(self.new(index.shape), source, index, step, limit, wraps))

    def scatter(
        self,
        out: View,
        source: View,
        index: View,
        step: int,
        limit: int,
        wraps: bool = False,
        accumulate: bool = True,
    ) -> None:
        """As `Scatter`: `out` is changed."""
        self.emit(Scatter(out, source, index, step, limit, wraps, accumulate))

    def dense(self, x: View) -> View:
        """x in one piece: itself or a copy, made once."""
        return x if x.dense else self.map("copy", x)

    def reshape(self, x: View, shape: Sequence[int]) -> View:
        """The same elements in another shape."""
        found = x.reshape(shape)
        if found is None:
            found = self.dense(x).reshape(shape)
        if found is None:
            raise ValueError(f"cannot view {x.shape} as {tuple(shape)}")
        return found

    def assembled(self, sparse: Sparse) -> View:
        """A sum of pieces in memory, [size]."""
        whole = self.new((sparse.size,))
        taken = torch.zeros(sparse.size, dtype=torch.bool)
        counts = [taken.as_strided(p.shape, p.strides, p.offset) for p in sparse.pieces]
        apart = sparse.base is None
        for places in counts:
            apart = apart and not bool(places.any())
            places.fill_(True)
        if sparse.base is not None:
            self.emit(Map(whole, "copy", (sparse.base,)))
        elif not bool(taken.all()):
            self.emit(Map(whole, "copy", (0.0,)))
        filled = sparse.base is not None or not bool(taken.all())
        for p in sparse.pieces:
            at = View(whole.buffer, p.offset, p.shape, p.strides)
            source = p.source.expand(p.shape)
            if apart:
                self.emit(Map(at, "copy", (source,), part=not filled))
            else:
                if not filled:
                    self.emit(Map(whole, "copy", (0.0,)))
                    filled = True
                self.emit(Map(at, "add", (at, source)))
        return whole


def _key(operand: Operand) -> object:
    if isinstance(operand, View):
        return (id(operand.buffer), operand.offset, operand.shape, operand.strides)
    return operand


def _simplified(function: str, args: tuple[Operand, ...]) -> View | None:
    """What needs no instruction: x + 0, x * 1 and the like."""
    neutral = {"add": (0.0, 0.0), "sub": (None, 0.0), "mul": (1.0, 1.0), "div": (None, 1.0)}.get(function)
    if neutral is None:
        return None
    (x, y), (left, right) = args, neutral
    if isinstance(x, View) and y == right and isinstance(y, float):
        return x
    if isinstance(y, View) and left is not None and x == left:
        return y
    return None
