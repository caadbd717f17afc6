"""The examples run, and what they train gets better."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_autograd import MSE, error, leaves, network
from plain_autograd import episodes as _episodes
from torch import Tensor
from torch.func import functional_call

EXAMPLES = Path(__file__).parents[2] / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


def _example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize(
    ("name", "iterations"),
    [("sinusoid", 400), ("learned_rates", 400), ("features", 150), ("learned_l2", 150), ("distillation", 60)],
)
def test_example_lowers_its_loss(name: str, iterations: int) -> None:
    first, last = _example(name)["main"](iterations)
    assert last < 0.9 * first


@pytest.mark.parametrize("head", ["ridge", "logistic", "prototypes"])
def test_closed_form_heads_lower_their_loss(head: str) -> None:
    first, last = _example("closed_form_heads")["main"](head, 200)
    assert last < 0.9 * first


def test_reweighting_finds_the_wrong_labels() -> None:
    wrong, right = _example("reweighting")["main"](60)
    assert wrong < 0.7 * right


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inner_loop_with_an_l2_coefficient_matches_autograd(backend: str) -> None:
    net, (x, y, query_x, query_y) = network(), _episodes()
    params = leaves(net)
    l2 = {name: torch.full((), 0.1 + 0.1 * i, dtype=torch.float64) for i, name in enumerate(params)}
    l2 = {name: value.requires_grad_() for name, value in l2.items()}
    losses = []
    for t in range(3):
        theta = dict(params)
        for _ in range(2):
            loss = MSE(functional_call(net, theta, x[t]), y[t])
            loss = loss + sum(l2[name] / 2 * value.square().sum() for name, value in theta.items())
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: value - 0.1 * g for (name, value), g in zip(theta.items(), grads, strict=True)}
        losses.append(_query(net, theta, query_x[t], query_y[t]))
    want = torch.autograd.grad(torch.stack(losses).mean(), [*params.values(), *l2.values()])
    adapted = _example("learned_l2")["inner_loop"](net, l2, x, y, 0.1, 2, backend)
    loss = torch.stack(
        [_query(net, {n: v[t] for n, v in adapted.items()}, query_x[t], query_y[t]) for t in range(3)]
    )
    got = torch.autograd.grad(loss.mean(), [*net.parameters(), *l2.values()])
    assert all(error(g, w) < 1e-9 for g, w in zip(got, want, strict=True))


def _query(net: torch.nn.Module, theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return MSE(functional_call(net, theta, x), y)
