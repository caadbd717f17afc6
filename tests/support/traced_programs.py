"""The `inductor` backend without PyTorch's compiler, which takes some ten seconds a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends.inductor import compile as compiler


def run_as_traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have traced functions run operator by operator; gives the operators of each that is
    traced."""
    found: list[int] = []

    def as_it_is(graph: Any, example: Any) -> Callable[..., Any]:
        found.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(compiler, "_inductor", as_it_is)
    return found


class LinearNet(nn.Module):
    """A linear layer and what subclasses make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.double()


def data(tasks: int = 2) -> tuple[Tensor, Tensor]:
    """(x [T, 5, 3], y [T, 5, 2])."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tasks, 5, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return x, y


def gradient(net: nn.Module, backend: str, loss: Any = "mse") -> list[Tensor]:
    """Losses of the tasks, and every gradient of `meta_gradient`."""
    x, y = data()
    params = {name: value.detach() for name, value in net.named_parameters()}
    found = fm.meta_gradient(net, params, (x, y), (x, y), loss=loss, lr=0.1, steps=2, backend=backend)
    return [found.task_losses, *found.grads.values()]


def assert_right(net: nn.Module, loss: Any = "mse") -> None:
    """`gradient` is that of the reference."""
    pairs = zip(gradient(net, "inductor", loss), gradient(net, "reference", loss), strict=True)
    for found, expected in pairs:
        assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
