"""`MAMLPlusPlus` against a loop over tasks in plain autograd, and its schedules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from plain_autograd import MSE, error, meta_losses, network
from plain_autograd import episodes as vectors
from tensors import drawn
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 3
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])
NORMS = ["1.weight", "1.bias", "4.weight", "4.bias"]


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(36)]
        net = nn.Sequential(*body, nn.Linear(36, 1)).double()
        for name in NORMS:
            net.get_parameter(name).data += 0.3 * torch.randn_like(net.get_parameter(name))
        return net


def _episode() -> list[Tensor]:
    return drawn((3, 5, 2, 5, 5), (3, 5, 1), (3, 7, 2, 5, 5), (3, 7, 1), seed=1)


def _make(**options: Any) -> fm.MAMLPlusPlus:
    schedule = {"multi_step_epochs": 10, "first_order_epochs": 0}
    options = {"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **schedule, **options}
    maml = fm.MAMLPlusPlus(_network(), **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in (*maml.extra.values(), *maml.inner_lrs.values()):
            value += 0.2 * value * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return maml


def _plain(
    maml: fm.MAMLPlusPlus, episode: list[Tensor], weights: tuple[float, ...], first: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """(task losses [T], leaves in the order of `maml.parameters()`), with their graph; the numbers
    of the rule come last."""
    rule = maml.update_rule
    numbers = {n: v.detach().clone().requires_grad_() for n, v in (rule.tensors or _values(rule)).items()}
    net = maml.net
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    rates = {key: value.detach().clone().requires_grad_() for key, value in maml.inner_lrs.items()}
    later = {key: value.detach().clone().requires_grad_() for key, value in maml.extra.items()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        fast = {name: value for name, value in params.items() if name not in NORMS}
        total = torch.zeros((), dtype=torch.float64)
        state = rule.init(fast)
        for k in range(STEPS):
            norms = {n: params[n] if k == 0 else later[n.replace(".", "__")][k - 1] for n in NORMS}
            loss = MSE(functional_call(net, {**fast, **norms}, support_x), support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first)
            rate = {name: rates[name.replace(".", "__")][k, 0] for name in fast}
            g = dict(zip(fast, grads, strict=True))
            fast, state = rule.step(fast, g, state, rate, rule.at_step(numbers, k), k)
            total = total + weights[k + 1] * MSE(functional_call(net, {**fast, **norms}, query_x), query_y)
        losses.append(total)
    leaves = [*params.values(), *rates.values(), *later.values(), *numbers.values()]
    return torch.stack(losses), leaves


def _values(rule: Any) -> dict[str, Tensor]:
    return rule.values if isinstance(rule, fm.CustomRule) else {}


class Remembers(nn.Module):
    """A learned mixture of the gradients so far."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def init(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 0.1 * value for name, value in theta.items()}

    def forward(self, theta: Any, gradient: Any, state: Any) -> Any:
        state = {n: (1 - self.share) * state[n] + self.share * gradient[n] for n in theta}
        return {n: theta[n] - state[n] for n in theta}, state


RULES = {
    "momentum": lambda: fm.SGD(momentum=0.9, nesterov=True),
    "adam": lambda: fm.Adam(
        betas=(nn.Parameter(torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)), 0.99), eps_root=1e-3
    ),
    "clipped": lambda: fm.AdamW(
        eps_root=1e-4, clip_norm=nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), weight_decay=0.1
    ),
    "own": lambda: fm.CustomRule(Remembers()),
}


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("name", RULES)
def test_rules_with_a_state_match_autograd(name: str, order: str) -> None:
    """Each step is a call of its own: the state passes through autograd."""
    rule = RULES[name]()
    maml = _make(update_rule=rule, inner_lr=0.02, first_order_epochs=4 if order == "first" else 0)
    episode = _episode()
    maml.set_epoch(3)
    weights = (0.0, 0.7 / 3, 0.7 / 3, 1 - 1.4 / 3)
    losses, leaves = _plain(maml, episode, weights, order == "first")
    out = maml(*episode)
    assert error(out.task_losses, losses) < TOLERANCE
    out.loss.backward()
    learned = [*(rule.tensors or _values(rule)).values()]
    own = [value for value in maml.parameters() if not any(value is number for number in learned)]
    expected = torch.autograd.grad(losses.mean(), leaves)
    assert len(own) + len(learned) == len(leaves)
    for value, grad in zip((*own, *learned), expected, strict=True):
        assert float((value.grad - grad).norm()) <= TOLERANCE * max(float(grad.norm()), 1e-6)
    adapted = maml.adapt(*episode[:2])
    assert all(value.isfinite().all() for value in adapted.values())


@BACKENDS
@pytest.mark.parametrize("order", ["second", "first"])
def test_gradient_matches_autograd(order: str, backend: str) -> None:
    maml, episode = _make(backend=backend, first_order_epochs=4 if order == "first" else 0), _episode()
    maml.set_epoch(3)
    assert maml.order == order
    weights = (0.0, 0.7 / 3, 0.7 / 3, 1 - 1.4 / 3)
    losses, leaves = _plain(maml, episode, weights, order == "first")
    losses.mean().backward()
    out = maml(*episode)
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    assert error(out.loss.detach(), losses.mean().detach()) < TOLERANCE
    parameters = list(maml.parameters())
    assert len(parameters) == len(leaves)
    for got, want in zip(parameters, leaves, strict=True):
        assert error(got.grad, want.grad) < TOLERANCE or float(want.grad.norm()) < 1e-12 > float(
            got.grad.norm()
        )


def test_step_weights_are_annealed_as_published() -> None:
    steps, epochs = 5, 10
    for epoch in range(epochs):
        want = [1 / steps - epoch * (1 / steps / epochs)] * (steps - 1)
        want = [max(weight, 0.03 / steps) for weight in want]
        want.append(min(1 / steps + epoch * (steps - 1) / steps / epochs, 1 - (steps - 1) * 0.03 / steps))
        maml = _make(inner_steps=steps)
        maml.set_epoch(epoch)
        assert maml.step_weights == pytest.approx([0.0, *want])
        assert sum(maml.step_weights) == pytest.approx(1)
    maml.set_epoch(epochs)
    assert maml.step_weights is None


def test_derivative_order_is_annealed() -> None:
    maml = _make(first_order_epochs=2)
    orders = []
    for epoch in range(4):
        maml.set_epoch(epoch)
        orders.append(maml.order)
    assert orders == ["first", "first", "second", "second"]


@BACKENDS
def test_without_norms_it_is_maml(backend: str) -> None:
    options: dict[str, Any] = {"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, "backend": backend}
    maml = fm.MAMLPlusPlus(network(), multi_step_epochs=0, first_order_epochs=0, **options)
    losses = meta_losses(network(), dict(network().named_parameters()), vectors(), LR, STEPS)
    out = maml(*vectors())
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    assert len(maml.extra) == 0
    rates = maml.inner_lrs.values()
    assert all(rate.shape[0] == STEPS and rate.grad.any() for rate in rates)
    shared = _make(backend=backend, per_step_norms=False)
    same = fm.MAML(
        _network(), learn_lr="tensor", lr_per_step=True, step_weights=shared.step_weights, **options
    )
    same.inner_lrs.load_state_dict(shared.inner_lrs.state_dict())
    assert torch.equal(shared(*_episode()).loss, same(*_episode()).loss)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_adaptation_is_that_of_training_and_goes_on_beyond_its_steps(backend: str) -> None:
    maml, (x, y, query_x, query_y) = _make(backend=backend), _episode()
    maml.set_epoch(10)
    out = maml(x, y, query_x, query_y)
    adapted = maml.adapt(x, y)
    assert all(value.shape == (3, *maml.net.get_parameter(name).shape) for name, value in adapted.items())
    assert error(maml.predict(adapted, query_x).detach(), out.output) < TOLERANCE
    for name in NORMS:
        assert torch.equal(adapted[name][0], maml.extra[name.replace(".", "__")][-1])
    theta = {name: value.detach() for name, value in adapted.items()}
    rate = {name: maml.inner_lrs[name.replace(".", "__")][-1].item() for name in maml.names}
    options: dict[str, Any] = {"loss": "mse", "steps": 1, "adapt": maml.names, "backend": backend}
    want = fm.inner_sgd(maml.net, theta, x, y, lr=rate, **options)
    got = maml.adapt(x, y, steps=STEPS + 1)
    assert all(error(got[name].detach(), want[name]) < TOLERANCE for name in want)
    assert torch.equal(maml.adapt(x, y, steps=0)["1.weight"][2], maml.net[1].weight)


def test_inputs_and_task_weights_get_their_gradients() -> None:
    episode, same = ([tensor.requires_grad_() for tensor in _episode()] for _ in range(2))
    task_weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    maml = _make()
    losses, _ = _plain(maml, same, maml.step_weights)
    want = torch.autograd.grad((losses * task_weights).mean(), [*same, task_weights])
    out = maml(*episode, task_weights)
    got = torch.autograd.grad(out.loss, [*episode, task_weights])
    assert all(error(g, w) < TOLERANCE for g, w in zip(got, want, strict=True))


def test_a_support_set_for_every_step() -> None:
    maml, (x, y, query_x, query_y) = _make(), _episode()
    sets = x[:, None].expand(3, STEPS, *x.shape[1:]), y[:, None].expand(3, STEPS, 5, 1)
    assert torch.equal(
        maml(*sets, query_x, query_y, support_per_step=True).loss, maml(x, y, query_x, query_y).loss
    )
    moved = sets[0] * torch.arange(1, STEPS + 1).reshape(1, -1, 1, 1, 1, 1)
    assert not torch.equal(
        maml(moved, sets[1], query_x, query_y, support_per_step=True).loss, maml(*_episode()).loss
    )
    with pytest.raises(ValueError, match=r"MAMLPlusPlus: `support_x` must be \[T, K, N, ...\] with K = 3"):
        maml(sets[0][:, 1:], sets[1], query_x, query_y, support_per_step=True)


def test_flattened_parameters_hold_the_norms_of_every_step() -> None:
    plain, maml = _make(), _make()
    flat = fm.flatten(maml)
    for module in (plain, maml):
        module(*_episode()).loss.backward()
    assert flat.numel() == sum(value.numel() for value in plain.parameters())
    assert torch.equal(flat.grad, torch.cat([value.grad.flatten() for value in plain.parameters()]))
    optimizer = torch.optim.Adam([flat], lr=1e-2)
    optimizer.step()
    assert not torch.equal(maml.extra["1__weight"], plain.extra["1__weight"])


def test_copies_and_checkpoints() -> None:
    maml = _make()
    maml.set_epoch(4)
    want = maml(*_episode()).loss
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        loss = other(*_episode()).loss
        assert torch.equal(loss, want)
        loss.backward()
        assert all(value.grad is None for value in maml.parameters())
        assert all(value.grad is not None for value in other.parameters())
    other = fm.MAMLPlusPlus(
        _network(), loss="mse", inner_lr=1.0, inner_steps=STEPS, multi_step_epochs=10, first_order_epochs=0
    )
    other.load_state_dict(maml.state_dict())
    other.set_epoch(4)
    assert torch.equal(other(*_episode()).loss, want)


def test_training_with_the_schedules() -> None:
    maml, episode = _make(first_order_epochs=10), _episode()
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-5)
    losses = []
    for epoch in range(20):
        maml.set_epoch(epoch)
        out = maml(*episode)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            maml.set_epoch(10)
            losses.append(maml(*episode).loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "first"}, "MAMLPlusPlus: `order` is no argument, `set_epoch` sets it"),
        ({"step_weights": [1.0]}, "MAMLPlusPlus: `step_weights` is no argument"),
        ({"multi_step_epochs": -1}, "MAMLPlusPlus: `multi_step_epochs` must be at least 0"),
        ({"first_order_epochs": 1.0}, "MAMLPlusPlus: `first_order_epochs` must be an int"),
        ({"inner_steps": 0}, "MAMLPlusPlus: `inner_steps` must be at least 1"),
        ({"adapt": NORMS}, "MAMLPlusPlus: `adapt` leaves nothing to adapt"),
        ({"adapt": "9.*"}, "MAMLPlusPlus: `adapt`: the network has no parameter"),
        ({"inner_lr": float("nan")}, "MAMLPlusPlus: `inner_lr` must be finite"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        _make(**options)


def test_rejects_tensors_and_epochs() -> None:
    maml, (x, y, query_x, query_y) = _make(), _episode()
    with pytest.raises(ValueError, match="MAMLPlusPlus: `query_y` must be"):
        maml(x, y, query_x, query_y[:2])
    with pytest.raises(ValueError, match=r"MAMLPlusPlus.adapt: `y` must be"):
        maml.adapt(x, y[:2])
    with pytest.raises(ValueError, match=r"MAMLPlusPlus.adapt: `steps` must be at least 0"):
        maml.adapt(x, y, steps=-1)
    with pytest.raises(ValueError, match=r"MAMLPlusPlus.set_epoch: `epoch` must be at least 0"):
        maml.set_epoch(-1)
