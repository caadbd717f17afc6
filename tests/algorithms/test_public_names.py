"""What an algorithm shows besides what every `nn.Module` has is what a user may touch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import copy

import pytest
import torch
from plain_autograd import episodes, network
from torch import nn

import fastmeta as fm

ALL = {
    *(
        "net",
        "loss",
        "inner_steps",
        "inner_lrs",
        "adapts",
        "update_rule",
        "inner_rule",
        "batch_stats",
        "backend",
    ),  # options
    *("who", "names", "adapt", "predict", "explain"),
}
MAML = {
    *(*ALL, "query_loss", "order", "step_weights", "support_step_weights"),
    *("memory", "memory_limit", "task_chunk", "on_divergence"),
}
OPTIONS = {"loss": "mse", "inner_lr": 0.1, "inner_steps": 2}


def _context() -> nn.Module:
    return nn.Sequential(fm.Context(2), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()


ALGORITHMS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "MAML": (lambda: fm.MAML(network(), **OPTIONS), MAML),
    "learned": (lambda: fm.MAML(network(), **OPTIONS, learn_lr="element"), MAML),
    "FOMAML": (lambda: fm.FOMAML(network(), **OPTIONS), MAML),
    "ANIL": (lambda: fm.ANIL(network(), **OPTIONS), MAML),
    "BOIL": (lambda: fm.BOIL(network(), **OPTIONS), MAML),
    "MetaSGD": (lambda: fm.MetaSGD(network(), **OPTIONS), MAML),
    "CAVIA": (lambda: fm.CAVIA(_context(), **OPTIONS), {*MAML, "context"}),
    "MAMLPlusPlus": (
        lambda: fm.MAMLPlusPlus(network(), **OPTIONS, multi_step_epochs=1, first_order_epochs=1),
        {*MAML, "extra", "set_epoch", "multi_step_epochs", "first_order_epochs"},
    ),
    "MetaCurvature": (lambda: fm.MetaCurvature(network(), **OPTIONS), {*MAML, "extra"}),
    "Reptile": (lambda: fm.Reptile(network(), **OPTIONS), {*ALL, "normalise", "on_divergence"}),
    "IMAML": (
        lambda: fm.IMAML(network(), **OPTIONS, proximal=2.0),
        {*ALL, "query_loss", "on_divergence", "inner_lr", "proximal", "cg_steps", "cg_tolerance"},
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_shows_only_what_a_user_may_touch(name: str) -> None:
    make, public = ALGORITHMS[name]
    module = make()
    plain = {*dir(nn.Module()), *vars(nn.Module())}
    shown = {entry for entry in dir(module) if entry not in plain and not entry.startswith("__")}
    assert shown == {*public, "_machinery"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_is_freed_as_soon_as_nobody_holds_it(name: str) -> None:
    module = ALGORITHMS[name][0]()
    gone = weakref.ref(module)
    gc.disable()  # no circle of references
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_a_loss_outlives_its_module() -> None:
    maml = fm.MAML(network(), **OPTIONS, learn_lr="scalar")
    leaves, episode = list(maml.parameters()), episodes()
    want = torch.autograd.grad(maml(*episode).loss, leaves)
    loss = maml(*episode).loss
    del maml
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_shallow_copy_has_options_of_its_own() -> None:
    maml, episode = fm.MAML(network(), **OPTIONS), episodes()
    other = copy(maml)
    other.inner_steps = 1
    first, second = maml(*episode).loss, other(*episode).loss
    assert not torch.equal(first, second)
    assert torch.equal(second, fm.MAML(maml.net, loss="mse", inner_lr=0.1, inner_steps=1)(*episode).loss)
    assert torch.equal(first, maml(*episode).loss)
