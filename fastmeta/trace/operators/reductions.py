"""Sums, means, maxima, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmeta.trace.ir import Operand, Reduce, View
from fastmeta.trace.lower import Lowering, lowers
from fastmeta.trace.record import Ref, contiguous, numel


def _given(low: Lowering, x: Operand) -> View:
    """The first argument in memory, also where it is a number."""
    if isinstance(x, View):
        return x
    first = next(low.call.refs()) if low.call is not None else None
    return low.view(x, () if not isinstance(first, Ref) else first.shape)


@lowers("sum", "sum.dim_IntList")
def total(
    low: Lowering, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Operand:
    view = _given(low, x)
    return low.build.reduce("sum", view, list(dim or ()), keepdim) if view.shape else view


@lowers("mean", "mean.dim")
def mean(
    low: Lowering, x: Operand, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Operand:
    view = _given(low, x)
    if not view.shape:
        return view
    dims = [d % len(view.shape) for d in dim] if dim else list(range(len(view.shape)))
    summed = low.build.reduce("sum", view, dims, keepdim)
    return low.map("div", summed, float(max(1, numel([view.shape[d] for d in dims]))))


@lowers("amax", "amin")
def extremum(low: Lowering, x: Operand, dim: Sequence[int] = (), keepdim: bool = False) -> Operand:
    view = _given(low, x)
    if low.call is not None and "amin" in str(low.call.function):
        return low.map("neg", low.build.reduce("max", low.build.map("neg", view), list(dim), keepdim))
    return low.build.reduce("max", view, list(dim), keepdim)


@lowers("max", "min")
def extremum_of_all(low: Lowering, x: Operand) -> Operand:
    if low.call is not None and "min" in str(low.call.function):
        return low.map("neg", low.build.reduce("max", low.build.map("neg", _given(low, x)), []))
    return low.build.reduce("max", _given(low, x), [])


@lowers("max.dim", "min.dim")
def extremum_and_place(low: Lowering, x: Operand, dim: int, keepdim: bool = False) -> list[Operand]:
    view = _given(low, x)
    smallest = low.call is not None and "min" in str(low.call.function)
    if smallest:
        view = low.build.map("neg", view)
    value = low.build.reduce("max", view, [dim], keepdim)
    place = _place(low, view, dim, keepdim)
    return [low.build.map("neg", value) if smallest else value, place]


@lowers("argmax", "argmin")
def place(low: Lowering, x: Operand, dim: int | None = None, keepdim: bool = False) -> Operand:
    view = _given(low, x)
    if low.call is not None and "argmin" in str(low.call.function):
        view = low.build.map("neg", view)
    if dim is None:
        return _place(low, low.build.reshape(view, (view.numel,)), 0, False)
    return _place(low, view, dim, keepdim)


def _place(low: Lowering, view: View, dim: int, keep: bool) -> View:
    dim %= len(view.shape)
    kept = [d for d in range(len(view.shape)) if d != dim]
    out = low.build.new([view.shape[d] for d in kept])
    steps = (*[0] * len(kept), 1)
    found = low.build.emit(Reduce(out, "argmax", view.permute([*kept, dim]), steps=steps))
    return found.unsqueeze(dim) if keep else found


@lowers("_softmax")
def softmax(low: Lowering, x: Operand, dim: int, _: bool) -> Operand:
    view = _given(low, x)
    e = low.build.map("exp", low.build.map("sub", view, low.build.reduce("max", view, [dim], True)))
    return low.map("div", e, low.build.reduce("sum", e, [dim], True))


@lowers("_log_softmax")
def log_softmax(low: Lowering, x: Operand, dim: int, _: bool) -> Operand:
    view = _given(low, x)
    z = low.build.map("sub", view, low.build.reduce("max", view, [dim], True))
    rest = low.build.reduce("sum", low.build.map("exp", z), [dim], True)
    return low.map("sub", z, low.build.map("log", rest))


@lowers("_softmax_backward_data")
def softmax_backward(low: Lowering, g: Operand, y: Operand, dim: int, _: Any) -> Operand:
    weighted = low.build.map("mul", g, y)
    return low.map("mul", y, low.build.map("sub", g, low.build.reduce("sum", weighted, [dim], True)))


@lowers("_log_softmax_backward_data")
def log_softmax_backward(low: Lowering, g: Operand, y: Operand, dim: int, _: Any) -> Operand:
    view = low.view(g, low.shape).expand(low.shape)
    share = low.build.map("mul", low.build.map("exp", y), low.build.reduce("sum", view, [dim], True))
    return low.map("sub", view, share)


@lowers("any", "any.dim", "any.dims")
def any_(low: Lowering, x: Operand, dim: Any = None, keepdim: bool = False) -> Operand:
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return low.build.reduce("max", low.build.map("ne", _given(low, x), 0.0), dims, keepdim)


@lowers("all", "all.dim")
def all_(low: Lowering, x: Operand, dim: Any = None, keepdim: bool = False) -> Operand:
    dims = [] if dim is None else [dim]
    none = low.build.reduce("max", low.build.map("eq", _given(low, x), 0.0), dims, keepdim)
    return low.map("eq", none, 0.0)


@lowers("cumsum")
def cumsum(low: Lowering, x: Operand, dim: int, **_: Any) -> Operand:
    """A product with a triangle of ones."""
    import torch

    view = _given(low, x)
    if not view.shape:
        return view
    dim %= len(view.shape)
    n = view.shape[dim]
    triangle = low.build.array(torch.ones(n, n).triu()).unsqueeze(0)
    order = [d for d in range(len(view.shape)) if d != dim] + [dim]
    moved = view.permute(order)
    rows = low.build.reshape(moved, (1, view.numel // n, n))
    summed = low.build.product(rows, triangle)
    back = View(summed.buffer, 0, moved.shape, contiguous(moved.shape))
    return back.permute([order.index(d) for d in range(len(order))])


def _variance(low: Lowering, x: Operand, dim: Any, correction: float | None, keep: bool) -> list[Operand]:
    """[variance, mean], both as `keep` says."""
    view = _given(low, x)
    dims = [d % len(view.shape) for d in dim] if dim else list(range(len(view.shape)))
    n = numel([view.shape[d] for d in dims])
    middle = low.build.map("div", low.build.reduce("sum", view, dims, True), float(n))
    centred = low.build.map("sub", view, middle)
    squares = low.build.reduce("sum", low.build.map("mul", centred, centred), dims, keep)
    variance = low.build.map("div", squares, float(n - (1 if correction is None else correction)))
    if keep:
        return [variance, middle]
    shape = [view.shape[d] for d in range(len(view.shape)) if d not in dims]
    return [variance, low.build.reshape(middle, shape)]


@lowers("var.correction", "std.correction")
def variance(
    low: Lowering, x: Operand, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> Operand:
    found = _variance(low, x, dim, correction, keepdim)[0]
    deviation = low.call is not None and "std" in str(low.call.function)
    return low.build.map("sqrt", found) if deviation else found


@lowers("var_mean.correction")
def variance_and_mean(
    low: Lowering, x: Operand, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> list[Operand]:
    return _variance(low, x, dim, correction, keepdim)


@lowers("prod.dim_int", "prod")
def product_of(low: Lowering, x: Operand, dim: int | None = None, keepdim: bool = False, **_: Any) -> Operand:
    """One multiplication after the other."""
    view = _given(low, x)
    if dim is None:
        view, dim = low.build.reshape(view, (view.numel,)), 0
    dim %= len(view.shape)
    found = view.slice(dim, 0, 1)
    for at in range(1, view.shape[dim]):
        found = low.build.map("mul", found, view.slice(dim, at, at + 1))
    if keepdim:
        return found
    return low.build.reshape(found, [n for d, n in enumerate(view.shape) if d != dim])
