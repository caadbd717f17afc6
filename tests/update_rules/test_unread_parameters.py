"""Parameters that no layer reads: rules may move them, and their gradients are their own."""

from __future__ import annotations

import pytest
import torch
from rule_checks import Idle, assert_matches_reference, assert_unread_parameters_match, number, random_sets

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
DECAY = {"sgd": lambda: fm.SGD(weight_decay=0.1), "adamw": lambda: fm.AdamW(weight_decay=number(0.1))}


@pytest.mark.parametrize("backend", ["cpu", "machine", "torch"])
def test_they_have_no_part_in_the_norm(backend: str) -> None:
    assert_unread_parameters_match(backend)


@pytest.mark.parametrize("backend", ["machine", "torch", "auto"])
@pytest.mark.parametrize("rule", DECAY)
def test_weight_decay_moves_them(rule: str, backend: str) -> None:
    made = Idle().double(), random_sets(2, 3, 2)
    assert_matches_reference(*made, DECAY[rule](), backend, lr=0.1, steps=2)


@pytest.mark.parametrize("rule", DECAY)
def test_the_engine_of_layers_refuses_to_decay_them(rule: str) -> None:
    net, data = Idle().double(), random_sets(2, 3, 2)
    params = dict(net.named_parameters())
    with pytest.raises(fm.BackendUnavailable, match="weight decay moves `idle`, which no layer reads"):
        fm.inner_sgd(
            net, params, *data[:2], loss="mse", lr=0.1, steps=2, update_rule=DECAY[rule](), backend="cpu"
        )


@pytest.mark.parametrize("backend", ["cpu", "machine", "torch", "reference"])
@pytest.mark.parametrize("rule", [fm.SGD(), fm.SGD(momentum=0.5), fm.Adam()], ids=["sgd", "momentum", "adam"])
def test_the_gradient_is_that_of_the_last_value(rule: fm.UpdateRule, backend: str) -> None:
    net, data = Idle().double(), random_sets(2, 3, 2)
    params = {name: value.detach().requires_grad_() for name, value in net.named_parameters()}
    adapted = fm.inner_sgd(
        net, params, *data[:2], loss="mse", lr=0.1, steps=2, update_rule=rule, backend=backend
    )
    weights = torch.arange(8.0, dtype=torch.float64).reshape(2, 4)
    (adapted["idle"] * weights).sum().backward()
    grad = params["idle"].grad
    assert grad is not None
    assert grad.tolist() == weights.sum(0).tolist()
