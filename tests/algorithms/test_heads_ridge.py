"""`ridge` against least squares of one task at a time."""

from __future__ import annotations

import pytest
import torch
from head_features import F64, SHAPES, C, T, features
from plain_autograd import error
from torch import Tensor
from torch.nn import functional as F

from fastmeta.heads import Ridge, ridge

TOLERANCE = 1e-9


def _plain(
    x: Tensor, y: Tensor, q: Tensor, w: Tensor, penalty: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """The rows sqrt(w) x and sqrt(penalty) 1 by least squares; y are targets [T, N, O]."""
    rows = []
    for task in range(len(x)):
        root = w[task, :, None].sqrt()
        left = torch.cat([root * x[task], penalty.sqrt() * torch.eye(x.shape[2], dtype=F64)])
        right = torch.cat([root * y[task], torch.zeros(x.shape[2], y.shape[2], dtype=F64)])
        rows.append(scale * q[task] @ torch.linalg.lstsq(left, right).solution + shift)
    return torch.stack(rows)


@SHAPES
@pytest.mark.parametrize("sort", ["classes", "targets"])
def test_ridge_matches_reference(shape: tuple[int, int, int, int], sort: str) -> None:
    x, y, q = features(*shape)
    targets = F.one_hot(y, C).double() if sort == "classes" else torch.randn(*shape[:2], 2, dtype=F64)
    w = torch.rand(shape[:2], dtype=F64) + 0.1
    factors = [torch.tensor(value, dtype=F64) for value in (0.3, 1.7, -0.2)]
    leaves = [value.requires_grad_() for value in (x, q, w, *factors)]
    if sort == "targets":
        leaves.append(targets.requires_grad_())
    penalty, scale, shift = factors
    got = ridge(
        x,
        y if sort == "classes" else targets,
        q,
        penalty=penalty,
        scale=scale,
        shift=shift,
        ways=C if sort == "classes" else None,
        support_weights=w,
    )
    want = _plain(x, targets, q, w, *factors)
    assert error(got.detach(), want.detach()) < TOLERANCE
    along = torch.randn_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, along) for out in (got, want)), strict=True):
        assert error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (2, 4, 2, 3)], ids=["N<D", "N>D"])
@pytest.mark.parametrize("left_out", [False, True])
def test_derivatives_match_finite_differences(shape: tuple[int, int, int, int], left_out: bool) -> None:
    x, _, q = features(*shape)
    targets, w = torch.randn(*shape[:2], 2, dtype=F64), torch.rand(shape[:2], dtype=F64) + 0.1
    penalty = torch.tensor([0.3, 0.9], dtype=F64)
    if left_out:  # a check of weights at zero would step below it
        w[0, 1] = 0
    inputs = [value.requires_grad_() for value in (x, q, targets, penalty)] + (
        [] if left_out else [w.requires_grad_()]
    )

    def head(x: Tensor, q: Tensor, y: Tensor, penalty: Tensor, weights: Tensor = w) -> Tensor:
        return ridge(x, y, q, penalty=penalty, support_weights=weights)

    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradgradcheck(head, inputs)


@pytest.mark.parametrize("width", [4, 13])
def test_the_gradient_of_a_weight_of_zero_is_the_limit(width: int) -> None:
    x, y, q = features(1, 7, 5, width)
    gradients = []
    for weight in (0.0, 1e-9):
        w = torch.ones(1, 7, dtype=F64)
        w[0, 2] = weight
        gradients += torch.autograd.grad(ridge(x, y, q, support_weights=w.requires_grad_()).square().sum(), w)
    assert float(gradients[0][0, 2].abs()) > 0
    assert error(gradients[0], gradients[1]) < 1e-6


@pytest.mark.parametrize("width", [3, 13])
def test_a_weight_of_zero_leaves_the_example_out(width: int) -> None:
    x, y, q = features(T, 7, 5, width)
    w = torch.ones(T, 7, dtype=F64)
    w[0, 4:] = 0
    got = ridge(x, y, q, ways=C, support_weights=w)
    assert error(got[:1], ridge(x[:1, :4], y[:1, :4], q[:1], ways=C)) < TOLERANCE
    assert error(got[1:], ridge(x[1:], y[1:], q[1:], ways=C)) < TOLERANCE


def test_module_learns_penalty_scale_and_shift() -> None:
    x, y, q = features(T, 7, 5, 13)
    head = Ridge(penalty=0.5, scale=2.0, shift=-1.0).double()
    got = head(x, y, q)
    assert (
        error(got.detach(), ridge(x, y, q, penalty=0.5, scale=2.0, shift=-1.0)) < 1e-6
    )  # log 0.5 was rounded
    got.square().sum().backward()
    assert all(value.grad is not None and float(value.grad.abs()) > 0 for value in head.parameters())


@pytest.mark.parametrize("width", [3, 13], ids=["N>D", "N<D"])
def test_rejects_a_singular_system(width: int) -> None:
    x, y, q = (value.float() if value.is_floating_point() else value for value in features(T, 7, 5, width))
    x[1, 1] = x[1, 0]  # the Gram matrix of the examples is singular, for N < D
    x[1, :, 1] = x[1, :, 0]  # and that of the features, for N > D
    with pytest.raises(
        RuntimeError, match=r"ridge: the systems of tasks \[1\] are singular in torch.float32"
    ):
        ridge(x, y, q, penalty=1e-9)
    w = torch.ones(T, 7)
    w[2, 3:] = 0  # an example left out makes nothing singular while N < D
    with pytest.raises(RuntimeError, match=r"tasks \[1\]"):
        ridge(x, y, q, penalty=1e-9, support_weights=w)
    assert torch.isfinite(ridge(x, y, q, penalty=1e-2)).all()


def test_rejects_bad_targets() -> None:
    x, y, q = features(T, 7, 5, 13)
    targets = torch.randn(T, 7, 2, dtype=F64)
    with pytest.raises(
        ValueError, match=r"ridge: `support_y` must be \[T, N, O\] with \(3, 7\) in front, got \(3, 7\)"
    ):
        ridge(x, targets[..., 0], q)
    with pytest.raises(ValueError, match="ridge: `ways` is for classes"):
        ridge(x, targets, q, ways=2)
    with pytest.raises(TypeError, match=r"ridge: `support_y` must be torch.float64"):
        ridge(x, targets.float(), q)
    with pytest.raises(ValueError, match="ridge: `support_y` must be finite, got nan"):
        ridge(x, targets * float("nan"), q)
    for name in ("scale", "shift"):
        with pytest.raises(ValueError, match=f"ridge: `{name}` must be finite"):
            ridge(x, y, q, **{name: float("inf")})
    for option, value, problem in (
        ("penalty", 0.0, "finite and positive"),
        ("penalty", float("inf"), "finite and positive"),
        ("penalty", "a", "a number"),
        ("scale", "a", "a number"),
        ("shift", float("nan"), "finite"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"Ridge: `{option}` must be {problem}"):
            Ridge(**{option: value})
