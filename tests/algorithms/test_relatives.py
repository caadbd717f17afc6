"""FOMAML, ANIL, BOIL and Meta-SGD: what defines each, and a loop over tasks in plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_autograd import MSE, episodes, error, leaves, meta_losses, network
from torch import Tensor
from torch.func import functional_call

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 2
NAMES = [name for name, _ in network().named_parameters()]
HEAD = ["4.weight", "4.bias"]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def _make(algorithm: type[fm.MAML], **options: Any) -> fm.MAML:
    return algorithm(network(), **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


def _check(maml: fm.MAML, rate: Callable[[str, int], Tensor | float]) -> None:
    """Values and gradients of the network against the loop."""
    params = leaves(network())
    losses = meta_losses(network(), params, episodes(), rate, STEPS)
    losses.mean().backward()
    out = maml(*episodes())
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    for name, leaf in params.items():
        assert error(maml.net.get_parameter(name).grad, leaf.grad) < TOLERANCE


def _moved(maml: fm.MAML) -> list[str]:
    adapted = maml.adapt(*episodes()[:2])
    return [name for name in NAMES if not torch.equal(adapted[name][0], maml.net.get_parameter(name))]


@BACKENDS
def test_fomaml_takes_the_query_gradient_at_the_adapted_parameters(backend: str) -> None:
    maml, (x, y, query_x, query_y) = _make(fm.FOMAML, backend=backend), episodes()
    maml(x, y, query_x, query_y).loss.backward()
    adapted = {name: value.detach().requires_grad_() for name, value in maml.adapt(x, y).items()}
    task = range(len(x))
    losses = [
        MSE(functional_call(maml.net, {n: v[t] for n, v in adapted.items()}, query_x[t]), query_y[t])
        for t in task
    ]
    torch.stack(losses).mean().backward()
    for name in NAMES:
        assert error(maml.net.get_parameter(name).grad, adapted[name].grad.sum(0)) < TOLERANCE


@BACKENDS
def test_anil_adapts_the_head_alone(backend: str) -> None:
    maml = _make(fm.ANIL, backend=backend)
    assert _moved(maml) == HEAD
    _check(maml, lambda name, k: LR if name in HEAD else 0.0)


@BACKENDS
def test_boil_adapts_all_but_the_head(backend: str) -> None:
    maml = _make(fm.BOIL, backend=backend)
    assert _moved(maml) == NAMES[:4]
    _check(maml, lambda name, k: 0.0 if name in HEAD else LR)


@BACKENDS
def test_meta_sgd_learns_a_rate_for_every_weight(backend: str) -> None:
    maml = _make(fm.MetaSGD, backend=backend)
    with torch.no_grad():
        for rate in maml.inner_lrs.values():
            rate.copy_(0.2 * torch.rand(rate.shape, dtype=torch.float64) - 0.05)
    rates = {name: maml.inner_lrs[name.replace(".", "__")].detach()[0, 0].requires_grad_() for name in NAMES}
    assert all(rates[name].shape == maml.net.get_parameter(name).shape for name in NAMES)
    _check(maml, lambda name, k: rates[name])
    for name in NAMES:
        assert error(maml.inner_lrs[name.replace(".", "__")].grad[0, 0], rates[name].grad) < TOLERANCE


@pytest.mark.parametrize(
    ("algorithm", "option"),
    [(fm.FOMAML, "order"), (fm.ANIL, "adapt"), (fm.BOIL, "adapt"), (fm.MetaSGD, "learn_lr")],
    ids=["FOMAML", "ANIL", "BOIL", "MetaSGD"],
)
def test_rejects(algorithm: type[fm.MAML], option: str) -> None:
    name = algorithm.__name__
    assert _make(algorithm).explain(*episodes()).backend == "cpu"
    with pytest.raises(TypeError, match=f"{name}: `{option}` is no argument, {name} is MAML with {option}="):
        _make(algorithm, **{option: "x"})
    with pytest.raises(ValueError, match=f"{name}: `inner_lr` must be finite"):
        _make(algorithm, inner_lr=float("inf"))
    with pytest.raises(ValueError, match=f"{name}: `inner_steps` must be at least 0"):
        _make(algorithm, inner_steps=-1)
    with pytest.raises(TypeError, match=rf"{name}\.adapt: `y`"):
        _make(algorithm).adapt(episodes()[0], 3)
