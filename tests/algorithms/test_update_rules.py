"""The update rules against torch.optim, and their adjoints against autograd through the unrolled
inner loop."""

import math

import pytest
import torch
from torch import Tensor

from fastmeta.update_rules import SGD

STEPS = 4
RULES = [SGD(), SGD(momentum=0.9), SGD(weight_decay=0.1), SGD(momentum=0.7, weight_decay=0.3)]
WHICH = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"mu{rule.momentum}-wd{rule.weight_decay}")


def error(out: Tensor, ref: Tensor) -> float:
    return float((out - ref).norm() / ref.norm())


def loss(theta: Tensor, x: Tensor) -> Tensor:
    """Neither quadratic nor separable."""
    return (theta.sin() * x).sum().square() + (theta**4).sum() / 4 + (theta[1:] * theta[:-1] * x[1:]).sum()


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """theta_0 [P], rates [K, P], x [P]."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(7, generator=g, dtype=torch.float64)
    rates = 0.02 + 0.05 * torch.rand(STEPS, 7, generator=g, dtype=torch.float64)
    return theta, rates, torch.randn(7, generator=g, dtype=torch.float64)


def gradient(theta: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    return torch.autograd.grad(loss(theta, x), theta, create_graph=create_graph)[0]


@WHICH
def test_update_matches_torch_optim(rule: SGD) -> None:
    theta, _, x = problem()
    parameter = torch.nn.Parameter(theta.clone())
    optimiser = torch.optim.SGD([parameter], lr=0.05, momentum=rule.momentum, weight_decay=rule.weight_decay)
    m = None
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss(parameter, x).backward()
        optimiser.step()
        theta, m = rule.update(theta, gradient(theta.requires_grad_(), x), m, 0.05)
        theta = theta.detach()
        assert error(theta, parameter.detach()) < 1e-14


def unrolled(rule: SGD, first_order: bool) -> list[Tensor]:
    """By autograd: gradients of J = sum_k s_k Q(theta_k) w.r.t. theta_0, rates and (second order)
    x."""
    theta, rates, x = (t.requires_grad_() for t in problem())
    theta_0, m, total = theta, None, torch.zeros(())
    for k in range(STEPS):
        total = total + (k + 1) * query_loss(theta)
        if first_order:
            g = gradient(theta.detach().requires_grad_(), x).detach()
        else:
            g = gradient(theta, x, create_graph=True)
        theta, m = rule.update(theta, g, m, rates[k])
    total = total + (STEPS + 1) * query_loss(theta)
    return list(torch.autograd.grad(total, [theta_0, rates] if first_order else [theta_0, rates, x]))


def by_recursion(rule: SGD, first_order: bool) -> list[Tensor]:
    """The same by the adjoint recursion, one Hessian-vector product a step."""
    theta, rates, x = problem()
    thetas, momenta, m = [theta], [], None
    for k in range(STEPS):
        theta, m = rule.update(theta, gradient(theta.requires_grad_(), x), m, rates[k])
        theta = theta.detach()
        thetas.append(theta)
        momenta.append(m.detach())
    lam, mbar = (STEPS + 1) * query_gradient(thetas[-1]), None
    rates_grad, x_grad = torch.empty_like(rates), torch.zeros_like(x)
    for k in reversed(range(STEPS)):
        rates_grad[k] = -lam * momenta[k]
        v = rule.direction(lam, mbar, rates[k])
        hv = None
        if not first_order:
            at, xs = thetas[k].clone().requires_grad_(), x.clone().requires_grad_()
            hv, xv = torch.autograd.grad(gradient(at, xs, create_graph=True), [at, xs], v)
            x_grad += xv
        lam, mbar = rule.update_adjoint(lam, hv, v)
        lam = lam + (k + 1) * query_gradient(thetas[k])
    return [lam, rates_grad] if first_order else [lam, rates_grad, x_grad]


def query_loss(theta: Tensor) -> Tensor:
    return (theta.cos() * theta).sum().square()


def query_gradient(theta: Tensor) -> Tensor:
    theta = theta.detach().clone().requires_grad_()
    return torch.autograd.grad(query_loss(theta), theta)[0]


@WHICH
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_adjoint_matches_unrolled_autograd(rule: SGD, first_order: bool) -> None:
    out, ref = by_recursion(rule, first_order), unrolled(rule, first_order)
    for name, a, b in zip(("theta", "rates", "x"), out, ref, strict=False):
        assert error(a, b) < 1e-9, name


@WHICH
def test_nothing_given_is_modified(rule: SGD) -> None:
    tensors = [torch.full((3,), value, dtype=torch.float64) for value in (1.0, 2.0, 3.0)]
    theta, g, m = tensors
    rule.update(theta, g, m, 0.1)
    v = rule.direction(theta, m, 0.1)
    rule.update_adjoint(theta, g, v)
    assert [t.unique().tolist() for t in tensors] == [[1.0], [2.0], [3.0]]


def test_rules_with_equal_fields_are_one_cache_key() -> None:
    assert {SGD(momentum=1), SGD(momentum=1.0), SGD(1.0, 0)} == {SGD(1.0)}
    assert SGD(0.5) != SGD(0.25)


@pytest.mark.parametrize("field", ["momentum", "weight_decay"])
def test_rejects_fields_out_of_range(field: str) -> None:
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"`{field}` must be finite and at least 0, got"):
            SGD(**{field: value})
    with pytest.raises(TypeError, match=f"`{field}` must be a number or a tensor, got str"):
        SGD(**{field: "0.1"})
