"""Tensors that are no plain memory: right, or refused by name, for every argument, on every
backend, also later on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import fastmeta as fm

T, N, M = 2, 3, 4
BACKENDS = ("cpu", "torch", "reference", "cuda")


class Wrapper(Tensor):
    """As DTensor and its like are: numbers in another tensor, which only the class knows of."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Named(Tensor):
    """As users make them: an ordinary tensor with a class of its own."""


class NamedParameter(nn.Parameter):
    pass


def freed(tensor: Tensor) -> Tensor:
    """As FSDP leaves a parameter: its storage is empty."""
    own = tensor.detach().clone()
    own.untyped_storage().resize_(0)
    return own


def freed_view(tensor: Tensor) -> Tensor:
    """The same for a view behind others: its address is not null."""
    flat = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    own = flat[8:].view(tensor.shape)
    flat.untyped_storage().resize_(0)
    return own


def shrunk(tensor: Tensor) -> Tensor:
    own = tensor.detach().clone()
    own.untyped_storage().resize_(own.untyped_storage().nbytes() - own.itemsize)
    return own


def zero(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype)


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor.detach())


NO_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "freed view": freed_view,
    "shrunk": shrunk,
    "zero": zero,
    "fake": fake,
    "wrapper": lambda t: Wrapper(t.detach()),
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "functional": lambda t: torch._to_functional_tensor(t.detach()),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


def problem() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    given = {
        **dict(net.named_parameters()),
        "support_x": torch.randn(T, N, 2).double(),
        "support_y": torch.randn(T, N, 2).double(),
        "query_x": torch.randn(T, M, 2).double(),
        "query_y": torch.randn(T, M, 2).double(),
        "lr": torch.tensor(0.1).double(),
        "task_weights": torch.rand(T).double(),
        "support_weights": torch.rand(T, N).double(),
        "query_weights": torch.rand(T, M).double(),
    }
    return net, given


ARGUMENTS = tuple(problem()[1])


def solve(net: nn.Module, given: dict[str, Any], backend: str) -> fm.MetaGradient:
    names = [name for name, _ in net.named_parameters()]
    return fm.meta_gradient(
        net,
        {name: given[name] for name in names},
        (given["support_x"], given["support_y"]),
        (given["query_x"], given["query_y"]),
        loss="mse",
        steps=2,
        wrt=("params", "lr", "support_x", "query_y"),
        backend=backend,
        **{name: given[name] for name in ("lr", "task_weights", "support_weights", "query_weights")},
    )


def tensors_of(result: fm.MetaGradient) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(result)) if leaf is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_rejects_tensors_without_memory(kind: str, backend: str) -> None:
    net, given = problem()
    for when in ("first", "later"):
        for name in ARGUMENTS:
            bad = {**given, name: NO_MEMORY[kind](given[name])}
            with pytest.raises((TypeError, ValueError), match=re.escape(name)) as caught:
                solve(net, bad, backend)
            assert "meta_gradient: `" in str(caught.value), when
        solve(net, given, backend)  # and everything is cached


@pytest.mark.parametrize("backend", BACKENDS)
def test_notices_storage_that_is_freed_between_calls(backend: str) -> None:
    for name in ARGUMENTS:
        net, given = problem()
        if name in dict(net.named_parameters()):
            given[name] = given[name].detach().clone()
        solve(net, given, backend)
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=re.escape(name)):
            solve(net, given, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_with_memory_match_reference(backend: str) -> None:
    net, given = problem()
    want = solve(net, given, "reference")
    for make in (
        lambda t: t.detach().as_subclass(Named),
        lambda t: NamedParameter(t.detach(), requires_grad=False),
    ):
        got = solve(net, {name: make(value) for name, value in given.items()}, backend)
        for ours, theirs in zip(tensors_of(got), tensors_of(want), strict=True):
            assert type(ours) is Tensor
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_subclasses_get_their_gradients() -> None:
    net, given = problem()
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    named = {name: p.as_subclass(Named) for name, p in params.items()}
    x, y = given["support_x"], given["support_y"]
    adapted = fm.inner_sgd(net, named, x, y, loss="mse", lr=0.1, steps=2)
    assert {type(value) for value in adapted.values()} == {Tensor}
    sum(value.square().sum() for value in adapted.values()).backward()
    got = {name: p.grad for name, p in params.items()}
    plain = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    sum(
        v.square().sum() for v in fm.inner_sgd(net, plain, x, y, loss="mse", lr=0.1, steps=2).values()
    ).backward()
    for name, p in plain.items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in NO_MEMORY if kind not in ("sparse",)])
def test_rejects_cotangents_without_memory(kind: str) -> None:
    net, given = problem()
    x = given["query_x"].clone().requires_grad_()
    for make in (NO_MEMORY[kind],):
        out = fm.task_forward(net, dict(net.named_parameters()), x)
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            torch.autograd.grad(out, x, make(torch.ones_like(out)))


@pytest.mark.parametrize("kind", ["freed", "freed view", "shrunk", "zero", "fake", "wrapper", "meta"])
def test_rejects_losses_and_buffers_without_memory(kind: str) -> None:
    make = NO_MEMORY[kind]
    with pytest.raises((TypeError, ValueError), match="`weight`"):
        fm.MAML(nn.Linear(2, 3), loss=nn.CrossEntropyLoss(make(torch.ones(3))), inner_lr=0.1, inner_steps=1)
    loss = nn.BCEWithLogitsLoss(pos_weight=make(torch.ones(3)))
    with pytest.raises((TypeError, ValueError), match="`pos_weight`"):
        fm.MAML(nn.Linear(2, 3), loss=loss, inner_lr=0.1, inner_steps=1)
    if kind in ("fake", "meta", "zero", "wrapper"):
        return
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    net[1].num_batches_tracked += 1
    x, y = torch.randn(T, N, 2).double(), torch.randn(T, N, 2).double()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1, batch_stats="running")
    maml(x, y, x, y)
    net[1].running_mean = make(net[1].running_mean)
    with pytest.raises(ValueError, match="running_mean"):
        maml(x, y, x, y)


def test_rejects_a_loss_weight_freed_later() -> None:
    weight = torch.ones(3, dtype=torch.float64)
    maml = fm.MAML(nn.Linear(2, 3).double(), loss=nn.CrossEntropyLoss(weight), inner_lr=0.1, inner_steps=1)
    x, y = torch.randn(T, N, 2).double(), torch.zeros(T, N, dtype=torch.int64)
    maml(x, y, x, y)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight"):
        maml(x, y, x, y)


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_rejects_adapted_parameters_without_memory(kind: str) -> None:
    net, given = problem()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=1)
    adapted = maml.adapt(given["support_x"], given["support_y"])
    for name in adapted:
        with pytest.raises((TypeError, ValueError), match=re.escape(name)):
            maml.predict({**adapted, name: NO_MEMORY[kind](adapted[name])}, given["query_x"])
    with pytest.raises((TypeError, ValueError), match="`x`"):
        maml.predict(adapted, NO_MEMORY[kind](given["query_x"]))


def test_negated_views_match_reference() -> None:
    net, given = problem()
    want = solve(net, given, "reference")
    for backend in BACKENDS:
        negated = {
            name: torch.complex(torch.zeros_like(value), -value).detach().conj().imag
            for name, value in given.items()
        }
        got = solve(net, negated, backend)
        for ours, theirs in zip(tensors_of(got), tensors_of(want), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
