"""`task_forward` against plain autograd."""

from __future__ import annotations

import pytest
import torch
from plain_autograd import episodes, error, leaves, network
from torch import nn
from torch.func import functional_call

import fastmeta as fm

TOLERANCE = 1e-9


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_task_forward_matches_autograd(backend: str) -> None:
    net, x = network(), episodes()[0].requires_grad_()
    shared = leaves(net)
    own = {
        name: (value.detach() * torch.rand(3, *value.shape)).requires_grad_()
        for name, value in shared.items()
    }
    params = {name: own[name] if index % 2 else shared[name] for index, name in enumerate(shared)}
    want = torch.stack(
        [
            functional_call(net, {n: p[t] if p is own[n] else p for n, p in params.items()}, (x[t],))
            for t in range(3)
        ]
    )
    got = fm.task_forward(net, params, x, backend=backend)
    assert error(got.detach(), want.detach()) < TOLERANCE
    direction = torch.randn_like(want)
    wanted = [*params.values(), x]
    for g, w in zip(
        torch.autograd.grad(got, wanted, direction), torch.autograd.grad(want, wanted, direction), strict=True
    ):
        assert error(g, w) < TOLERANCE


def test_task_forward_passes_gradcheck() -> None:
    net = network(width=4)
    params = leaves(net)
    names = list(params)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return fm.task_forward(net, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(forward, (episodes()[0].requires_grad_(), *params.values()))


def test_only_what_requires_grad_gets_one() -> None:
    net, x = network(), episodes()[0]
    params = dict(leaves(net))
    params["0.weight"] = params["0.weight"].detach()
    fm.task_forward(net, params, x).sum().backward()
    assert params["0.weight"].grad is None
    assert x.grad is None
    assert params["4.weight"].grad is not None


def test_without_gradients_there_is_no_graph() -> None:
    net, x = network(), episodes()[0]
    with torch.no_grad():
        assert not fm.task_forward(net, leaves(net), x).requires_grad
    plain = {name: value.detach() for name, value in net.named_parameters()}
    assert not fm.task_forward(net, plain, x).requires_grad


def test_an_input_modified_before_backward_raises() -> None:
    net, x = network(), episodes()[0]
    params = leaves(net)
    output = fm.task_forward(net, params, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_dropout_is_the_same_forward_and_backward() -> None:
    net = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 1, bias=False)).double()
    params, x = leaves(net), torch.ones(2, 4, 2, dtype=torch.float64)
    output = fm.task_forward(net, params, x)
    torch.rand(3)
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    # the output is linear in the last weight
    assert (
        error((params["2.weight"].grad * params["2.weight"]).sum().detach(), output.sum().detach())
        < TOLERANCE
    )
