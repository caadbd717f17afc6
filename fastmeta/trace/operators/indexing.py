"""Gathers and scatters: embeddings, advanced indexing, losses by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmeta.trace.ir import Operand, View
from fastmeta.trace.lower import Lowering, lowers
from fastmeta.trace.record import contiguous, numel


def _shapes(low: Lowering) -> list[tuple[int, ...]]:
    return [ref.shape for ref in low.call.refs()]  # type: ignore[union-attr]


def _along(view: View, dim: int, shape: Sequence[int]) -> View:
    """`view` at index 0 of one dimension, in a shape whose other dimensions may be shorter."""
    strides = tuple(0 if d == dim else s for d, s in enumerate(view.strides))
    return View(view.buffer, view.offset, tuple(shape), strides)


@lowers("gather")
def gather(low: Lowering, x: Operand, dim: int, index: Operand, **_: Any) -> Operand:
    shape, at = _shapes(low)
    if not shape:
        return x
    dim %= len(shape)
    view, places = low.view(x, shape).expand(shape), low.view(index, at).expand(at)
    return low.build.gather(_along(view, dim, at), places, view.strides[dim], shape[dim])


@lowers("index_select")
def index_select(low: Lowering, x: Operand, dim: int, index: Operand) -> Operand:
    shape, at = _shapes(low)
    dim %= len(shape)
    view, out = low.view(x, shape).expand(shape), low.shape
    places = low.view(index, at).expand(at)
    spread = View(
        places.buffer,
        places.offset,
        out,
        tuple(places.strides[0] if d == dim else 0 for d in range(len(out))),
    )
    return low.build.gather(_along(view, dim, out), spread, view.strides[dim], shape[dim])


@lowers("embedding")
def embedding(low: Lowering, weight: Operand, index: Operand, *_: Any) -> Operand:
    (rows, width), at = _shapes(low)
    table, places = low.view(weight, (rows, width)).expand((rows, width)), low.view(index, at).expand(at)
    out = (*at, width)
    source = View(table.buffer, table.offset, out, (*[0] * len(at), table.strides[1]))
    spread = View(places.buffer, places.offset, out, (*places.strides, 0))
    return low.build.gather(source, spread, table.strides[0], rows)


@lowers("embedding_dense_backward")
def embedding_backward(
    low: Lowering, g: Operand, index: Operand, rows: int, padding: int, by_frequency: bool
) -> Operand:
    from fastmeta.trace.record import UntraceableError

    if by_frequency:
        raise UntraceableError("embedding with scale_grad_by_freq has no lowering")
    shape, at = _shapes(low)
    places = low.view(index, at).expand(at)
    source: Operand = low.view(g, shape).expand(shape)
    spread = View(places.buffer, places.offset, shape, (*places.strides, 0))
    if padding >= 0:
        source = low.build.map("where", low.build.map("eq", spread, float(padding)), 0.0, source)
    total = low.build.copy(0.0, (rows, shape[-1]))
    out = View(total.buffer, 0, shape, (*[0] * len(at), 1))
    low.build.scatter(out, low.view(source, shape), spread, shape[-1], rows)
    return total


def _scattered(low: Lowering, x: Operand, dim: int, index: Operand, source: Operand, add: bool) -> Operand:
    shape, at = _shapes(low)[:2]
    whole = low.build.copy(x, shape)
    if not shape:
        return low.build.map("add", x, source) if add else source
    dim %= len(shape)
    values = low.view(source, at)
    cut = View(
        values.buffer, values.offset, at, values.expand(at).strides if not values.shape else values.strides
    )
    out = _along(whole, dim, at)
    places = low.view(index, at).expand(at)
    low.build.scatter(out, cut, places, whole.strides[dim], shape[dim], accumulate=add)
    return whole


@lowers("scatter_add")
def scatter_add(low: Lowering, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    return _scattered(low, x, dim, index, source, True)


@lowers("scatter.src", "scatter.value")
def scatter(low: Lowering, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    return _scattered(low, x, dim, index, source, False)


def _with_index(
    low: Lowering, x: Operand, dim: int, index: Operand, source: Operand, add: bool, alpha: float = 1
) -> Operand:
    shape, at, given = _shapes(low)[:3]
    dim %= len(shape)
    whole = low.build.copy(x, shape)
    values: Operand = low.view(source, given).expand(given)
    if alpha != 1:
        values = low.build.map("mul", values, float(alpha))
    places = low.view(index, at).expand(at)
    spread = View(
        places.buffer,
        places.offset,
        given,
        tuple((places.strides[0] if at else 0) if d == dim else 0 for d in range(len(given))),
    )
    low.build.scatter(
        _along(whole, dim, given),
        low.view(values, given),
        spread,
        whole.strides[dim],
        shape[dim],
        accumulate=add,
    )
    return whole


@lowers("index_add")
def index_add(
    low: Lowering, x: Operand, dim: int, index: Operand, source: Operand, alpha: float = 1
) -> Operand:
    return _with_index(low, x, dim, index, source, True, alpha)


@lowers("index_copy")
def index_copy(low: Lowering, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    return _with_index(low, x, dim, index, source, False)


def _advanced(
    low: Lowering, view: View, indices: Sequence[Operand | None], shapes: Sequence[tuple[int, ...]]
) -> tuple[View, View, int, int, bool]:
    """(view at index zero, index, step, limit, wraps) of x[indices], in the result's shape."""
    from torch import broadcast_shapes

    at = [d for d, index in enumerate(indices) if index is not None]
    common = tuple(broadcast_shapes(*shapes))
    rest = [d for d in range(len(view.shape)) if d not in at]
    together = at == list(range(at[0], at[0] + len(at)))
    lead = at[0] if together else 0  # dimensions of x before those of the index
    dims = [*rest[:lead], *[None] * len(common), *rest[lead:]]
    out = tuple([view.shape[d] for d in rest[:lead]] + [*common] + [view.shape[d] for d in rest[lead:]])
    source = View(view.buffer, view.offset, out, tuple(0 if d is None else view.strides[d] for d in dims))
    places = [
        low.view(indices[d], shape).expand(common)  # type: ignore[arg-type]
        for d, shape in zip(at, shapes, strict=True)
    ]
    if len(at) == 1:
        index, step, limit, wraps = places[0], view.strides[at[0]], view.shape[at[0]], True
    else:  # as of one flat dimension
        dense = contiguous([view.shape[d] for d in at])
        flat: View | None = None
        for d, place, step_ in zip(at, places, dense, strict=True):
            n = float(view.shape[d])
            place = low.build.map(
                "where", low.build.map("lt", place, 0.0), low.build.map("add", place, n), place
            )
            place = low.build.map("mul", place, float(step_))
            flat = place if flat is None else low.build.map("add", flat, place)
        index = places[0] if flat is None else flat
        step, limit, wraps = view.strides[at[-1]], numel([view.shape[d] for d in at]), False
    index = index.expand(common)
    strides = (*[0] * lead, *index.strides, *[0] * (len(out) - lead - len(common)))
    return source, View(index.buffer, index.offset, out, strides), step, limit, wraps


def _flat_enough(low: Lowering, view: View, indices: Sequence[Any]) -> View:
    """Several indexed dimensions must lie in one another, as in a dense tensor."""
    return view if sum(index is not None for index in indices) == 1 else low.build.dense(view)


@lowers("index.Tensor", "_unsafe_index.Tensor")
def index(low: Lowering, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    shape, *at = _shapes(low)
    _no_masks(low, 1)
    at_dims = [d for d, i in enumerate(indices) if i is not None]
    view = low.view(x, shape).expand(shape)
    if len(at_dims) > 1:
        order = [*at_dims, *[d for d in range(len(shape)) if d not in at_dims]]
        if at_dims != list(range(at_dims[0], at_dims[0] + len(at_dims))):
            view, indices = view.permute(order), [indices[d] for d in at_dims]
        view = low.build.map("copy", view) if not view.dense else view
    return low.build.gather(*_advanced(low, view, indices, at))


@lowers("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(
    low: Lowering,
    x: Operand,
    indices: Sequence[Operand | None],
    values: Operand,
    accumulate: bool = False,
    *_: Any,
) -> Operand:
    from fastmeta.trace.record import UntraceableError

    shape, *at, given = _shapes(low)
    _no_masks(low, 1)
    at_dims = [d for d, i in enumerate(indices) if i is not None]
    if len(at_dims) > 1 and at_dims != list(range(at_dims[0], at_dims[0] + len(at_dims))):
        raise UntraceableError("index_put with dimensions between its indices has no lowering")
    whole = low.build.copy(x, shape)
    out, places, step, limit, wraps = _advanced(low, whole, indices, at)
    source = low.view(values, given).expand(given).expand(out.shape)
    low.build.scatter(out, source, places, step, limit, wraps, accumulate)
    return whole


def _no_masks(low: Lowering, start: int) -> None:
    import torch

    from fastmeta.trace.record import UntraceableError

    refs = list(low.call.refs())[start:]  # type: ignore[union-attr]
    if any(ref.dtype == torch.bool for ref in refs[: len(refs)]):
        raise UntraceableError("the shape of what a mask selects depends on values")


def _moved(low: Lowering, shape: tuple[int, ...], sizes: Sequence[int], forward: Any) -> View:
    """For every element of what an operator that only moves elements returns, the place of what
    stands there."""
    import torch

    places = torch.arange(numel(shape), dtype=torch.float64).reshape(shape)
    return low.build.array(forward(places, list(sizes)).reshape(-1))


def _enter_padding(name: str) -> None:
    import torch

    forward = getattr(torch.ops.aten, name)

    @lowers(name)
    def padded(low: Lowering, x: Operand, sizes: Sequence[int]) -> Operand:
        (shape,) = _shapes(low)
        view = low.build.dense(low.view(x, shape).expand(shape))
        index = _moved(low, shape, sizes, forward)
        return low.build.gather(View(view.buffer, view.offset, index.shape, (0,)), index, 1, numel(shape))

    @lowers(f"{name}_backward")
    def padded_backward(low: Lowering, g: Operand, x: Operand, sizes: Sequence[int]) -> Operand:
        given, shape = _shapes(low)
        source = low.build.dense(low.view(g, given).expand(given))
        index = _moved(low, shape, sizes, forward)
        total = low.build.copy(0.0, (numel(shape),))
        out = View(total.buffer, 0, index.shape, (0,))
        low.build.scatter(out, View(source.buffer, source.offset, index.shape, (1,)), index, 1, numel(shape))
        return View(total.buffer, 0, shape, contiguous(shape))


for _kind in ("replication", "reflection"):
    for _dims in (1, 2, 3):
        _enter_padding(f"{_kind}_pad{_dims}d")
