"""Networks that cannot be run with parameters of each task are refused, and two threads on one
network are right."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from plain_autograd import episodes, error, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmeta as fm
from fastmeta.network.swap import LOCK

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def _maml(net: nn.Module, backend: str, **options: Any) -> fm.MAML:
    return fm.MAML(net.double(), loss="mse", inner_lr=0.1, inner_steps=2, backend=backend, **options)


def _gradients(maml: fm.MAML, episode: list[Tensor]) -> Tensor:
    """Of the meta-loss, behind it, in one vector."""
    with LOCK:  # another thread may be running the same network
        parameters = list(maml.parameters())
    loss = maml(*episode).loss
    grads = torch.autograd.grad(loss, parameters)
    return torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in grads)])


class _Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        weight = self.linear.weight
        self.function = lambda x: x @ weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + self.linear.bias


@BACKENDS
def test_rejects_a_parameter_that_is_reached_through_a_closure(backend: str) -> None:
    with pytest.raises(
        ValueError, match=r"parameter 'linear\.weight' otherwise than by the attribute of its module"
    ):
        _maml(_Closure(), backend)(*episodes())


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight.detach().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.detach(), None


class _Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _ReadsInBackward.apply(torch.tanh(self.first(x)), self.second)


@BACKENDS
def test_rejects_a_backward_pass_that_reads_parameters(backend: str) -> None:
    with pytest.raises(ValueError, match="reads its parameters in the backward pass"):
        _maml(_Reads(), backend)(*episodes())


class _RecomputesByHooks(nn.Module):
    """Saves nothing, and computes it again when it is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: torch.tanh(self.linear(x))):
            return torch.tanh(y)


@BACKENDS
def test_rejects_saved_tensor_hooks_that_compute_anew(backend: str) -> None:
    with pytest.raises(ValueError, match="reads its parameters in the backward pass"):
        _maml(_RecomputesByHooks(), backend, order="first")(*episodes())


@BACKENDS
def test_rejects_wrapped_and_scripted_networks(backend: str) -> None:
    x, params = episodes()[0], dict(network().named_parameters())
    with pytest.raises(TypeError, match=r"TorchScript module, whose parameters cannot be exchanged"):
        fm.task_forward(torch.jit.script(network()), params, x, backend=backend)
    with pytest.raises(TypeError, match="it is a DataParallel, which makes replicas of its own"):
        _maml(nn.DataParallel(network()), backend)(*episodes())


@BACKENDS
def test_threads_on_one_network_are_right(backend: str) -> None:
    net = network()
    batches = [episodes(seed=seed) for seed in range(3)]
    want = [_gradients(_maml(copy.deepcopy(net), "reference"), batch) for batch in batches]
    maml, off = _maml(net, backend), []

    def work(at: int) -> None:
        off.extend(error(_gradients(maml, batches[at]), want[at]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(off) == 15
    assert max(off) < 1e-9


def test_checkpoints_outside_of_fastmeta_still_recompute() -> None:
    passes = 0

    def function(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return x.sin().cos()

    for reentrant in (False, True):
        passes = 0
        x = torch.ones(3, requires_grad=True)
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        assert passes == 2


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.passes = nn.Linear(2, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return torch.tanh(self.linear(x)) / self.passes


class _KeepsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.linear(x))
        return self.last


def test_what_a_network_carries_is_named_and_costs_no_other_network_its_vmap() -> None:
    assert any("carries `net.passes`" in line for line in _maml(_Counts(), "torch").explain(*episodes()).runs)
    normed = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    for net in (_KeepsLast(), normed):
        (line,) = _maml(net, "torch").explain(*episodes()).runs
        assert line.startswith("memory: store")


@pytest.mark.parametrize("options", [{"task_chunk": 2}, {"task_chunk": 1}, {"memory": "recompute"}], ids=str)
def test_state_matches_reference_in_chunks_and_in_any_memory_mode(options: dict[str, Any]) -> None:
    net = _Counts()
    want = _gradients(_maml(net, "reference"), episodes())
    assert error(_gradients(_maml(net, "torch", **options), episodes()), want) < 1e-9
