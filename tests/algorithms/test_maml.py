"""`MAML`: gradients under ordinary autograd rules, adaptation, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from plain_autograd import all_near, episodes, error, leaves, meta_losses, network
from torch import Tensor, nn

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 2


def _maml(**options: object) -> fm.MAML:
    return fm.MAML(network(), **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


def _plain(episode: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    params = leaves(network())
    loss = scale * meta_losses(network(), params, episode, LR, STEPS).mean()
    return list(torch.autograd.grad(loss, list(params.values())))


def _grads(maml: fm.MAML) -> list[Tensor]:
    return [value.grad for value in maml.net.parameters()]


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_backward_matches_autograd(backend: str) -> None:
    maml, episode = _maml(backend=backend), episodes()
    out = maml(*episode)
    out.loss.backward()
    want = meta_losses(network(), leaves(network()), episode, LR, STEPS).detach()
    assert error(out.loss.detach(), want.mean()) < TOLERANCE
    assert error(out.task_losses, want) < TOLERANCE
    assert out.output.shape == (3, 7, 1)
    assert all_near(_grads(maml), _plain(episode))


def test_gradients_accumulate() -> None:
    maml = _maml()
    for seed in (1, 2):
        maml(*episodes(seed=seed)).loss.backward()
    want = [a + b for a, b in zip(_plain(episodes(seed=1)), _plain(episodes(seed=2)), strict=True)]
    assert all_near(_grads(maml), want)


def test_two_forwards_then_two_backwards() -> None:
    maml = _maml()
    losses = [maml(*episodes(seed=seed)).loss for seed in (1, 2)]
    for seed, loss in zip((1, 2), losses, strict=True):
        maml.zero_grad()
        loss.backward()
        assert all_near(_grads(maml), _plain(episodes(seed=seed)))


def test_stored_losses_add_up() -> None:
    maml = _maml()
    total = sum(3.0 * maml(*episodes(seed=seed)).loss for seed in (1, 2))
    total.backward()
    want = [a + b for a, b in zip(_plain(episodes(seed=1), 3.0), _plain(episodes(seed=2), 3.0), strict=True)]
    assert all_near(_grads(maml), want)


def test_gradients_of_two_backwards_share_no_memory() -> None:
    maml, episode = _maml(), episodes()
    loss = maml(*episode).loss
    loss.backward(retain_graph=True)
    first = _grads(maml)
    before = [grad.clone() for grad in first]
    maml.zero_grad(set_to_none=True)
    loss.backward()
    for grad in _grads(maml):
        grad.zero_()
    assert all(torch.equal(grad, kept) for grad, kept in zip(first, before, strict=True))


def test_a_second_backward_needs_retain_graph() -> None:
    loss = _maml()(*episodes()).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("member", ["task_losses", "output"])
def test_a_loss_built_from_other_members_raises(member: str) -> None:
    out = _maml()(*episodes())
    with pytest.raises(RuntimeError, match="does not require grad"):
        getattr(out, member).mean().backward()


def test_without_gradients_there_is_no_graph() -> None:
    maml, episode = _maml(adapt="*"), episodes()
    want = maml(*episode)
    with torch.no_grad():
        got = maml(*episode)
    with torch.inference_mode():
        inference = maml(*episode)
    assert not got.loss.requires_grad
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(inference.output, want.output)
    maml.requires_grad_(False)
    assert not maml(*episode).loss.requires_grad


def test_inputs_that_require_grad_get_theirs() -> None:
    episode = [tensor.requires_grad_() for tensor in episodes()]
    task_weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    params = leaves(network())
    loss = (task_weights * meta_losses(network(), params, episode, LR, STEPS)).mean()
    want = torch.autograd.grad(loss, [*episode, task_weights, *params.values()])
    maml = _maml()
    out = maml(*episode, task_weights)
    assert error(out.loss.detach(), loss.detach()) < TOLERANCE
    out.loss.backward()
    assert all_near([*[tensor.grad for tensor in (*episode, task_weights)], *_grads(maml)], list(want))


def test_frozen_parameters_get_no_gradient() -> None:
    maml = _maml(adapt="*")
    maml.net[0].weight.requires_grad_(False)
    maml(*episodes()).loss.backward()
    assert maml.net[0].weight.grad is None
    assert all_near(_grads(maml)[1:], _plain(episodes())[1:])


def test_a_replaced_parameter_is_the_one_that_trains() -> None:
    maml = _maml()
    maml(*episodes())
    old, maml.net[0].weight = maml.net[0].weight, nn.Parameter(maml.net[0].weight.detach().clone())
    maml(*episodes()).loss.backward()
    assert old.grad is None
    assert all_near(_grads(maml), _plain(episodes()))
    maml.net[4] = nn.Linear(13, 1, dtype=torch.float64)
    out = maml(*episodes())
    out.loss.backward()
    params = {name: value.detach().requires_grad_() for name, value in maml.net.named_parameters()}
    assert error(out.task_losses, meta_losses(maml.net, params, episodes(), LR, STEPS).detach()) < TOLERANCE
    assert maml.net[4].weight.grad is not None


def test_inner_steps_may_change_between_calls() -> None:
    maml = _maml()
    maml(*episodes())
    maml.inner_steps = 4
    want = meta_losses(network(), leaves(network()), episodes(), LR, 4).detach()
    assert error(maml(*episodes()).task_losses, want) < TOLERANCE


def test_adapt_and_predict_match_the_forward_pass() -> None:
    maml, episode = _maml(), episodes()
    adapted = maml.adapt(episode[0], episode[1])
    assert {name: tuple(value.shape) for name, value in adapted.items()} == {
        name: (3, *value.shape) for name, value in maml.net.named_parameters()
    }
    prediction = maml.predict(adapted, episode[2])
    assert error(prediction.detach(), maml(*episode).output) < TOLERANCE
    nn.functional.mse_loss(prediction, episode[3]).backward()
    assert all_near(_grads(maml), _plain(episode))
    with torch.no_grad():
        assert not maml.adapt(episode[0], episode[1], steps=5)["0.weight"].requires_grad


def test_ordinary_optimiser_trains() -> None:
    maml, episode = _maml(), episodes()
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        out = maml(*episode)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_state_dict_holds_the_network() -> None:
    maml = _maml()
    assert list(maml.state_dict()) == [f"net.{name}" for name, _ in maml.net.named_parameters()]
    other = fm.MAML(network(seed=9), loss="mse", inner_lr=LR, inner_steps=STEPS)
    other.load_state_dict(maml.state_dict())
    assert torch.equal(other(*episodes()).loss, maml(*episodes()).loss)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_are_independent(how: str) -> None:
    net = network()
    net[4] = nn.Linear(13, 3, dtype=torch.float64)
    maml = fm.MAML(
        net,
        loss=nn.CrossEntropyLoss(),
        inner_lr=LR,
        inner_steps=STEPS,
        learn_lr="tensor",
        update_rule=fm.SGD(0.5),
    )
    x, labels = episodes()[0], torch.randint(0, 3, (3, 5))
    want = maml(x, labels, x, labels).loss
    if how == "deepcopy":
        other = copy.deepcopy(maml)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(maml))
    else:
        buffer = io.BytesIO()
        torch.save(maml, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    out = other(x, labels, x, labels)
    assert torch.equal(out.loss, want)
    assert other._machinery.handle != maml._machinery.handle
    out.loss.backward()
    assert all(value.grad is None for value in maml.parameters())
    assert all(value.grad is not None for value in other.parameters())


def test_any_network_runs() -> None:
    net = nn.Sequential(nn.Linear(2, 13), nn.LayerNorm(13), nn.Linear(13, 1)).double()
    maml = fm.MAML(
        net, loss=lambda output, target: (output - target).abs().mean(), inner_lr=LR, inner_steps=STEPS
    )
    episode = episodes()
    out = maml(*episode)
    out.loss.backward()
    same = fm.MAML(copy.deepcopy(net), loss="l1", inner_lr=LR, inner_steps=STEPS, backend="reference")
    want = same(*episode)
    want.loss.backward()
    assert error(out.task_losses, want.task_losses) < TOLERANCE
    assert all_near(_grads(maml), _grads(same))


def test_explain_names_the_backend_the_cost_and_the_reasons() -> None:
    episode = episodes()
    fast = _maml().explain(*episode)
    forward, first = 2 * 13 + 13 * 13 + 13, 2 * 13
    assert fast.backend == "cpu"
    assert fast.cost == {
        "store": 3 * (5 * STEPS * (9 * forward - 5 * first) + 7 * (3 * forward - first)),
        "recompute": 3 * (5 * STEPS * (11 * forward - 6 * first) + 7 * (3 * forward - first)),
    }
    assert _maml(order="first").explain(*episode).cost == {
        "store": 3 * (5 * STEPS + 7) * (3 * forward - first)
    }
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    normed = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS).explain(*episode)
    assert normed.backend == "cpu"
    assert "transductive" in str(normed)
    net = nn.Sequential(nn.Linear(2, 4), nn.RReLU(), nn.Linear(4, 1)).double()  # random: not for kernels
    slow = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS).explain(*episode)
    assert slow.backend == "torch"
    assert "RReLU" in slow.refused["cpu"]
    named = _maml(backend="torch").explain(*episode)
    assert named.backend == "torch"
    assert named.refused.keys() == {"cpu", "machine"}


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.FOMAML, fm.MetaCurvature, fm.MAMLPlusPlus])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_diverged_tasks_are_counted_and_named(backend: str, algorithm: type[fm.MAML]) -> None:
    annealing = {"multi_step_epochs": 1, "first_order_epochs": 0} if algorithm is fm.MAMLPlusPlus else {}
    net = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 1)).double()
    maml = algorithm(net, loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend, **annealing)
    episode = episodes()
    episode[1][0], episode[3][2] = torch.inf, torch.nan
    with pytest.raises(
        FloatingPointError, match=rf"{algorithm.__name__}: 2 of 3 tasks diverged.*: tasks 0, 2$"
    ):
        maml(*episode)
    assert all(value.grad is None for value in maml.parameters())
    with torch.no_grad():
        assert maml(*episode).task_losses.isfinite().tolist() == [False, True, False]


def test_a_learning_rate_that_diverges_is_reported() -> None:
    maml, episode = _maml(inner_lr=1e200, inner_steps=4), episodes()
    with pytest.raises(FloatingPointError, match=r"MAML: 3 of 3 tasks diverged"):
        maml(*episode)
