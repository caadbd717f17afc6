"""`torch.compile(fullgraph=True)` around a training step gives eager's bits."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from plain_autograd import episodes, network
from torch import Tensor, nn

import fastmeta as fm

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
LEARNED = [None, "scalar", "tensor", "element"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _maml(**options: object) -> fm.MAML:
    return fm.MAML(network(dtype=torch.float32), **{"loss": "mse", "inner_lr": 0.1, "inner_steps": 2, **options})


def _leaves(maml: fm.MAML, flat: bool) -> list[Tensor]:
    return [fm.flatten(maml)] if flat else list(maml.parameters())


def _eager(maml: fm.MAML, leaves: list[Tensor], episode: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = maml(*episode).loss
    loss.backward()
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return loss.detach(), grads


def _equal(leaves: list[Tensor], grads: list[Tensor]) -> bool:
    return all(leaf.grad is not None and torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, grads, strict=True))


@pytest.mark.parametrize("flat", [False, True], ids=["separate", "flat"])
@pytest.mark.parametrize("learn_lr", LEARNED)
def test_compiled_forward_matches_eager(learn_lr: str | None, flat: bool) -> None:
    maml, episode = _maml(learn_lr=learn_lr), episodes(dtype=torch.float32)
    leaves = _leaves(maml, flat)
    loss, grads = _eager(maml, leaves, episode)
    eager = maml(*episode)
    out = torch.compile(lambda *batch: maml(*batch), fullgraph=True)(*episode)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), loss)
    assert torch.equal(out.task_losses, eager.task_losses)
    assert torch.equal(out.output, eager.output)
    assert not out.task_losses.requires_grad
    assert not out.output.requires_grad
    assert _equal(leaves, grads)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace backward() itself"
)
@pytest.mark.parametrize("zero_grad", ["inside", "outside"])
@pytest.mark.parametrize("learn_lr", [None, "tensor"])
def test_compiled_step_with_backward_matches_eager(learn_lr: str | None, zero_grad: str) -> None:
    maml, episode = _maml(learn_lr=learn_lr), episodes(dtype=torch.float32)
    leaves = list(maml.parameters())
    loss, grads = _eager(maml, leaves, episode)

    def step(*batch: Tensor) -> Tensor:
        if zero_grad == "inside":
            maml.zero_grad()
        out = maml(*batch)
        out.loss.backward()
        return out.loss.detach()

    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for _ in range(2):
            maml.zero_grad()
            got = compiled(*episode)
            assert torch.equal(got, loss)
            assert _equal(leaves, grads)


def test_compiled_training_follows_eager() -> None:
    episode = episodes(dtype=torch.float32)
    eager, maml = _maml(), _maml()
    compiled = torch.compile(maml, fullgraph=True)
    for module, parameters in ((eager, eager.parameters()), (compiled, maml.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(*episode).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), maml.parameters(), strict=True))


def test_compiled_without_gradients_matches_eager() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    with torch.no_grad():
        got = torch.compile(maml, fullgraph=True)(*episode)
        want = maml(*episode)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_weights_and_classes_match_eager() -> None:
    net = nn.Sequential(nn.Linear(2, 13), nn.BatchNorm1d(13), nn.Linear(13, 3))
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=0.1, inner_steps=1)
    x, labels = episodes(dtype=torch.float32)[0], torch.randint(0, 3, (3, 5))
    weights = torch.tensor([1.0, 0.5, 2.0])
    buffers = copy.deepcopy(dict(net.named_buffers()))
    loss, grads = _eager(maml, list(maml.parameters()), [x, labels, x, labels, weights])
    out = torch.compile(maml, fullgraph=True)(x, labels, x, labels, task_weights=weights)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), loss)
    assert _equal(list(maml.parameters()), grads)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())


def test_each_copy_runs_its_own_parameters() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    other = copy.deepcopy(maml)
    with torch.no_grad():
        other.net[0].weight.mul_(2)
    forward = torch.compile(lambda module, *batch: module(*batch).loss, fullgraph=True)
    assert torch.equal(forward(maml, *episode), maml(*episode).loss)
    assert torch.equal(forward(other, *episode), other(*episode).loss)
    assert not torch.equal(forward(maml, *episode), forward(other, *episode))


def test_operators_break_the_graph_and_are_right() -> None:
    net, (x, y, query_x, query_y) = network(), episodes()
    params = {name: value.detach() for name, value in net.named_parameters()}

    def function(scale: Tensor) -> Tensor:
        return fm.meta_gradient(net, params, (x, y), (query_x, query_y), loss="mse", lr=0.1, steps=1).loss * scale

    two = torch.tensor(2.0, dtype=torch.float64)
    assert torch.equal(torch.compile(function)(two), function(two))


def test_rejects_inputs_that_require_grad_while_compiling() -> None:
    maml, episode = _maml(), episodes(dtype=torch.float32)
    episode[0].requires_grad_()
    with pytest.raises(Exception, match=r"`support_x` requires grad, which is not supported under torch.compile"):
        torch.compile(maml, fullgraph=True)(*episode)
