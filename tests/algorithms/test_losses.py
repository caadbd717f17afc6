"""The losses against PyTorch's own: values, first and second derivatives, every option, with and
without weights."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn import functional as F

from fastmeta.losses import Loss, resolve

C, F64 = 5, torch.float64
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=torch.float64)
ROW = torch.tensor([0.3, 1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
# (id, module of a reduction, sort of target, shape of one output)
OPTIONS: list[tuple[str, Callable[..., nn.Module], str, tuple[int, ...]]] = [
    ("mse", nn.MSELoss, "real", (3,)),
    ("mse-scalar", nn.MSELoss, "real", ()),
    ("l1", nn.L1Loss, "real", (2, 3)),
    ("smooth_l1", partial(nn.SmoothL1Loss, beta=0.6), "real", (C,)),
    ("smooth_l1-beta0", partial(nn.SmoothL1Loss, beta=0.0), "real", (C,)),
    ("huber", partial(nn.HuberLoss, delta=0.7), "real", (C,)),
    ("bce", nn.BCEWithLogitsLoss, "probability", (C,)),
    (
        "bce-weights",
        partial(nn.BCEWithLogitsLoss, weight=ROW, pos_weight=CLASS_WEIGHTS),
        "probability",
        (2, C),
    ),
    ("bce-pos_weight", partial(nn.BCEWithLogitsLoss, pos_weight=ROW[:2, None]), "probability", (2, 3)),
    ("ce", nn.CrossEntropyLoss, "index", (C,)),
    ("ce-positions", partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS), "index", (C, 2, 3)),
    ("ce-ignore", partial(nn.CrossEntropyLoss, ignore_index=2), "index", (C,)),
    ("ce-smooth", partial(nn.CrossEntropyLoss, label_smoothing=0.2), "index", (C,)),
    (
        "ce-everything",
        partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS, label_smoothing=0.3, ignore_index=1),
        "index",
        (C, 4),
    ),
    ("ce-probabilities", nn.CrossEntropyLoss, "simplex", (C,)),
    (
        "ce-probabilities-everything",
        partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS, label_smoothing=0.3),
        "simplex",
        (C, 2),
    ),
]
EVERY = pytest.mark.parametrize(
    ("make", "sort", "shape"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS]
)
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum"])


def error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||; plain where the reference is zero."""
    norm = ref.norm()
    return float(((out - ref).norm() / (norm if norm > 0 else 1)).detach())


def batch(sort: str, lead: tuple[int, ...], shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """(output, target), float64."""
    g = torch.Generator().manual_seed(seed)
    output = 2 * torch.randn(*lead, *shape, generator=g, dtype=torch.float64)
    if sort == "real":
        return output, torch.randn(*lead, *shape, generator=g, dtype=torch.float64)
    if sort == "probability":
        return output, torch.rand(*lead, *shape, generator=g, dtype=torch.float64)
    if sort == "index":
        return output, torch.randint(0, C, (*lead, *shape[1:]), generator=g)
    return output, torch.randn(*lead, *shape, generator=g, dtype=torch.float64).softmax(len(lead))


def derivatives(f: Callable[[Tensor], Tensor], at: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient, Hessian-vector product) by autograd; zero where there is no second
    derivative."""
    at = at.clone().requires_grad_()
    value = f(at)
    (first,) = torch.autograd.grad(value, at, create_graph=True)
    v = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=at.dtype)
    second = torch.zeros_like(at)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first, at, v, allow_unused=True, materialize_grads=True)
    return value.detach(), first.detach(), second


@EVERY
@REDUCTION
@pytest.mark.parametrize("n", [1, 7])
def test_loss_matches_reference(
    make: Callable, sort: str, shape: tuple[int, ...], reduction: str, n: int
) -> None:
    module = make(reduction=reduction)
    loss = resolve(module)
    output, target = batch(sort, (n,), shape)
    assert loss.kind != "custom"
    ours = derivatives(lambda z: loss(z, target), output)
    for out, ref in zip(ours, derivatives(lambda z: module(z, target), output), strict=True):
        assert error(out, ref) < 1e-9
    if target.is_floating_point():
        ours = derivatives(lambda y: loss(output, y), target)
        for out, ref in zip(ours, derivatives(lambda y: module(output, y), target), strict=True):
            assert error(out, ref) < 1e-9


@EVERY
@REDUCTION
@pytest.mark.parametrize("weight_norm", ["count", "sum"])
def test_weighted_loss_matches_reference(
    make: Callable, sort: str, shape: tuple[int, ...], reduction: str, weight_norm: str
) -> None:
    n = 7
    output, target = batch(sort, (n,), shape)
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    value = resolve(make(reduction=reduction), weight_norm=weight_norm)(output, target, weights)
    # PyTorch's own loss of each example, and what that example adds to PyTorch's own denominator
    each = torch.stack([make(reduction="sum")(output[i : i + 1], target[i : i + 1]) for i in range(n)])
    means = torch.stack([make(reduction="mean")(output[i : i + 1], target[i : i + 1]) for i in range(n)])
    shares = torch.where(each == 0, torch.zeros_like(each), each / means)
    ref = (weights * each).sum()
    if reduction == "mean":
        ref = ref / (shares.sum() if weight_norm == "count" else (weights * shares).sum())
    assert error(value.detach(), ref.detach()) < 1e-9
    (out_grad,), (ref_grad,) = torch.autograd.grad(value, weights), torch.autograd.grad(ref, weights)
    assert error(out_grad, ref_grad) < 1e-9


@EVERY
@pytest.mark.parametrize("weight_norm", ["count", "sum"])
def test_derivatives_match_finite_differences(
    make: Callable, sort: str, shape: tuple[int, ...], weight_norm: str
) -> None:
    loss = resolve(make(), weight_norm=weight_norm)
    output, target = batch(sort, (2,), shape)
    inputs = [output.requires_grad_(), torch.tensor([0.4, 1.3], dtype=torch.float64).requires_grad_()]
    if target.is_floating_point():
        inputs.append(target.requires_grad_())

    def f(z: Tensor, w: Tensor, y: Tensor = target) -> Tensor:
        return loss(z, y, w)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@EVERY
def test_vmap_over_tasks_matches_loop(make: Callable, sort: str, shape: tuple[int, ...]) -> None:
    tasks, n = 4, 7
    loss = resolve(make(), weight_norm="sum")
    output, target = batch(sort, (tasks, n), shape)
    weights = torch.rand(tasks, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    v = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def hvp(z: Tensor, y: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, pull = vjp(grad(lambda z: loss(z, y, w)), z)
        return loss(z, y, w), first, pull(v)[0]

    every = vmap(hvp)(output, target, weights, v)
    for t in range(tasks):
        for out, ref in zip(every, hvp(output[t], target[t], weights[t], v[t]), strict=True):
            assert error(out[t], ref) < 1e-12


@pytest.mark.parametrize(
    "module", [nn.L1Loss(), nn.SmoothL1Loss(beta=0.5), nn.HuberLoss(delta=0.5), nn.MSELoss()]
)
def test_kinks_and_zero_match_reference(module: nn.Module) -> None:
    output = torch.tensor([[0.0, 0.5, -0.5, 0.25, torch.inf]], dtype=torch.float64)
    target = torch.zeros(1, 5, dtype=torch.float64)
    ours = derivatives(lambda z: resolve(module)(z, target), output)
    for out, ref in zip(ours, derivatives(lambda z: module(z, target), output), strict=True):
        assert torch.equal(out, ref)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@REDUCTION
def test_all_ignored_matches_reference(smoothing: float, reduction: str) -> None:
    module = nn.CrossEntropyLoss(label_smoothing=smoothing, reduction=reduction)
    output, target = torch.randn(3, C), torch.full((3,), -100)
    out, ref = resolve(module)(output, target), module(output, target)
    assert out.isnan() if reduction == "mean" else out == 0
    assert torch.allclose(out, ref, equal_nan=True)


def test_masked_logits_match_reference() -> None:
    output = torch.tensor([[0.3, -torch.inf, 1.0, 2.0, -0.5]], dtype=torch.float64)
    target = torch.tensor([2])
    ours = derivatives(lambda z: resolve("cross_entropy")(z, target), output)
    for out, ref in zip(ours, derivatives(lambda z: F.cross_entropy(z, target), output), strict=True):
        assert torch.isfinite(out).all()
        assert error(out, ref) < 1e-9


@pytest.mark.parametrize("scale", [30.0, 800.0])
def test_saturated_logits_match_reference(scale: float) -> None:
    for function, sort in ((F.binary_cross_entropy_with_logits, "probability"), (F.cross_entropy, "index")):
        output, target = batch(sort, (4,), (C,))
        ours = derivatives(partial(_swap, resolve(function), target), scale * output)
        for out, ref in zip(ours, derivatives(partial(_swap, function, target), scale * output), strict=True):
            assert error(out, ref) < 1e-9


def _swap(f: Callable[[Tensor, Tensor], Tensor], target: Tensor, output: Tensor) -> Tensor:
    return f(output, target)


def test_keys_tell_options_apart() -> None:
    modules = [make(reduction=r) for _, make, _, _ in OPTIONS for r in ("mean", "sum")]
    losses = [resolve(m, weight_norm=w) for m in modules for w in ("count", "sum")]
    distinct = {
        (
            loss.kind,
            loss.reduction,
            loss.weight_norm,
            loss.beta,
            loss.label_smoothing,
            loss.ignore_index,
            None if loss.weight is None else loss.weight.shape,
            None if loss.pos_weight is None else loss.pos_weight.shape,
        )
        for loss in losses
    }
    assert len({loss.key for loss in losses}) == len(distinct) > len(OPTIONS)


def test_class_weights_follow_dtype_of_output() -> None:
    output, target = batch("index", (7,), (C,))
    for dtype, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        loss = resolve(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.to(other)))
        out = loss(output.to(dtype), target)
        assert out.dtype == dtype
        assert error(out.double(), F.cross_entropy(output, target, CLASS_WEIGHTS)) < 1e-6


@EVERY
def test_accepts_targets_that_fit(make: Callable, sort: str, shape: tuple[int, ...]) -> None:
    loss = resolve(make())
    _, target = batch(sort, (4, 7), shape)
    loss.check_target("`y`", target, (4, 7), shape, F64)
    loss.check_values("`y`", target, C)
    assert loss.needs_class_indices(target) == (sort == "index")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS], ids=["plain", "weighted"])
def test_closed_form_of_cross_entropy_matches_reference(smoothing: float, weight: Tensor | None) -> None:
    """The formulas of docs/losses.md, which the kernels use."""
    n = 7
    loss = Loss("cross_entropy", weight=weight, label_smoothing=smoothing)
    z, y = batch("simplex", (n,), (C,))
    w, rz = torch.rand(n, 1, dtype=F64), torch.randn(n, C, dtype=F64)
    classes = torch.ones(C, dtype=F64) if weight is None else weight
    q = classes * ((1 - smoothing) * y + smoothing / C)
    p = z.softmax(1)
    centred = rz - (p * rz).sum(1, keepdim=True)
    total = q.sum(1, keepdim=True)
    y.requires_grad_()
    z.requires_grad_()
    dz, dy = torch.autograd.grad(loss(z, y, w[:, 0]), [z, y], create_graph=True)
    r_dz, r_dy = torch.autograd.grad(dz, [z, y], rz)
    assert error((p * total - q) * w / n, dz) < 1e-9
    assert error(p * centred * total * w / n, r_dz) < 1e-9
    assert error(-(1 - smoothing) * classes * p.log() * w / n, dy) < 1e-9
    assert error(-(1 - smoothing) * classes * centred * w / n, r_dy) < 1e-9


def test_closed_form_of_bce_matches_reference() -> None:
    """The formulas of docs/losses.md, which the kernels use."""
    z, y = (t.requires_grad_() for t in batch("probability", (7,), (C,)))
    v = torch.randn(7, C, dtype=F64)
    loss = resolve(nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS, reduction="sum"))
    dz, dy = torch.autograd.grad(loss(z, y), [z, y], create_graph=True)
    zz, zy = torch.autograd.grad(dz, [z, y], v)
    q, r, s = CLASS_WEIGHTS, torch.sigmoid(-z), F.softplus(-z)
    a = 1 + (q - 1) * y
    assert error(1 - y - a * r, dz) < 1e-9
    assert error(a * r * (1 - r) * v, zz) < 1e-9
    assert error(-z + (q - 1) * s, dy) < 1e-9
    assert error((-1 - (q - 1) * r) * v, zy) < 1e-9


def test_rejects_a_module_whose_parameters_have_no_shape_yet() -> None:
    with pytest.raises(ValueError, match="loss must be initialised, 'weight' has no shape yet"):
        resolve(nn.LazyLinear(3))
