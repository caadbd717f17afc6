"""Operators that put tensors together, cut them, or turn them round with a copy."""

from __future__ import annotations

from collections.abc import Sequence

from fastmeta.trace.builder import Piece, Sparse
from fastmeta.trace.ir import Map, Operand, View
from fastmeta.trace.lower import Lowering, lowers, piece_of
from fastmeta.trace.record import UntraceableError, contiguous, numel


def _places(shape: Sequence[int]) -> View:
    """The elements of a dense tensor of this shape, as a view whose buffer does not matter."""
    from fastmeta.trace.ir import Buffer

    return View(Buffer(numel(shape)), 0, tuple(shape), contiguous(shape))


@lowers("cat")
def cat(low: Lowering, tensors: Sequence[Operand], dim: int = 0) -> Sparse:
    places = _places(low.shape)
    dim %= len(low.shape)
    shapes = [ref.shape for ref in low.call.refs()]  # type: ignore[union-attr]
    pieces, at = [], 0
    for x, shape in zip(tensors, shapes, strict=True):
        if shape == (0,):
            continue
        part = places.slice(dim, at, at + shape[dim])
        pieces.append(piece_of(low.view(x, shape).expand(shape), part))
        at += shape[dim]
    return Sparse(numel(low.shape), tuple(pieces))


@lowers("stack")
def stack(low: Lowering, tensors: Sequence[Operand], dim: int = 0) -> Sparse:
    places = _places(low.shape)
    dim %= len(low.shape)
    pieces = []
    for i, x in enumerate(tensors):
        part = places.slice(dim, i, i + 1)
        shape = (*part.shape[:dim], *part.shape[dim + 1 :])
        source = low.view(x, shape).expand(shape).unsqueeze(dim)
        pieces.append(piece_of(source, part))
    return Sparse(numel(low.shape), tuple(pieces))


@lowers("slice_backward")
def slice_backward(
    low: Lowering, g: Operand, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Sparse:
    dim %= len(sizes)
    n = sizes[dim]
    start, end = (min(max(i + n if i < 0 else i, 0), n) for i in (start, end))
    part = _places(sizes).slice(dim, start, end, step)
    return Sparse(numel(sizes), (piece_of(low.view(g, part.shape).expand(part.shape), part),))


@lowers("select_backward")
def select_backward(low: Lowering, g: Operand, sizes: Sequence[int], dim: int, index: int) -> Sparse:
    dim %= len(sizes)
    index %= sizes[dim]
    part = _places(sizes).slice(dim, index, index + 1)
    shape = (*part.shape[:dim], *part.shape[dim + 1 :])
    return Sparse(numel(sizes), (piece_of(low.view(g, shape).expand(shape).unsqueeze(dim), part),))


@lowers("diagonal_backward")
def diagonal_backward(
    low: Lowering, g: Operand, sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Sparse:
    from torch import empty

    like = empty(tuple(sizes), device="meta").diagonal(offset, dim1, dim2)
    source = low.view(g, tuple(like.shape)).expand(tuple(like.shape))
    piece = Piece(int(like.storage_offset()), tuple(like.shape), tuple(like.stride()), source)
    return Sparse(numel(sizes), (piece,))


def _written(low: Lowering, x: Operand, part: View, source: Operand) -> View:
    """A copy of x with `source` at `part`."""
    whole = low.build.copy(x, low.shape)
    at = View(whole.buffer, part.offset, part.shape, part.strides)
    low.build.emit(Map(at, "copy", (low.view(source, part.shape).expand(part.shape),)))
    return whole


@lowers("slice_scatter")
def slice_scatter(
    low: Lowering,
    x: Operand,
    source: Operand,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Operand:
    dim %= len(low.shape)
    n = low.shape[dim]
    start, end = (
        min(max(i + n if i < 0 else i, 0), n)
        for i in (0 if start is None else start, n if end is None else end)
    )
    return _written(low, x, _places(low.shape).slice(dim, start, end, step), source)


@lowers("select_scatter")
def select_scatter(low: Lowering, x: Operand, source: Operand, dim: int, index: int) -> Operand:
    dim %= len(low.shape)
    index %= low.shape[dim]
    part = _places(low.shape).slice(dim, index, index + 1)
    shape = (*part.shape[:dim], *part.shape[dim + 1 :])
    return _written(low, x, part, low.view(source, shape).expand(shape).unsqueeze(dim))


@lowers("constant_pad_nd")
def pad(low: Lowering, x: Operand, sizes: Sequence[int], value: float = 0) -> Operand | Sparse:
    """Negative sizes cut off."""
    dims = len(low.shape)
    shape = next(low.call.refs()).shape  # type: ignore[union-attr]
    view, part = low.view(x, shape).expand(shape), _places(low.shape)
    for i in range(len(sizes) // 2):
        dim, (before, after) = dims - 1 - i, sizes[2 * i : 2 * i + 2]
        view = view.slice(dim, max(0, -before), view.shape[dim] - max(0, -after))
        part = part.slice(dim, max(0, before), low.shape[dim] - max(0, after))
    if value == 0:
        return Sparse(numel(low.shape), (piece_of(view, part),))
    return _written(low, float(value), part, view)


@lowers("flip")
def flip(low: Lowering, x: Operand, dims: Sequence[int]) -> Operand:
    view = low.view(x, low.shape).expand(low.shape)
    for dim in dims:
        view = view.flip(dim % len(low.shape))
    return low.build.copy(view, low.shape, low.strides)


@lowers("roll")
def roll(low: Lowering, x: Operand, shifts: Sequence[int], dims: Sequence[int] = ()) -> Sparse | Operand:
    if not dims:
        raise UntraceableError("roll without dimensions has no lowering")
    view, places = low.view(x, low.shape).expand(low.shape), _places(low.shape)
    parts = [(view, places)]
    for shift, given in zip(shifts, dims, strict=True):
        dim = given % len(low.shape)
        n = low.shape[dim]
        k = shift % n
        parts = [
            pair
            for v, p in parts
            for pair in (
                (v.slice(dim, 0, n - k), p.slice(dim, k, n)),
                (v.slice(dim, n - k, n), p.slice(dim, 0, k)),
            )
        ]
    pieces = tuple(piece_of(v, p) for v, p in parts if v.numel)
    return Sparse(numel(low.shape), pieces)


@lowers("repeat")
def repeat(low: Lowering, x: Operand, times: Sequence[int]) -> Operand:
    shape = next(low.call.refs()).shape  # type: ignore[union-attr]
    view = low.view(x, shape).expand(shape)
    lead = len(times) - len(shape)
    sizes: list[int] = []
    view = View(view.buffer, view.offset, (1,) * lead + view.shape, (0,) * lead + view.strides)
    strides: list[int] = []
    for n, s, t in zip(view.shape, view.strides, times, strict=True):
        sizes += [t, n]
        strides += [0, s]
    tiled = View(view.buffer, view.offset, tuple(sizes), tuple(strides))
    copied = low.build.copy(tiled, tuple(sizes))
    return View(copied.buffer, 0, low.shape, contiguous(low.shape))


@lowers("triu", "tril")
def triangle(low: Lowering, x: Operand, diagonal: int = 0) -> Operand:
    from torch import ones

    upper = low.call is not None and "triu" in str(low.call.function)
    mask = ones(low.shape[-2:])
    mask = mask.triu(diagonal) if upper else mask.tril(diagonal)
    return low.map("where", low.build.constant(mask) if mask.numel() > 1 else low.build.array(mask), x, 0.0)


@lowers("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffled(low: Lowering, x: Operand, factor: int) -> Operand:
    """Moves of whole blocks: PyTorch's own formula, on the places of elements."""
    import torch

    shape = next(low.call.refs()).shape  # type: ignore[union-attr]
    places = torch.arange(numel(shape)).reshape(shape)
    found = low.call.function(places, factor)  # type: ignore[union-attr]
    view = low.build.dense(low.view(x, shape).expand(shape))
    index = low.build.array(found.reshape(-1))
    source = View(view.buffer, view.offset, (found.numel(),), (0,))
    return low.build.gather(source, index, 1, numel(shape))
