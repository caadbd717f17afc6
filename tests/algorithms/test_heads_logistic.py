"""`logistic` against a quasi-Newton fit of one task at a time, its gradients against the implicit
function theorem."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_features import F64, SHAPES, C, T, features
from plain_autograd import error
from torch import Tensor
from torch.nn import functional as F

from fastmeta.heads import Logistic, logistic

TOLERANCE = 1e-9


def _objective(x: Tensor, y: Tensor, w: Tensor, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """What W [D, C] minimises in one task."""
    return lambda W: (w * F.cross_entropy(x @ W, y, reduction="none")).sum() + penalty / 2 * W.square().sum()


def _fit(objective: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """W: a quasi-Newton fit, and Newton steps for the digits that its line search cannot see."""
    W = torch.zeros(width, C, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=1000, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(W)
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(objective(W), W)
        W = (W - _solved(objective, W, gradient)).detach().requires_grad_()
    return W


def _solved(objective: Callable[[Tensor], Tensor], W: Tensor, right: Tensor) -> Tensor:
    """The inverse of the objective's Hessian times `right`."""
    hessian = torch.autograd.functional.hessian(objective, W).reshape(W.numel(), W.numel())
    return torch.linalg.solve(hessian, right.reshape(-1)).reshape(W.shape)


def _implicit(
    objective: Callable[[Tensor], Tensor], W: Tensor, wanted: Tensor, inputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of <wanted, argmin> with respect to what the objective depends on."""
    adjoint = _solved(objective, W, wanted)
    (gradient,) = torch.autograd.grad(objective(W), W, create_graph=True)
    return list(torch.autograd.grad(gradient, inputs, -adjoint))


@SHAPES
def test_logistic_matches_reference(shape: tuple[int, int, int, int]) -> None:
    x, y, q = features(*shape)
    w = torch.rand(shape[:2], dtype=F64) + 0.1
    penalty = torch.linspace(0.3, 0.9, shape[0], dtype=F64)
    leaves = [value.requires_grad_() for value in (x, w, penalty)]
    got = logistic(x, y, q.requires_grad_(), penalty=penalty, ways=C, support_weights=w)
    along = torch.randn_like(got)
    *gradients, query_gradient = torch.autograd.grad(got, [*leaves, q], along)
    for task in range(shape[0]):
        inputs = [value[task].detach().requires_grad_() for value in leaves]
        objective = _objective(inputs[0], y[task], *inputs[1:])
        W = _fit(objective, shape[3])
        assert error(got[task].detach(), (q[task] @ W).detach()) < TOLERANCE
        assert error(query_gradient[task], along[task] @ W.detach().mT) < TOLERANCE
        wanted = _implicit(objective, W, q[task].detach().mT @ along[task], inputs)
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert error(ours[task], theirs) < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (2, 3, 2, 2)], ids=["N<D", "N>D"])
def test_derivatives_match_finite_differences(shape: tuple[int, int, int, int]) -> None:
    x, y, q = features(*shape)
    w, penalty = torch.rand(shape[:2], dtype=F64) + 0.1, torch.tensor([0.3, 0.9], dtype=F64)
    inputs = [value.requires_grad_() for value in (x, q, w, penalty)]

    def head(x: Tensor, q: Tensor, w: Tensor, penalty: Tensor) -> Tensor:
        return logistic(x, y, q, penalty=penalty, ways=C, support_weights=w)

    assert torch.autograd.gradcheck(head, inputs)
    assert torch.autograd.gradgradcheck(head, inputs)


@pytest.mark.parametrize("width", [3, 13])
def test_a_weight_of_zero_leaves_the_example_out(width: int) -> None:
    x, y, q = features(T, 7, 5, width)
    w = torch.ones(T, 7, dtype=F64)
    w[0, 4:] = 0
    w.requires_grad_()
    got = logistic(x, y, q, ways=C, support_weights=w)
    assert error(got[:1].detach(), logistic(x[:1, :4], y[:1, :4], q[:1], ways=C)) < TOLERANCE
    assert error(got[1:].detach(), logistic(x[1:], y[1:], q[1:], ways=C)) < TOLERANCE
    (gradient,) = torch.autograd.grad(got.square().sum(), w)
    assert torch.isfinite(gradient).all()
    assert float(gradient[0, 4:].abs().min()) > 0


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_hard_tasks_converge_in_float32(width: int, size: float) -> None:
    x, y, q = features(T, 30, 5, width)
    x[0, 1], y[0, 1] = x[0, 0], (y[0, 0] + 1) % C  # one example, two classes
    x = size * x.float()
    want = logistic(x.double(), y, q)
    assert error(logistic(x, y, q.float()), want) < 1e-3


def test_a_loose_tolerance_is_made_up_for_by_the_last_steps() -> None:
    x, y, q = features(T, 7, 5, 13)
    assert error(logistic(x, y, q, tolerance=1e-2), logistic(x, y, q, tolerance=1e-12)) < 1e-6


def test_a_task_does_not_depend_on_the_others() -> None:
    x, y, q = features(T, 7, 5, 13)
    x[1] *= 30
    alone = torch.cat([logistic(x[t : t + 1], y[t : t + 1], q[t : t + 1], ways=C) for t in range(T)])
    assert error(logistic(x, y, q, ways=C), alone) < 1e-13


def test_one_class_has_logits_of_zero() -> None:
    x, _, q = features(T, 7, 5, 13)
    assert not logistic(x, torch.zeros(T, 7, dtype=torch.int64), q).any()


def test_module_learns_its_penalty() -> None:
    x, y, q = features(T, 7, 5, 13)
    head = Logistic(penalty=0.5).double()
    got = head(x, y, q)
    assert error(got.detach(), logistic(x, y, q, penalty=0.5)) < 1e-6  # log 0.5 was rounded
    got.square().sum().backward()
    assert float(head.log_penalty.grad.abs()) > 0


def test_rejects_tasks_that_have_not_converged() -> None:
    x, y, q = features(T, 7, 5, 13)
    x[1] *= 30
    message = (
        r"logistic: tasks \[1\] have not converged in 6 iterations: their logits still change by \d\.\de"
    )
    with pytest.raises(RuntimeError, match=message):
        logistic(x, y, q, max_iterations=6)


def test_rejects_bad_options() -> None:
    episode = features(T, 7, 5, 13)
    with pytest.raises(ValueError, match="logistic: `max_iterations` must be positive, got 0"):
        logistic(*episode, max_iterations=0)
    for tolerance in (0.0, float("nan")):
        with pytest.raises(ValueError, match="logistic: `tolerance` must be finite and positive"):
            logistic(*episode, tolerance=tolerance)
    with pytest.raises(
        TypeError, match=r"logistic: `support_y` must be torch.int64 \(class indices\), got torch.float64"
    ):
        logistic(episode[0], episode[1].double(), episode[2])
    for option, value, problem in (
        ("penalty", -1.0, "finite and positive"),
        ("penalty", "a", "a number"),
        ("tolerance", "a", "a number"),
        ("max_iterations", 0, "positive"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"Logistic: `{option}` must be {problem}"):
            Logistic(**{option: value})
