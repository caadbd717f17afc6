"""Matrix products."""

from __future__ import annotations

from fastmeta.trace.ir import Operand, View
from fastmeta.trace.lower import Lowering, lowers
from fastmeta.trace.record import contiguous


def product(low: Lowering, a: Operand, b: Operand) -> Operand:
    """[B, M, K] @ [B, K, N]; of numbers the views that they stand for, and zero times anything
    is zero."""
    if a == 0.0 or b == 0.0:
        return 0.0
    shapes = [ref.shape for ref in low.call.refs()][-2:] if low.call is not None else [(), ()]
    left, right = (low.view(x, shape).expand(shape) for x, shape in zip((a, b), shapes, strict=True))
    batched = len(left.shape) == 3
    out = low.build.product(left if batched else left.unsqueeze(0), right if batched else right.unsqueeze(0))
    shape = out.shape if batched else out.shape[1:]
    return View(out.buffer, out.offset, shape, contiguous(shape))


@lowers("mm", "bmm")
def matrix_product(low: Lowering, a: Operand, b: Operand) -> Operand:
    return product(low, a, b)


@lowers("mv")
def matrix_vector(low: Lowering, a: Operand, b: Operand) -> Operand:
    (m, n), _ = (ref.shape for ref in low.call.refs())  # type: ignore[union-attr]
    left, right = low.view(a, (m, n)), low.view(b, (n,)).expand((n,)).unsqueeze(1)
    out = low.build.product(left.expand((m, n)).unsqueeze(0), right.unsqueeze(0))
    return View(out.buffer, out.offset, (m,), (1,))


@lowers("dot", "vdot")
def inner(low: Lowering, a: Operand, b: Operand) -> Operand:
    shape = next(low.call.refs()).shape  # type: ignore[union-attr]
    return low.build.reduce("sum", low.build.map("mul", low.view(a, shape).expand(shape), b), [])


@lowers("addmm", "baddbmm")
def add_product(
    low: Lowering, base: Operand, a: Operand, b: Operand, beta: float = 1, alpha: float = 1
) -> Operand:
    found: Operand = product(low, a, b)
    if alpha != 1:
        found = low.map("mul", found, float(alpha))
    if beta != 1:
        base = low.map("mul", base, float(beta))
    return low.map("add", found, base)


@lowers("addmv")
def add_matrix_vector(
    low: Lowering, base: Operand, a: Operand, b: Operand, beta: float = 1, alpha: float = 1
) -> Operand:
    _, (m, n), _ = (ref.shape for ref in low.call.refs())  # type: ignore[union-attr]
    right = low.view(b, (n,)).expand((n,)).unsqueeze(1)
    out = low.build.product(low.view(a, (m, n)).expand((m, n)).unsqueeze(0), right.unsqueeze(0))
    found: Operand = View(out.buffer, out.offset, (m,), (1,))
    if alpha != 1:
        found = low.map("mul", found, float(alpha))
    if beta != 1:
        base = low.map("mul", base, float(beta))
    return low.map("add", found, base)


@lowers("addcmul")
def addcmul(low: Lowering, base: Operand, a: Operand, b: Operand, value: float = 1) -> Operand:
    return low.map("add", base, low.map("mul", low.map("mul", a, b), float(value)))


@lowers("_trilinear")
def trilinear(
    low: Lowering,
    a: Operand,
    b: Operand,
    c: Operand,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    summed: list[int],
    _: int = 1,
) -> Operand:
    shapes = [ref.shape for ref in low.call.refs()]  # type: ignore[union-attr]
    views = []
    for x, shape, dims in zip((a, b, c), shapes, (expand_a, expand_b, expand_c), strict=True):
        view = low.view(x, shape).expand(shape)
        for dim in sorted(dims):
            view = view.unsqueeze(dim)
        views.append(view)
    whole = low.build.map("mul", low.build.map("mul", views[0], views[1]), views[2])
    return low.build.reduce("sum", whole, summed) if summed else whole
