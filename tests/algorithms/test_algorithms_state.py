"""Checkpoints, copies and moves of every algorithm."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_autograd import episodes
from torch import Tensor, nn

import fastmeta as fm

COMMON: dict[str, Any] = {"loss": "mse", "inner_lr": 0.1, "inner_steps": 2}
ALGORITHMS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "MAML": (fm.MAML, {"learn_lr": "scalar", "update_rule": fm.SGD(0.5, 0.1)}),
    "MAML-patterns": (
        fm.MAML,
        {"inner_lr": {"*.weight": torch.tensor(0.1).double(), "*": 0.2}, "adapt": ["[25].*"]},
    ),
    "MAML-predicate": (fm.MAML, {"adapt": lambda name, parameter: parameter.dim() == 2}),
    "FOMAML": (fm.FOMAML, {}),
    "ANIL": (fm.ANIL, {}),
    "BOIL": (fm.BOIL, {}),
    "MetaSGD": (fm.MetaSGD, {"lr_per_step": True}),
    "MAMLPlusPlus": (fm.MAMLPlusPlus, {"multi_step_epochs": 3, "first_order_epochs": 0}),
    "MetaCurvature": (fm.MetaCurvature, {"learn_lr": "tensor"}),
    "CAVIA": (fm.CAVIA, {}),
    "Reptile": (fm.Reptile, {}),
    "IMAML": (fm.IMAML, {"proximal": 2.0, "cg_steps": 40}),
}
EVERY = pytest.mark.parametrize("name", ALGORITHMS)


def _make(name: str, seed: int = 0) -> nn.Module:
    algorithm, options = ALGORITHMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = [fm.Context(3), nn.Linear(5, 7)] if name == "CAVIA" else [nn.Identity(), nn.Linear(2, 7)]
        net = nn.Sequential(*first, nn.LayerNorm(7), nn.Tanh(), nn.Identity(), nn.Linear(7, 1)).double()
        module = algorithm(net, **{**COMMON, **options})
        for value in module.parameters():
            if value.requires_grad:  # no rate, norm or matrix is left as it starts
                value.data += 0.02 * torch.rand_like(value)
    return module


def _call(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    episode = [tensor.to(dtype) for tensor in episodes()]
    return module(*(episode[:2] if isinstance(module, fm.Reptile) else episode))


def _gradients(module: nn.Module) -> list[Tensor]:
    module.zero_grad()
    _call(module).loss.backward()
    return [value.grad for value in module.parameters() if value.requires_grad]


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@EVERY
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_the_same_and_independent(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = _make(name)
    want = _gradients(module)
    other = copied(module)
    got = _gradients(other)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1.0)
    assert all(torch.equal(g, w) for g, w in zip(_gradients(module), want, strict=True))


@EVERY
def test_a_checkpoint_restores_it(name: str) -> None:
    module, other = _make(name), _make(name, seed=5)
    assert not torch.equal(_call(other).loss, _call(module).loss)
    other.load_state_dict(module.state_dict())
    assert torch.equal(_call(other).loss, _call(module).loss)
    learned = {key for key, value in module.named_parameters()}
    assert learned == module.state_dict().keys()


@EVERY
def test_it_moves_to_another_dtype_and_back(name: str) -> None:
    module = _make(name)
    want = _call(module).loss
    single = _call(module.to(torch.float32), torch.float32).loss
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(want.item(), rel=1e-4)
    back = _call(module.to(torch.float64)).loss
    assert back.dtype == torch.float64
    assert back.item() == pytest.approx(want.item(), rel=1e-5)
