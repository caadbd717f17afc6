"""`Reptile` against a loop over tasks with `torch.optim.SGD`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_autograd import MSE, all_near, episodes, error, network
from torch import Tensor

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 3


def _reptile(**options: Any) -> fm.Reptile:
    return fm.Reptile(network(), **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


def _plain(x: Tensor, y: Tensor, per_step: bool = False, momentum: float = 0.0) -> list[list[Tensor]]:
    """theta - theta_K of every task."""
    ways = []
    for task_x, task_y in zip(x, y, strict=True):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=momentum)
        for k in range(STEPS):
            optimizer.zero_grad()
            MSE(net(task_x[k] if per_step else task_x), task_y[k] if per_step else task_y).backward()
            optimizer.step()
        ways.append(
            [a.detach() - b.detach() for a, b in zip(network().parameters(), net.parameters(), strict=True)]
        )
    return ways


def _mean(ways: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts).mean(0) for parts in zip(*ways, strict=True)]


def _same(reptile: fm.Reptile, want: list[Tensor]) -> bool:
    return all_near([p.grad for p in reptile.net.parameters()], want)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("per_step", [False, True], ids=["one-set", "minibatches"])
def test_gradient_matches_the_way_of_the_inner_loop(per_step: bool, backend: str) -> None:
    x, y = episodes(shots=5 * STEPS)[:2]
    if per_step:
        x, y = x.reshape(3, STEPS, 5, 2), y.reshape(3, STEPS, 5, 1)
    reptile = _reptile(backend=backend)
    out = reptile(x, y, support_per_step=per_step)
    out.loss.backward()
    ways = _plain(x, y, per_step)
    assert _same(reptile, _mean(ways))
    halves = torch.stack([sum(d.square().sum() for d in way) / 2 for way in ways])
    assert error(out.task_losses, halves) < TOLERANCE
    assert error(out.loss.detach(), halves.mean()) < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_normalised_step_is_joint_training(backend: str) -> None:
    x, y = episodes()[:2]
    reptile, net = _reptile(inner_steps=1, normalise=True, backend=backend), network()
    reptile(x, y).loss.backward()
    MSE(net(x), y).backward()
    assert _same(reptile, [p.grad for p in net.parameters()])


def test_normalised_gradient_is_that_of_its_loss_and_the_mean_of_the_inner_gradients() -> None:
    x, y = episodes()[:2]
    plain, reptile = _reptile(), _reptile(normalise=True)
    plain(x, y).loss.backward()
    out = reptile(x, y)
    out.loss.backward()
    assert _same(reptile, [p.grad / (LR * STEPS) for p in plain.net.parameters()])
    assert error(out.loss.detach(), plain(x, y).loss.detach() / (LR * STEPS)) < TOLERANCE


def test_an_outer_step_of_sgd_interpolates() -> None:
    x, y = episodes()[:2]
    reptile, start = _reptile(), [p.detach().clone() for p in network().parameters()]
    optimizer = torch.optim.SGD(reptile.parameters(), lr=0.25)
    out = reptile(x, y)
    out.loss.backward()
    optimizer.step()
    for now, before, found in zip(reptile.net.parameters(), start, out.adapted.values(), strict=True):
        assert error(now.detach(), before + 0.25 * (found.mean(0) - before)) < TOLERANCE


def test_momentum_matches_torch_optim() -> None:
    x, y = episodes()[:2]
    reptile = _reptile(update_rule=fm.SGD(momentum=0.5))
    reptile(x, y).loss.backward()
    assert _same(reptile, _mean(_plain(x, y, momentum=0.5)))


def test_weights_of_tasks_and_examples() -> None:
    x, y = episodes()[:2]
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    reptile = _reptile()
    # examples of weight zero, the others' weights making up for the mean over all of them
    masked = torch.cat((torch.ones(3, 4), torch.zeros(3, 1)), 1).double() * 5 / 4
    out = reptile(x, y, weights, masked)
    out.loss.backward()
    ways = _plain(x[:, :4], y[:, :4])
    weighted = [[w * d for d in way] for w, way in zip(weights, ways, strict=True)]
    assert _same(reptile, _mean(weighted))
    assert error(out.loss.detach(), (weights * out.task_losses).mean()) < TOLERANCE


def test_only_adapted_parameters_move() -> None:
    reptile = _reptile(adapt="head")
    reptile(*episodes()[:2]).loss.backward()
    assert [bool(p.grad.any()) for p in reptile.net.parameters()] == [False] * 4 + [True] * 2


def test_adapt_and_predict_match_the_forward_pass() -> None:
    x, y, query_x, _ = episodes()
    reptile = _reptile()
    out, adapted = reptile(x, y), reptile.adapt(x, y)
    assert all(torch.equal(adapted[name], value) for name, value in out.adapted.items())
    assert not any(value.requires_grad for value in adapted.values())
    theta = {name: value[1] for name, value in adapted.items()}
    want = torch.func.functional_call(reptile.net, theta, (query_x[1],)).detach()
    assert error(reptile.predict(adapted, query_x)[1].detach(), want) < TOLERANCE
    none = reptile.adapt(x, y, steps=0)
    assert all(torch.equal(none[name][2], value) for name, value in reptile.net.named_parameters())
    rates = torch.tensor([0.2, 0.1], dtype=torch.float64)
    slower = torch.tensor([0.2, 0.1, 0.1], dtype=torch.float64)
    more = _reptile(inner_lr=rates, inner_steps=2).adapt(x, y, steps=3)
    want = _reptile(inner_lr=slower).adapt(x, y)
    assert all(torch.equal(more[name], value) for name, value in want.items())


def test_gradients_follow_the_rules_of_autograd() -> None:
    x, y = episodes()[:2]
    reptile = _reptile(adapt="*")
    want = _mean(_plain(x, y))
    (2 * reptile(x, y).loss + reptile(x, y).loss).backward()
    assert _same(reptile, [3 * w for w in want])
    with torch.no_grad():
        assert not reptile(x, y).loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        reptile(x, y).task_losses.mean().backward()
    (gradient,) = torch.autograd.grad(reptile(x, y).loss, [reptile.net[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()
    reptile.requires_grad_(False)
    assert not reptile(x, y).loss.requires_grad


def test_explain_names_the_backend_and_the_cost_of_the_inner_loop() -> None:
    x, y = (tensor.float() for tensor in episodes()[:2])
    reptile = _reptile().float()
    told = reptile.explain(x, y)
    tasks, shots = x.shape[:2]
    sizes = [value.numel() for value in reptile.net.parameters() if value.dim() == 2]
    assert told.backend == "cpu"
    assert told.cost == {"store": tasks * shots * STEPS * (3 * sum(sizes) - sizes[0])}
    assert f"K = {STEPS} inner steps" in str(told)
    assert _reptile(backend="torch").float().explain(x, y).backend == "torch"


def test_state_dict_holds_the_network_and_copies_work() -> None:
    reptile = _reptile(inner_lr=torch.tensor(LR, dtype=torch.float64))
    assert list(reptile.state_dict()) == [f"net.{name}" for name, _ in reptile.net.named_parameters()]
    other = copy.deepcopy(reptile)
    assert torch.equal(other(*episodes()[:2]).loss, reptile(*episodes()[:2]).loss)


def test_tasks_get_easier_to_adapt_to() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 20, 2, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(-1, keepdim=True)) + torch.randn(4, 1, 1, generator=generator, dtype=torch.float64)
    reptile = _reptile(inner_steps=5)
    optimizer = torch.optim.Adam(reptile.parameters(), lr=1e-2)

    def after() -> float:
        with torch.no_grad():
            return float(MSE(reptile.predict(reptile.adapt(x, y), x), y))

    before = after()
    for _ in range(50):
        optimizer.zero_grad()
        reptile(x, y).loss.backward()
        optimizer.step()
    assert after() < 0.5 * before


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_diverged_tasks_are_counted_and_named(backend: str) -> None:
    x, y = episodes()[:2]
    y[1] = torch.inf
    reptile = _reptile(backend=backend)
    with pytest.raises(FloatingPointError, match=r"Reptile: 1 of 3 tasks diverged.*: task 1$"):
        reptile(x, y)
    y[2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"Reptile: 2 of 3 tasks diverged.*: tasks 1, 2$"):
        reptile(x, y)
    assert all(p.grad is None for p in reptile.parameters())
    with torch.no_grad():
        assert reptile(x, y).task_losses.isfinite().tolist() == [True, False, False]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other-dtype": ({"support_x": torch.zeros(3, 5, 2)}, "Reptile: `support_x`"),
    "not-a-tensor": ({"support_x": [1.0]}, "Reptile: `support_x`"),
    "broadcast-target": ({"support_y": torch.zeros(3, 5).double()}, "Reptile: `support_y`"),
    "minibatches": ({"support_per_step": True}, "Reptile: `support_x` must be .* K = 3"),
    "task-weights": ({"task_weights": torch.ones(2).double()}, "Reptile: `task_weights`"),
    "support-weights": ({"support_weights": torch.ones(3, 4).double()}, "Reptile: `support_weights`"),
    "gradient-of-input": (
        {"support_y": torch.zeros(3, 5, 1).double().requires_grad_()},
        "`support_y` must not",
    ),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("what", BAD)
def test_rejects_tensors(what: str, backend: str) -> None:
    changed, named = BAD[what]
    x, y = episodes()[:2]
    with pytest.raises((ValueError, TypeError), match=named):
        _reptile(backend=backend)(**{"support_x": x, "support_y": y, **changed})


def test_rejects_inputs_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"Reptile: `support_x` must be \[T, N, 2\]"):
        _reptile()(torch.zeros(3, 5, 3).double(), episodes()[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"inner_lr": float("nan")}, "`inner_lr`"),
        ({"inner_steps": -1}, "`inner_steps`"),
        ({"inner_steps": 1.5}, "`inner_steps`"),
        ({"adapt": ["no.such.weight"]}, "`adapt`"),
        ({"backend": "gpu"}, "`backend`"),
        ({"loss": "no_such_loss"}, "loss"),
        ({"normalise": True, "inner_lr": torch.tensor(0.1, dtype=torch.float64)}, "`inner_lr`.*tensor"),
        ({"normalise": True, "inner_lr": 0.0}, "`inner_lr`.*zero"),
        ({"normalise": True, "inner_steps": 0}, "`inner_steps`"),
    ],
)
def test_rejects_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        _reptile(**options)


def test_rejects_what_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"Reptile: `net`.*got int"):
        fm.Reptile(3, loss="mse", inner_lr=0.1, inner_steps=1)
    with pytest.raises(ValueError, match="Reptile: `net` must have parameters"):
        fm.Reptile(torch.nn.ReLU(), loss="mse", inner_lr=0.1, inner_steps=1)


def test_rejects_steps_to_adapt_by() -> None:
    x, y = episodes()[:2]
    with pytest.raises(TypeError, match=r"Reptile.adapt: `steps` must be an int, got 1.5"):
        _reptile().adapt(x, y, steps=1.5)
    with pytest.raises(ValueError, match=r"Reptile.adapt: `steps` must be at least 0"):
        _reptile().adapt(x, y, steps=-1)
    with pytest.raises(TypeError, match=r"Reptile.adapt: `y`"):
        _reptile().adapt(x, None)
