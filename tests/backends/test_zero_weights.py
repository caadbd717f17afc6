"""Means by weights that are all zero: such a task has nothing to learn from, and counts for
nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_autograd import episodes, error, network
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends.cuda import compile as compiler
from fastmeta.losses import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
LR, STEPS, EMPTY = 0.1, 2, 1  # the task without weights
EMULATED = pytest.param(
    "cuda", marks=pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler")
)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu", EMULATED])
LOSSES = pytest.mark.parametrize("loss", ["mse", "cross_entropy"])


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")


def _case(loss: str, dtype: torch.dtype = F64) -> tuple[nn.Module, list[Tensor]]:
    """A network and three tasks."""
    x, y, query_x, query_y = episodes(dtype=dtype)
    if loss == "mse":
        return network(dtype=dtype), [x, y, query_x, query_y]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return net, [x, torch.randint(3, y.shape[:2]), query_x, torch.randint(3, query_y.shape[:2])]


def _call(
    loss: str, sets: list[Tensor], net: nn.Module, backend: str, weights: dict[str, Tensor], **options: Any
) -> Any:
    x, y, query_x, query_y = sets
    return fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (x, y),
        (query_x, query_y),
        loss=loss,
        lr=torch.tensor(LR, dtype=x.dtype),
        steps=STEPS,
        weight_norm="sum",
        backend=backend,
        wrt=("params", "lr", "support_x", "query_x", *weights),
        **weights,
        **options,
    )


def _weights(shape: torch.Size, dtype: torch.dtype = F64, empty: float = 0.0) -> Tensor:
    weights = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(5)) + 0.5
    weights[EMPTY] = empty
    return weights


@BACKENDS
@LOSSES
def test_an_empty_support_set_leaves_theta_as_it_is(loss: str, backend: str) -> None:
    net, sets = _case(loss)
    support = {"support_weights": _weights(sets[0].shape[:2])}
    out = _call(loss, sets, net, backend, support)
    one = [tensor[EMPTY : EMPTY + 1] for tensor in sets]
    params = dict(net.named_parameters())
    alone = fm.meta_gradient(net, params, (one[0], one[1]), (one[2], one[3]), loss=loss, lr=LR, steps=0)
    assert error(out.task_losses[EMPTY], alone.task_losses[0]) < 1e-12
    for found in (out.support_x, out.support_weights):
        assert torch.equal(found[EMPTY], torch.zeros_like(found[EMPTY]))
        assert found[0].norm() > 0
    others = [torch.cat([tensor[:EMPTY], tensor[EMPTY + 1 :]]) for tensor in sets]
    kept = _weights(sets[0].shape[:2])[[0, 2]]
    rest = _call(loss, others, net, backend, {"support_weights": kept})
    for name, found in out.grads.items():
        assert error(found, (2 * rest.grads[name] + alone.grads[name]) / 3) < 1e-9
    assert error(out.lr, rest.lr * 2 / 3) < 1e-9


@BACKENDS
@LOSSES
def test_an_empty_query_set_counts_for_nothing(loss: str, backend: str) -> None:
    net, sets = _case(loss)
    out = _call(
        loss, sets, net, backend, {"query_weights": _weights(sets[2].shape[:2])}, step_weights=(0.5, 0.0, 1.0)
    )
    assert out.task_losses[EMPTY] == 0
    for found in (out.support_x, out.query_x, out.query_weights):
        assert torch.equal(found[EMPTY], torch.zeros_like(found[EMPTY]))
    others = [torch.cat([tensor[:EMPTY], tensor[EMPTY + 1 :]]) for tensor in sets]
    kept = {"query_weights": _weights(sets[2].shape[:2])[[0, 2]]}
    rest = _call(loss, others, net, backend, kept, step_weights=(0.5, 0.0, 1.0))
    assert error(out.loss, rest.loss * 2 / 3) < 1e-12
    for name, found in out.grads.items():
        assert error(found, rest.grads[name] * 2 / 3) < 1e-9


@BACKENDS
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@LOSSES
def test_tiny_weights_count_as_their_ratios_say(loss: str, dtype: torch.dtype, backend: str) -> None:
    """Down to the smallest normal number, below which weights are zero."""
    net, sets = _case(loss, dtype)
    one = _weights(sets[0].shape[:2], dtype, 1.0).round()
    smallest = torch.finfo(dtype).tiny
    want = _call(loss, sets, net, "reference", {"support_weights": one})
    found = _call(loss, sets, net, backend, {"support_weights": one * smallest})
    tolerance = 1e-9 if dtype == F64 else 1e-5
    assert error(found.task_losses, want.task_losses) < tolerance
    for name, gradient in want.grads.items():
        assert error(found.grads[name], gradient) < tolerance
    nothing = _call(loss, sets, net, backend, {"support_weights": one * (smallest / 4)})
    assert torch.equal(nothing.support_weights, torch.zeros_like(one))
    assert torch.equal(nothing.lr, torch.zeros_like(nothing.lr))


@BACKENDS
@LOSSES
def test_weights_that_cancel_have_no_mean(loss: str, backend: str) -> None:
    """Division by a sum of zero: not finite, and so not silent; other tasks are what they are."""
    net, sets = _case(loss)
    weights = _weights(sets[2].shape[:2])
    weights[EMPTY] = torch.tensor([1, -1, 0, 0, 0, 0, 0])
    out = _call(loss, sets, net, backend, {"query_weights": weights})
    assert out.task_losses.isfinite().tolist() == [True, False, True]


@BACKENDS
def test_a_mean_over_ignored_classes_alone_is_nan(backend: str) -> None:
    """As in PyTorch, whatever weights that are not zero say; with weights that are, nothing was to
    count."""
    net, (x, y, query_x, query_y) = _case("cross_entropy")
    query_y[EMPTY] = -100
    for weights, isnan in ((torch.ones(3, 7, dtype=F64), True), (_weights(query_y.shape), False)):
        out = _call("cross_entropy", [x, y, query_x, query_y], net, backend, {"query_weights": weights})
        assert out.task_losses.isnan().tolist() == [False, isnan, False]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_class_weights_of_zero_are_as_in_pytorch(backend: str) -> None:
    net, (x, y, query_x, query_y) = _case("cross_entropy")
    query_y[EMPTY], query_y[0, 0] = 0, 1
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0], dtype=F64))
    params = dict(net.named_parameters())
    out = fm.meta_gradient(
        net, params, (x, y), (query_x, query_y), loss=loss, lr=LR, steps=0, backend=backend
    )
    want = torch.stack([loss(net(a), b) for a, b in zip(query_x, query_y, strict=True)])
    assert want.isnan().tolist() == [False, True, False]
    assert torch.allclose(out.task_losses, want, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_learned_weights_may_reach_zero(backend: str) -> None:
    """Reweighting, with weights that are clamped: those of one task end at zero, and nothing
    becomes NaN."""
    net, sets = _case("mse")
    raw = _weights(sets[0].shape[:2])
    raw[EMPTY] = -1
    raw.requires_grad_()
    maml = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS, weight_norm="sum", backend=backend)
    out = maml(*sets, support_weights=raw.clamp(min=0))
    out.loss.backward()
    assert torch.equal(raw.grad[EMPTY], torch.zeros(5, dtype=F64))
    assert raw.grad[0].norm() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())


@LOSSES
def test_derivatives_of_no_weights_are_zero_twice(loss: str) -> None:
    resolved = replace(resolve(loss), weight_norm="sum")
    _, (_, y, _, _) = _case(loss)
    z = torch.randn(5, 1 if loss == "mse" else 3, dtype=F64, requires_grad=True)
    weights = torch.zeros(5, dtype=F64, requires_grad=True)
    value = resolved(z, y[0], weights)
    assert value == 0
    first = torch.autograd.grad(value, [z, weights], create_graph=True)
    again = torch.autograd.grad(
        sum(g.sum() for g in first), [z, weights], materialize_grads=True, allow_unused=True
    )
    assert all(torch.equal(g, torch.zeros_like(g)) for g in (*first, *again))
