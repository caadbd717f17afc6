"""`inner_sgd` against plain autograd."""

from __future__ import annotations

import pytest
import torch
from plain_autograd import adapt, episodes, error, leaves, network
from torch import Tensor, nn

import fastmeta as fm

TOLERANCE = 1e-9


def _plain(
    params: dict[str, Tensor], x: Tensor, y: Tensor, rate: Tensor, weights: Tensor, steps: int
) -> dict[str, Tensor]:
    tasks = [
        adapt(network(), params, x[t], y[t], lambda name, k: rate, steps, weights[t])
        for t in range(x.shape[0])
    ]
    return {name: torch.stack([theta[name] for theta in tasks]) for name in params}


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_inner_sgd_matches_autograd(backend: str, steps: int) -> None:
    params, (x, y, _, _) = leaves(network()), episodes()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights = (torch.rand(3, 5, dtype=torch.float64) + 0.5).requires_grad_()
    x.requires_grad_()
    y.requires_grad_()
    want = _plain(params, x, y, rate, weights, steps)
    got = fm.inner_sgd(
        network(), params, x, y, loss="mse", lr=rate, steps=steps, weights=weights, backend=backend
    )
    assert list(got) == list(params)
    directions = {name: torch.randn_like(value) for name, value in want.items()}
    wanted = [*params.values(), rate, x, y, weights]
    scalars = [sum((tree[name] * directions[name]).sum() for name in params) for tree in (got, want)]
    for name in params:
        assert error(got[name].detach(), want[name].detach()) < TOLERANCE
    found = torch.autograd.grad(scalars[0], wanted)
    expected = torch.autograd.grad(scalars[1], wanted, allow_unused=True, materialize_grads=True)
    for g, w in zip(found, expected, strict=True):
        assert error(g, w) < TOLERANCE if w.any() else not g.any()


def test_rates_in_a_dict_get_their_gradients() -> None:
    net, (x, y, _, _) = network(), episodes()
    params = {name: value.detach() for name, value in net.named_parameters()}
    rates = {
        name: torch.full((1, 1, *value.shape), 0.1, dtype=torch.float64) for name, value in params.items()
    }
    rates = {name: rate.requires_grad_() if name != "2.bias" else 0.1 for name, rate in rates.items()}
    fm.inner_sgd(net, params, x, y, loss="mse", lr=rates, steps=2)["4.weight"].sum().backward()
    assert all(
        rate.grad.shape == rate.shape and rate.grad.any()
        for rate in rates.values()
        if isinstance(rate, Tensor) and rate is not rates["4.bias"]
    )


def test_using_one_parameter_leaves_the_cotangents_of_others_zero() -> None:
    net, (x, y, _, _) = network(), episodes()
    params = leaves(net)
    weights = torch.ones(3, 5, dtype=torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64)
    want = torch.autograd.grad(_plain(params, x, y, rate, weights, 2)["2.bias"].sum(), list(params.values()))
    got = torch.autograd.grad(
        fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2)["2.bias"].sum(), list(params.values())
    )
    for g, w in zip(got, want, strict=True):
        assert error(g, w) < TOLERANCE


def test_parameters_that_are_not_adapted_come_expanded() -> None:
    net, (x, y, _, _) = network(), episodes()
    adapted = fm.inner_sgd(net, dict(net.named_parameters()), x, y, loss="mse", lr=0.1, steps=2, adapt="head")
    for name, value in net.named_parameters():
        assert adapted[name].shape == (3, *value.shape)
        assert torch.equal(adapted[name], value.expand(3, *value.shape)) == (not name.startswith("4."))


def test_a_query_objective_of_ones_own_is_differentiable_through_both_operators() -> None:
    net, (x, y, query_x, query_y) = network(), episodes()
    params = leaves(net)
    adapted = fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2)
    ((fm.task_forward(net, adapted, query_x) - query_y) ** 2).mean().backward()
    want = fm.meta_gradient(net, leaves(net), (x, y), (query_x, query_y), loss="mse", lr=0.1, steps=2)
    for name, value in params.items():
        assert error(value.grad, want.grads[name]) < TOLERANCE


def test_momentum_and_weight_decay_match_torch_optim() -> None:
    net, (x, y, _, _) = network(), episodes()
    got = fm.inner_sgd(
        net, dict(net.named_parameters()), x, y, loss="mse", lr=0.1, steps=3, update_rule=fm.SGD(0.9, 0.05)
    )
    for t in range(3):
        alone = network()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(alone(x[t]), y[t]).backward()
            optimizer.step()
        for name, value in alone.named_parameters():
            assert error(got[name][t].detach(), value.detach()) < TOLERANCE


def test_dropout_is_the_same_forward_and_backward() -> None:
    net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1)).double()
    x, y, _, _ = episodes()
    names = [name for name, _ in net.named_parameters()]

    def adapted(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        params = dict(zip(names, values, strict=True))
        return tuple(fm.inner_sgd(net, params, x, y, loss="mse", lr=0.1, steps=2).values())

    assert torch.autograd.gradcheck(adapted, tuple(leaves(net).values()))
