"""`meta_gradient` against plain autograd, and that it keeps no graph and touches nothing."""

from __future__ import annotations

import pytest
import torch
from plain_autograd import MSE, adapt, episodes, error, leaves, meta_losses, network
from torch import nn
from torch.func import functional_call

import fastmeta as fm

BACKENDS = ["reference", "torch", "cpu"]
TOLERANCE = 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["second", "first"])
def test_meta_gradient_matches_autograd(backend: str, order: str) -> None:
    net, episode = network(), episodes()
    params = leaves(net)
    task_losses = meta_losses(net, params, episode, 0.1, 3, first_order=order == "first")
    want = torch.autograd.grad(task_losses.mean(), list(params.values()))
    got = fm.meta_gradient(
        net,
        params,
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss="mse",
        lr=0.1,
        steps=3,
        order=order,
        backend=backend,
    )
    assert error(got.loss, task_losses.mean().detach()) < TOLERANCE
    assert error(got.task_losses, task_losses.detach()) < TOLERANCE
    assert list(got.grads) == list(params)
    for name, gradient in zip(params, want, strict=True):
        assert error(got.grads[name], gradient) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_all_inputs_match_autograd(backend: str) -> None:
    net = network()
    inputs = [tensor.requires_grad_() for tensor in episodes()]
    support_weights = (torch.rand(3, 5, dtype=torch.float64) + 0.5).requires_grad_()
    query_weights = (torch.rand(3, 7, dtype=torch.float64) + 0.5).requires_grad_()
    task_weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    params, rates = leaves(net), torch.tensor([0.1, 0.05], dtype=torch.float64, requires_grad=True)
    losses = []
    for t in range(3):
        theta = adapt(
            net, params, inputs[0][t], inputs[1][t], lambda name, k: rates[k], 2, support_weights[t]
        )
        squares = (functional_call(net, theta, (inputs[2][t],)) - inputs[3][t]).square().mean(-1)
        losses.append((query_weights[t] * squares).mean())
    loss = (task_weights * torch.stack(losses)).sum() / 3
    wanted = [*inputs, support_weights, query_weights, rates]
    want = torch.autograd.grad(loss, wanted)
    got = fm.meta_gradient(
        net,
        params,
        (inputs[0], inputs[1]),
        (inputs[2], inputs[3]),
        loss=nn.MSELoss(),
        lr=rates,
        steps=2,
        support_weights=support_weights,
        query_weights=query_weights,
        task_weights=task_weights,
        wrt=("support_x", "support_y", "query_x", "query_y", "support_weights", "query_weights", "lr"),
        backend=backend,
    )
    fields = ("support_x", "support_y", "query_x", "query_y", "support_weights", "query_weights", "lr")
    assert error(got.loss, loss.detach()) < TOLERANCE
    assert got.grads is None
    for field, gradient in zip(fields, want, strict=True):
        assert error(getattr(got, field), gradient) < TOLERANCE, field


def test_query_loss_and_step_weights_match_autograd() -> None:
    net, episode = network(), episodes()
    params = leaves(net)
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        for steps, weight in enumerate((0.3, 0.0, 2.0)):
            theta = adapt(net, params, support_x, support_y, lambda name, k: 0.1, steps)
            total = (
                total + weight * nn.functional.l1_loss(functional_call(net, theta, (query_x,)), query_y) / 3
            )
    want = torch.autograd.grad(total, list(params.values()))
    got = fm.meta_gradient(
        net,
        params,
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss=MSE,
        query_loss=nn.functional.l1_loss,
        lr=0.1,
        steps=2,
        step_weights=[0.3, 0, 2.0],
    )
    assert error(got.loss, total.detach()) < TOLERANCE
    assert (
        error(torch.cat([g.flatten() for g in got.grads.values()]), torch.cat([g.flatten() for g in want]))
        < TOLERANCE
    )


def test_parameters_in_any_order_and_per_task_match_autograd() -> None:
    net, episode = network(), episodes()
    shared = leaves(net)
    own = {
        name: (value.detach() * torch.rand(3, *value.shape)).requires_grad_()
        for name, value in shared.items()
    }
    params = {name: own[name] if index % 2 else shared[name] for index, name in enumerate(shared)}
    losses = []
    for t in range(3):
        theta = {name: value[t] if value is own[name] else value for name, value in params.items()}
        losses.append(meta_losses(net, theta, [tensor[t : t + 1] for tensor in episode], 0.1, 2))
    want = torch.autograd.grad(torch.cat(losses).mean(), list(params.values()))
    backwards = dict(reversed(params.items()))
    got = fm.meta_gradient(
        net, backwards, (episode[0], episode[1]), (episode[2], episode[3]), loss="mse", lr=0.1, steps=2
    )
    for name, gradient in zip(params, want, strict=True):
        assert error(got.grads[name], gradient) < TOLERANCE


def test_no_steps_give_zero_rate_gradients() -> None:
    net, episode = network(), episodes()
    params = leaves(net)
    losses = meta_losses(net, params, episode, 0.1, 0)
    want = torch.autograd.grad(losses.mean(), list(params.values()))
    for lr, shape in (
        (0.1, ()),
        (torch.zeros(0, dtype=torch.float64), (0,)),
        (torch.ones(1, dtype=torch.float64), (1,)),
    ):
        got = fm.meta_gradient(
            net,
            params,
            (episode[0], episode[1]),
            (episode[2], episode[3]),
            loss="mse",
            lr=lr,
            steps=0,
            wrt=("params", "lr", "support_x"),
        )
        assert got.lr.shape == shape
        assert not got.lr.any()
        assert torch.equal(got.support_x, torch.zeros_like(episode[0]))
        for name, gradient in zip(params, want, strict=True):
            assert error(got.grads[name], gradient) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_detached_and_nothing_is_modified(backend: str) -> None:
    net, episode = network(), episodes()
    params = leaves(net)
    inputs = [tensor.clone().requires_grad_() for tensor in episode]
    got = fm.meta_gradient(
        net,
        params,
        (inputs[0], inputs[1]),
        (inputs[2], inputs[3]),
        loss="mse",
        lr=0.1,
        steps=2,
        backend=backend,
    )
    assert not any(
        tensor.requires_grad for tensor in (got.loss, got.task_losses, got.output, *got.grads.values())
    )
    assert all(torch.equal(a, b) for a, b in zip(inputs, episode, strict=True))
    assert all(tensor.grad is None for tensor in (*inputs, *params.values(), *net.parameters()))
    assert all(torch.equal(params[name], value) for name, value in net.named_parameters())


def test_support_set_for_each_step_matches_autograd() -> None:
    net, episode = network(), episodes()
    params = leaves(net)
    more = episodes(seed=5)
    x, y = torch.stack([episode[0], more[0]], 1), torch.stack([episode[1], more[1]], 1)  # [T, K, N, ...]
    losses = []
    for t in range(3):
        theta = params
        for k in range(2):
            theta = adapt(net, theta, x[t, k], y[t, k], lambda name, k: 0.1, 1)
        losses.append(MSE(functional_call(net, theta, (episode[2][t],)), episode[3][t]))
    want = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    got = fm.meta_gradient(
        net, params, (x, y), (episode[2], episode[3]), loss="mse", lr=0.1, steps=2, support_per_step=True
    )
    assert error(got.task_losses, torch.stack(losses).detach()) < TOLERANCE
    for name, gradient in zip(params, want, strict=True):
        assert error(got.grads[name], gradient) < TOLERANCE


def test_a_changed_network_is_not_answered_from_the_cache() -> None:
    net, episode = network(), episodes()
    arguments = (episode[0], episode[1]), (episode[2], episode[3])
    before = fm.meta_gradient(net, dict(net.named_parameters()), *arguments, loss="mse", lr=0.1, steps=2)
    net[1] = nn.Sigmoid()
    params = leaves(net)
    want = meta_losses(net, params, episode, 0.1, 2)
    after = fm.meta_gradient(net, params, *arguments, loss="mse", lr=0.1, steps=2)
    assert error(after.task_losses, want.detach()) < TOLERANCE
    assert not torch.equal(before.task_losses, after.task_losses)


def test_class_weights_are_read_at_every_call() -> None:
    net = nn.Linear(2, 3, dtype=torch.float64)
    x, labels = episodes()[0], torch.randint(0, 3, (3, 5))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    params = leaves(net)

    def query_loss() -> torch.Tensor:
        return fm.meta_gradient(net, params, (x, labels), (x, labels), loss=loss, lr=0.1, steps=0).loss

    first = query_loss()
    loss.weight.copy_(torch.tensor([3.0, 1.0, 1.0]))
    want = torch.stack([loss(functional_call(net, params, (x[t],)), labels[t]) for t in range(3)]).mean()
    assert error(query_loss(), want.detach()) < TOLERANCE
    assert not torch.equal(first, query_loss())


@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"])
@pytest.mark.parametrize("kind", ["cross_entropy", "bce_with_logits"])
def test_class_weights_of_another_dtype_match_reference(
    backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    torch.manual_seed(0)
    x, _, query_x, _ = episodes()
    if kind == "cross_entropy":
        net, loss = nn.Linear(2, 3).double(), nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 3.0]))
        y, query_y = torch.randint(0, 3, x.shape[:2]), torch.randint(0, 3, query_x.shape[:2])
    else:
        net, loss = nn.Linear(2, 1).double(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
        y, query_y = torch.rand(*x.shape[:2], 1).double(), torch.rand(*query_x.shape[:2], 1).double()
    batches, options = ((x, y), (query_x, query_y)), {"lr": 0.1, "steps": 2}
    double = type(loss)(**{name: buffer.double() for name, buffer in loss.named_buffers()})
    want = fm.meta_gradient(net, leaves(net), *batches, loss=double, backend="reference", **options)
    for _ in range(3):  # what is freed too early is overwritten sooner or later
        got = fm.meta_gradient(net, leaves(net), *batches, loss=loss, backend=backend, **options)
        assert error(got.task_losses, want.task_losses) < TOLERANCE
        for name, gradient in want.grads.items():
            assert error(got.grads[name], gradient) < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_task_without_targets_has_no_gradient(
    backend: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    torch.manual_seed(0)
    net, (x, _, query_x, _) = nn.Linear(2, 3).double(), episodes()
    y, query_y = torch.randint(0, 3, x.shape[:2]), torch.randint(0, 3, query_x.shape[:2])
    y[1] = query_y[2] = -100  # PyTorch's mean over nothing is NaN, its gradient zero
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    batches, options = (
        ((x, y), (query_x, query_y)),
        {"loss": loss, "lr": 0.1, "steps": 2, "wrt": ("params", "lr")},
    )
    want = fm.meta_gradient(net, leaves(net), *batches, backend="reference", **options)
    got = fm.meta_gradient(net, leaves(net), *batches, backend=backend, **options)
    assert want.task_losses.isnan().tolist() == got.task_losses.isnan().tolist() == [False, False, True]
    assert error(got.task_losses[:2], want.task_losses[:2]) < TOLERANCE
    assert error(got.lr, want.lr) < TOLERANCE
    for name, gradient in want.grads.items():
        assert error(got.grads[name], gradient) < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"])
def test_views_of_the_opposite_sign_match_reference(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    net, (x, y, query_x, query_y) = network(), episodes()
    negative = torch._neg_view(x)
    rate = torch.complex(torch.tensor(0.0).double(), torch.tensor(-0.1).double()).conj().imag
    assert negative.is_neg()
    assert rate.is_neg()
    options = {"loss": "mse", "lr": rate, "steps": 2}
    want = fm.meta_gradient(
        net, leaves(net), (negative, y), (query_x, query_y), backend="reference", **options
    )
    got = fm.meta_gradient(net, leaves(net), (negative, y), (query_x, query_y), backend=backend, **options)
    assert error(got.task_losses, want.task_losses) < TOLERANCE
    for name, gradient in want.grads.items():
        assert error(got.grads[name], gradient) < TOLERANCE
