"""Gradients of the inner loop by what is not the network: an encoder before it, example weights, a
distilled set."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain_autograd import error, leaves
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm

TOLERANCE = 1e-9
T, N, M, LR, STEPS = 3, 5, 7, 0.1, 2
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])
Loss = Callable[[Tensor, Tensor], Tensor]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _classifier(inputs: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def _adapted(
    net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, loss: Loss
) -> dict[str, Tensor]:
    """theta_K of one task, with its graph."""
    theta = dict(params)
    for _ in range(STEPS):
        value = loss(functional_call(net, theta, x), y)
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - LR * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    return theta


@BACKENDS
def test_gradients_reach_an_encoder_through_support_and_query(backend: str) -> None:
    """The encoder sees all examples at once, with a batch norm over them: nothing that a task could
    be cut out of."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten()]
    encoder = nn.Sequential(*layers).double()
    images = _normal(T, N + M, 2, 5, 5, seed=1)
    labels = torch.randint(0, 4, (T, N + M), generator=torch.Generator().manual_seed(2))
    support_y, query_y = labels[:, :N], labels[:, N:]
    head = _classifier(27)

    def features(module: nn.Module) -> tuple[Tensor, Tensor]:
        encoded = module(images.flatten(0, 1)).unflatten(0, (T, N + M))
        return encoded[:, :N], encoded[:, N:]

    plain, params = copy.deepcopy(encoder), leaves(head)
    support, query = features(plain)
    adapted = [_adapted(head, params, support[t], support_y[t], F.cross_entropy) for t in range(T)]
    losses = [F.cross_entropy(functional_call(head, adapted[t], query[t]), query_y[t]) for t in range(T)]
    wanted = [p for name, p in plain.named_parameters() if name != "0.bias"]  # which the norm cancels
    want = torch.autograd.grad(torch.stack(losses).mean(), [*wanted, *params.values()])

    maml = fm.MAML(head, loss="cross_entropy", inner_lr=LR, inner_steps=STEPS, backend=backend)
    support, query = features(encoder)
    out = maml(support, support_y, query, query_y)
    found = [p for name, p in encoder.named_parameters() if name != "0.bias"]
    got = torch.autograd.grad(out.loss, [*found, *head.parameters()])
    assert error(out.task_losses, torch.stack(losses).detach()) < TOLERANCE
    assert all(error(g, w) < TOLERANCE for g, w in zip(got, want, strict=True))


@BACKENDS
def test_an_encoder_before_a_head_that_adapts_is_anil(backend: str) -> None:
    body = [nn.Linear(2, 13), nn.Tanh(), nn.Linear(13, 1)]
    net = nn.Sequential(*body).double()
    episode = (
        _normal(T, N, 2, seed=1),
        _normal(T, N, 1, seed=2),
        _normal(T, M, 2, seed=3),
        _normal(T, M, 1, seed=4),
    )
    anil = fm.ANIL(copy.deepcopy(net), loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend)
    anil(*episode).loss.backward()
    head = fm.MAML(net[2], loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend)
    head(net[:2](episode[0]), episode[1], net[:2](episode[2]), episode[3]).loss.backward()
    assert all(
        error(p.grad, q.grad) < TOLERANCE for p, q in zip(net.parameters(), anil.parameters(), strict=True)
    )


@BACKENDS
@pytest.mark.parametrize("norm", ["count", "sum"])
def test_weights_of_noisy_examples_get_their_gradient(norm: str, backend: str) -> None:
    net, x, query_x = _classifier(3), _normal(T, N, 3, seed=1), _normal(T, M, 3, seed=2)
    y, query_y = torch.arange(T * N).reshape(T, N) % 4, torch.arange(T * M).reshape(T, M) % 4
    logits = _normal(T, N, seed=3).requires_grad_()
    losses = []
    for t in range(T):
        w = logits[t].sigmoid()
        total = w.sum() if norm == "sum" else N

        def loss(output: Tensor, target: Tensor, w: Tensor = w, total: Tensor | int = total) -> Tensor:
            return (w * F.cross_entropy(output, target, reduction="none")).sum() / total

        theta = _adapted(net, leaves(net), x[t], y[t], loss)
        losses.append(F.cross_entropy(functional_call(net, theta, query_x[t]), query_y[t]))
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), [logits])
    options = {
        "loss": "cross_entropy",
        "inner_lr": LR,
        "inner_steps": STEPS,
        "weight_norm": norm,
        "backend": backend,
    }
    out = fm.MAML(net, **options)(x, y, query_x, query_y, support_weights=logits.sigmoid())
    (got,) = torch.autograd.grad(out.loss, [logits])
    assert error(got, want) < TOLERANCE


@BACKENDS
def test_a_distilled_set_with_soft_labels_gets_its_gradient(backend: str) -> None:
    """The set is shared by all tasks, each of which has its own initialisation."""
    net = _classifier(3)
    starts = {name: torch.stack([s * p.detach() for s in (0.5, 1, 2)]) for name, p in net.named_parameters()}
    query_x, query_y = _normal(M, 3, seed=2), torch.arange(M) % 4
    points, logits = (_normal(N, size, seed=size).requires_grad_() for size in (3, 4))
    losses = []
    for t in range(T):
        start = {name: value[t].clone().requires_grad_() for name, value in starts.items()}
        theta = _adapted(net, start, points, logits.softmax(-1), F.cross_entropy)
        losses.append(F.cross_entropy(functional_call(net, theta, query_x), query_y))
    want = torch.autograd.grad(torch.stack(losses).mean(), [points, logits])
    sets = points.expand(T, N, 3), logits.softmax(-1).expand(T, N, 4)
    options = {"loss": "cross_entropy", "lr": LR, "steps": STEPS, "backend": backend}
    theta = fm.inner_sgd(net, starts, *sets, **options)
    output = fm.task_forward(net, theta, query_x.expand(T, M, 3), backend=backend)
    got = torch.autograd.grad(F.cross_entropy(output.flatten(0, 1), query_y.repeat(T)), [points, logits])
    assert all(error(g, w) < TOLERANCE for g, w in zip(got, want, strict=True))
