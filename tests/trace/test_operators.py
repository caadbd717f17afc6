"""Every operator of the table against PyTorch: interpreted, and by the machine, a task a thread and
a task in every lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.programs import Traced
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.trace import operators  # noqa: F401
from fastmeta.trace.lower import OPERATORS
from fastmeta.trace.record import UntraceableError, name_of

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
M = (5, 7)


def _x(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def _positive(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g, dtype=torch.float64) + 0.1


def _ids(most: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, most, shape, generator=g)


def _mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g) > 0.5


UNARY = """neg abs relu tanh sigmoid exp expm1 sin cos erf sgn floor ceil round trunc square
           reciprocal exp2""".split()
POSITIVE = "log log1p sqrt rsqrt".split()

#: name -> (function, makers of its tensors)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Callable[[torch.Generator], Tensor], ...]]] = {
    **{name: (getattr(torch, name), (_x(*M),)) for name in UNARY},
    **{name: (getattr(torch, name), (_positive(*M),)) for name in POSITIVE},
    "add": (torch.add, (_x(*M), _x(7))),
    "add_alpha": (lambda a, b: torch.add(a, b, alpha=2), (_x(*M), _x(5, 1))),
    "sub": (torch.sub, (_x(*M), _x(1, 7))),
    "rsub": (lambda a: 2 - a, (_x(*M),)),
    "mul": (torch.mul, (_x(2, 5, 7), _x(5, 1))),
    "div": (torch.div, (_x(*M), _positive(7))),
    "div_floor": (lambda a: torch.div(a, 0.3, rounding_mode="floor"), (_x(*M),)),
    "remainder": (lambda a: torch.remainder(a, 0.7), (_x(*M),)),
    "fmod": (lambda a: torch.fmod(a, 0.7), (_x(*M),)),
    "pow": (torch.pow, (_positive(*M), _x(7))),
    "powers": (lambda a: a**2 + a**3 + a**0.5 + a**-1 + a**-0.5 + a**1.7 + a**0 + 2**a, (_positive(*M),)),
    "atan2": (torch.atan2, (_x(*M), _x(*M))),
    "maximum": (torch.maximum, (_x(*M), _x(7))),
    "minimum": (torch.minimum, (_x(*M), _x(7))),
    "comparisons": (
        lambda a, b: sum(
            (c.double() * 2**i for i, c in enumerate((a < b, a <= b, a > b, a >= b, a == b, a != b)))
        ),
        (
            lambda g: torch.randint(0, 3, M, generator=g).double(),
            lambda g: torch.randint(0, 3, M, generator=g).double(),
        ),
    ),
    "where": (lambda m, a, b: torch.where(m, a, b), (_mask(*M), _x(*M), _x(7))),
    "logic": (lambda m, n, a: a * ((m & n) | ~(m ^ n)), (_mask(*M), _mask(*M), _x(*M))),
    "sum_of_bools": (lambda m, n, a: a * (m + n), (_mask(*M), _mask(*M), _x(*M))),
    "bool": (lambda i, a: a * i.bool() * (i - 1).bool(), (_ids(4, *M), _x(*M))),
    "masked_fill": (lambda m, a: a.masked_fill(m, -2.0), (_mask(*M), _x(*M))),
    "clamp": (lambda a: a.clamp(-0.5, 0.7) + a.clamp_min(0.1) + a.clamp_max(0.2), (_x(*M),)),
    "leaky_relu": (lambda a: F.leaky_relu(a, 0.2), (_x(*M),)),
    "elu": (lambda a: F.elu(a, 1.3) + F.selu(a), (_x(*M),)),
    "gelu": (lambda a: F.gelu(a) + F.gelu(a, approximate="tanh"), (_x(*M),)),
    "silu": (lambda a: F.silu(a) + F.mish(a) + F.hardswish(a), (_x(*M),)),
    "softplus": (lambda a: F.softplus(a, 2.0, 1.0) + F.logsigmoid(a), (_x(*M),)),
    "converted": (lambda a, i: a.bool().double() + a.long().double() + i.double(), (_x(*M), _ids(9, *M))),
    "sum": (lambda a: a.sum((0, 2)) + a.sum() + a.mean(0).mean(-1) + a.mean(), (_x(3, 5, 7),)),
    "sum_keep": (lambda a: a.sum(1, keepdim=True) * a.mean((0, 1), keepdim=True), (_x(3, 5, 7),)),
    "extrema": (lambda a: a.amax(1) + a.amin(1) + a.max() + a.min() + a.max(1).values, (_x(*M),)),
    "argmax": (
        lambda a: (a.argmax(1) + a.argmin(0)[:5] + a.max(1).indices + a.argmax()).double() + 0 * a[:, 0],
        (_x(*M),),
    ),
    "softmax": (lambda a: a.softmax(-1) + a.log_softmax(0), (_x(*M),)),
    "softmax_middle": (lambda a: a.softmax(1), (_x(3, 5, 7),)),
    "any": (lambda m, a: a * m.any(0) * m.all(1, keepdim=True), (_mask(*M), _x(*M))),
    "cumsum": (lambda a: a.cumsum(0) + a.cumsum(1), (_x(*M),)),
    "logsumexp": (lambda a: a.logsumexp(-1) + a.norm(dim=1) + a.std(1) + a.var(1), (_x(*M),)),
    "mm": (torch.mm, (_x(5, 7), _x(7, 19))),
    "mm_transposed": (lambda a, b: a.T @ b.T, (_x(7, 5), _x(19, 7))),
    "mm_narrow": (lambda a, b: a @ b, (_x(33, 21), _x(21, 1))),
    "mm_row": (lambda a, b: a @ b, (_x(1, 40), _x(40, 40))),
    "mv": (lambda a, b: a @ b, (_x(5, 7), _x(7))),
    "dot": (lambda a, b: a @ b, (_x(37), _x(37))),
    "bmm": (torch.bmm, (_x(3, 5, 7), _x(3, 7, 9))),
    "bmm_swapped": (lambda a, b: torch.einsum("nqhe,nkhe->nhqk", a, b), (_x(2, 4, 3, 5), _x(2, 6, 3, 5))),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (_x(19), _x(5, 7), _x(7, 19))),
    "addmv": (lambda c, a, b: torch.addmv(c, a, b), (_x(5), _x(5, 7), _x(7))),
    "addcmul": (lambda c, a, b: torch.addcmul(c, a, b, value=0.3), (_x(7), _x(*M), _x(*M))),
    "sum_of_products": (lambda a, b: a @ b + a[:, :3] @ b[:3] + (a * 2) @ b, (_x(5, 7), _x(7, 19))),
    "cat": (lambda a, b: torch.cat([a, b * 2, a[:1]], 0).T.contiguous(), (_x(*M), _x(3, 7))),
    "stack": (lambda a, b: torch.stack([a, b, a + b], 1), (_x(*M), _x(*M))),
    "slices": (lambda a: a[1:4, ::2] * a[2:5, 1::2][:, :1] + a[:3, 3:7], (_x(5, 8),)),
    "chunks": (lambda a: torch.cat([c.tanh() for c in (a * 2).chunk(4, -1)], 0), (_x(5, 8),)),
    "in_place": (lambda a: _in_place(a), (_x(*M),)),
    "flip": (lambda a: a.flip(0) + a.flip((0, 1)), (_x(*M),)),
    "roll": (lambda a: a.roll((1, -2), (0, 1)), (_x(*M),)),
    "repeat": (lambda a: a.repeat(2, 3) + a.repeat(2, 1, 1)[0].repeat(2, 3), (_x(*M),)),
    "repeat_interleave": (lambda a: a.repeat_interleave(3, 0), (_x(*M),)),
    "pad": (lambda a: F.pad(a, (1, 2, -1, 3)) + F.pad(a, (1, 2, -1, 3), value=1.5), (_x(*M),)),
    "triangles": (lambda a: a.triu(1) + a.tril(-1), (_x(5, 5),)),
    "permuted": (lambda a: (a.permute(2, 0, 1).reshape(7, 15) * 2).T.contiguous(), (_x(3, 5, 7),)),
    "expanded": (lambda a: a[:, None].expand(7, 3).reshape(21).clone(), (_x(7),)),
    "full_like": (lambda a: torch.full_like(a, 2.5) + torch.zeros_like(a) + torch.ones_like(a), (_x(*M),)),
    "diagonal": (
        lambda a: torch.diag_embed(a) + torch.diagonal(torch.diag_embed(a), dim1=-2, dim2=-1).sum(),
        (_x(7),),
    ),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), (_x(1, 8, 3, 3),)),
    "gather": (lambda a, i: a.gather(1, i), (_x(*M), _ids(7, 5, 3))),
    "index_select": (lambda a, i: a.index_select(0, i) + a.index_select(0, i), (_x(*M), _ids(5, 4))),
    "embedding": (lambda w, i: F.embedding(i, w), (_x(9, 6), _ids(9, 4, 3))),
    "index": (lambda a, i: a[i] + a[i - 5], (_x(*M), _ids(5, 4))),
    "index_columns": (lambda a, i: a[:, i], (_x(*M), _ids(7, 4))),
    "index_pairs": (lambda a, i, j: a[i, j - 7], (_x(*M), _ids(5, 4), _ids(7, 4))),
    "index_outer": (lambda a, i, j: a[i[:, None], j], (_x(*M), _ids(5, 4), _ids(7, 3))),
    "index_mask": (lambda a: a[torch.tensor([True, False, True, True, False])], (_x(*M),)),
    "scatter_add": (lambda a, i, v: a.scatter_add(1, i, v), (_x(*M), _ids(7, 5, 3), _x(5, 3))),
    "scatter": (lambda a, v: a.scatter(1, torch.tensor([[0, 2], [1, 3]]), v), (_x(*M), _x(2, 2))),
    "index_add": (lambda a, i, v: a.index_add(0, i, v, alpha=2), (_x(*M), _ids(5, 4), _x(4, 7))),
    "index_put": (lambda a, i, v: a.index_put((i,), v, accumulate=True), (_x(*M), _ids(5, 4), _x(4, 7))),
    "cross_entropy": (lambda a, i: F.cross_entropy(a, i), (_x(*M), _ids(7, 5))),
    "nll_weighted": (
        lambda a, i, w: F.cross_entropy(a, i, w, label_smoothing=0.1),
        (_x(*M), _ids(7, 5), _positive(7)),
    ),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=2, dilation=2), (_x(2, 4, 9), _x(6, 4, 3), _x(6))),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (_x(2, 3, 7, 8), _x(5, 3, 3, 3))),
    "conv2d_groups": (lambda x, w: F.conv2d(x, w, groups=2, padding=1), (_x(2, 4, 5, 5), _x(6, 2, 3, 3))),
    "conv3d": (lambda x, w: F.conv3d(x, w, padding=1), (_x(2, 2, 4, 4, 4), _x(3, 2, 2, 2, 2))),
    "conv_transpose": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        (_x(2, 4, 4, 4), _x(4, 3, 3, 3), _x(3)),
    ),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), (_x(2, 3, 7, 8),)),
    "max_pool_ceil": (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), (_x(2, 3, 7, 7),)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (_x(2, 3, 8),)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (_x(2, 3, 7, 8),)),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 1), (_x(2, 3, 6, 8),)),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), (_x(2, 3, 4, 5),)),
    "upsample_bilinear": (lambda x: F.interpolate(x, size=(7, 9), mode="bilinear"), (_x(2, 3, 4, 5),)),
    "replicated": (
        lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate") + F.pad(x, (1, 2, 2, 1), mode="reflect"),
        (_x(2, 3, 4, 5),),
    ),
    "replicated_lines": (
        lambda x: F.pad(x, (1, 2), mode="replicate") + F.pad(x, (1, 2), mode="reflect"),
        (_x(2, 3, 5),),
    ),
    "replicated_volumes": (
        lambda x: (
            F.pad(x, (1, 0, 1, 1, 0, 1), mode="replicate") + F.pad(x, (1, 0, 1, 1, 0, 1), mode="reflect")
        ),
        (_x(1, 2, 3, 3, 3),),
    ),
    "sign": (lambda a: a.sign() * a, (_x(*M),)),
    "var_mean": (
        lambda a: torch.var_mean(a, 1)[0] + torch.var_mean(a, (1,), keepdim=True)[1][:, 0],
        (_x(*M),),
    ),
    "slice_scatter": (
        lambda a, b: a.slice_scatter(b, 1, 2, 6, 2).select_scatter(b[0, 0] + b[:, 0], 1, 6),
        (_x(*M), _x(5, 2)),
    ),
    "index_copy": (lambda a, b: a.index_copy(0, torch.tensor([3, 1]), b), (_x(*M), _x(2, 7))),
    "bilinear": (lambda a, b, w: F.bilinear(a, b, w), (_x(5, 3), _x(5, 4), _x(6, 3, 4))),
    "prod": (lambda a: a.prod(1) + a[:, :3].prod(1) + a[:2].prod(), (_x(*M),)),
    "unfold": (lambda x: F.unfold(x, 2), (_x(2, 3, 4, 5),)),
}


def _in_place(a: Tensor) -> Tensor:
    b = torch.zeros(5, 7, dtype=a.dtype)
    b[1:3] = a[2:4] * 2
    b[:, 0] += a[:, 1]
    b.mul_(3).add_(a)
    c = b.clone()
    c[0].zero_()
    c[1].fill_(2)
    return b + c


def _tensors(name: str, tasks: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    makers = CASES[name][1]
    drawn = [torch.stack([make(generator) for _ in range(tasks)]) for make in makers]
    return [t.to(dtype) if t.is_floating_point() else t for t in drawn]


@pytest.mark.parametrize("name", CASES)
def test_matches_pytorch(name: str) -> None:
    function, tensors = CASES[name][0], _tensors(name, 3, torch.float64)
    expected = torch.stack([function(*task) for task in zip(*tensors, strict=True)]).double()
    traced = Traced(function, *(t[0] for t in tensors))
    assert expected.isfinite().all()
    _check(traced.interpreted(*(t[1] for t in tensors)), expected[1])
    for lanes in (False, True):
        _check(traced.by_machine(*tensors, lanes=lanes), expected)


@pytest.mark.parametrize("name", ["tanh", "mm", "softmax", "conv2d", "gather", "max_pool", "sum"])
def test_matches_pytorch_in_float32(name: str) -> None:
    function, tensors = CASES[name][0], _tensors(name, 3, torch.float32)
    expected = torch.stack([function(*task) for task in zip(*tensors, strict=True)])
    traced = Traced(function, *(t[0] for t in tensors))
    for lanes in (False, True):
        found = traced.by_machine(*tensors, lanes=lanes)
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def _check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 1e-13 * (1 + float(expected.norm()))


def test_every_operator_of_the_table_is_run_by_a_case_or_a_derivative() -> None:
    """Each lowering is reached by a function above, by its gradient, or by that one's gradient."""
    seen: set[str] = set()
    for name, (function, _) in CASES.items():
        tensors = [t[0] for t in _tensors(name, 1, torch.float64)]
        for derivatives in (0, 2) if name != "nll_weighted" else (0,):  # class weights have no gradient
            seen |= _operators(function, tensors, derivatives)
    unseen = {lowering for name, lowering in OPERATORS.items()} - {
        OPERATORS[name] for name in seen & OPERATORS.keys()
    }
    assert {lowering.__name__ for lowering in unseen} == set()


def _operators(function: Callable[..., Tensor], tensors: list[Tensor], derivatives: int) -> set[str]:
    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(name_of(func))
            return func(*args, **(kwargs or {}))

    leaves = [t.clone().requires_grad_() if t.is_floating_point() and derivatives else t for t in tensors]
    with Names():
        value = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for _ in range(derivatives):
            if not value.requires_grad:
                break
            torch.autograd.grad(value.square().sum(), wanted, retain_graph=True, allow_unused=True)
            found = torch.autograd.grad(value.square().sum(), wanted, create_graph=True, allow_unused=True)
            value = torch.stack([g.sin().sum() for g in found if g is not None]).sum()
    return seen


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda a: a * a.sum().item(), "reads a value"),
    "bool": (lambda a: a if bool((a > 0).any()) else -a, "reads a value"),
    "random": (lambda a: a + torch.rand_like(a), "random"),
    "dropout": (lambda a: F.dropout(a, 0.5), "random"),
    "nonzero": (lambda a: a.nonzero().double(), "depends on values"),
    "masked_select": (lambda a: a[a > 0], "depends on values"),
    "outside": (lambda a: a + _OUTSIDE, "none of its arguments"),
    "sort": (lambda a: a.sort(-1).values, "no lowering"),
    "narrow": (lambda a: (100 * a).int().to(torch.uint8).double(), "conversion to torch.uint8"),
    "whole": (lambda a: torch.zeros(7, dtype=torch.int64).copy_(a[0]).double(), "into one of torch.int64"),
    "half": (lambda a: a.half().double(), "float16"),
    "complex": (lambda a: torch.view_as_real(a * 1j).sum(-1), "complex"),
}
_OUTSIDE = torch.ones(7, dtype=torch.float64)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cannot_be_a_program(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(UntraceableError, match=reason):
        Traced(function, _tensors("tanh", 1, torch.float64)[0][0]).program()


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize(
    "function",
    [lambda w, i: F.embedding(i, w), lambda w, i: torch.zeros(9, 6).double().index_add(0, i[0], w[:3])],
)
def test_an_index_out_of_range_is_an_error(function: Callable[..., Tensor], lanes: bool) -> None:
    tensors = _tensors("embedding", 3, torch.float64)
    traced = Traced(function, *(t[0] for t in tensors))
    for wrong in (9, -1, 1 << 40):
        ids = tensors[1].clone()
        ids[2, 0, 1] = wrong
        with pytest.raises(IndexError):
            traced.by_machine(tensors[0], ids, lanes=lanes)
