"""`task_gradient` against plain autograd, and update rules made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_autograd import episodes, error, leaves, network
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

TOLERANCE = 1e-9
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def _plain(
    net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Gradients [T, *shape] of a weighted mean square, with their graph; a parameter is [*shape] or
    [T, *shape]."""
    shapes = {name: value.shape for name, value in net.named_parameters()}
    found = []
    for t in range(len(x)):
        own = {name: value if value.shape == shapes[name] else value[t] for name, value in params.items()}
        loss = (weights[t] * (functional_call(net, own, x[t]) - y[t]).square().mean(-1)).mean()
        found.append(torch.autograd.grad(loss, list(own.values()), create_graph=True))
    return {name: torch.stack(grads) for name, grads in zip(params, zip(*found, strict=True), strict=True)}


@BACKENDS
@pytest.mark.parametrize("per_task", [(), ("0.weight", "4.bias")], ids=["shared", "some-per-task"])
def test_task_gradient_matches_autograd_in_value_and_derivative(
    per_task: tuple[str, ...], backend: str
) -> None:
    net, params, (x, y, _, _) = network(), leaves(network()), episodes()
    for name in per_task:
        own = params[name].detach() * (1 + 0.1 * torch.randn(3, *params[name].shape, dtype=torch.float64))
        params[name] = own.requires_grad_()
    weights = torch.rand(3, 5, dtype=torch.float64) + 0.5
    wanted = [*params.values(), x.requires_grad_(), y.requires_grad_(), weights.requires_grad_()]
    want = _plain(net, params, x, y, weights)
    got = fm.task_gradient(net, params, x, y, loss="mse", weights=weights, backend=backend)
    assert list(got) == list(params)
    directions = {name: torch.randn_like(value) for name, value in want.items()}
    for name, value in want.items():
        assert error(got[name].detach(), value.detach()) < TOLERANCE
    found, expected = (
        torch.autograd.grad(sum((directions[name] * tree[name]).sum() for name in params), wanted)
        for tree in (got, want)
    )
    for g, w in zip(found, expected, strict=True):
        assert error(g, w) < TOLERANCE


@BACKENDS
def test_a_small_hessian_does_not_drown_in_its_direction(backend: str) -> None:
    """float32: the error is that of a Hessian-vector product, not eps times the direction."""
    net, single = network(), network(dtype=torch.float32)
    x, y = (1e-2 * tensor for tensor in episodes()[:2])
    params = {name: 1e-1 * value.detach() for name, value in net.named_parameters()}
    found = []
    for module, dtype in ((net, torch.float64), (single, torch.float32)):
        leaf = {name: value.to(dtype).requires_grad_() for name, value in params.items()}
        options: dict[str, Any] = {"loss": "mse", "backend": backend, "adapt": "0.*"}
        g = fm.task_gradient(module, leaf, x.to(dtype), y.to(dtype), **options)
        (h,) = torch.autograd.grad(g["0.weight"].sum(), leaf["0.weight"])
        found.append((g["0.weight"].detach().double(), h.double()))
    (g, h), (g32, h32) = found
    assert float(h.abs().max()) < 1e-8  # far below eps times the direction, which is one
    assert error(g32, g) < 1e-5
    assert error(h32, h) < 1e-5


@BACKENDS
def test_a_chain_of_steps_is_the_inner_loop(backend: str) -> None:
    net, (x, y, _, _) = network(), episodes()
    found = []
    for chained in (True, False):
        params = leaves(net)
        theta = dict(params)
        if chained:
            for _ in range(3):
                g = fm.task_gradient(net, theta, x, y, loss="mse", backend=backend, adapt=["*.weight"])
                theta = {name: value - 0.1 * g[name] if name in g else value for name, value in theta.items()}
        else:
            theta = fm.inner_sgd(
                net, params, x, y, loss="mse", lr=0.1, steps=3, adapt="*.weight", backend=backend
            )
        sum(value.sin().sum(-1).mean() for value in theta.values()).backward()
        found.append([value.grad for value in params.values()])
    assert all(error(got, want) < TOLERANCE for got, want in zip(*found, strict=True))


def test_rejects() -> None:
    net, (x, y, _, _) = network(), episodes()
    params = dict(net.named_parameters())
    for arguments, options, message in (
        ((params, x[0], y), {}, r"task_gradient: `y`|task_gradient: `x`"),
        ((params, x, y[:, :2]), {}, r"task_gradient: `y` must be \[T, N, ...\]"),
        ((params, x, y), {"weights": torch.ones(3)}, r"task_gradient: `weights` must be"),
        ((params, x, y), {"adapt": "9.*"}, r"task_gradient: `adapt`: the network has no parameter '9"),
        (({}, x, y), {}, r"task_gradient: `params` must have every parameter"),
        ((3, x, y), {}, r"task_gradient: `params` must be a dict"),
        (
            ({n: p.half() for n, p in params.items()}, x.half(), y.half()),
            {},
            r"the range of float32, got torch.float16",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fm.task_gradient(net, *arguments, loss="mse", **options)
