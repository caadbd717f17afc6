"""Learning rates of `MAML`: learned, given, repeated."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_autograd import episodes, error, leaves, meta_losses, network
from torch import Tensor

import fastmeta as fm

TOLERANCE = 1e-9
STEPS = 2


def _maml(**options: object) -> fm.MAML:
    return fm.MAML(network(), **{"loss": "mse", "inner_lr": 0.1, "inner_steps": STEPS, **options})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("sort", ["scalar", "tensor", "element"])
def test_learned_rates_match_autograd(sort: str, per_step: bool, backend: str) -> None:
    maml, episode = _maml(learn_lr=sort, lr_per_step=per_step, backend=backend), episodes()
    rows = STEPS if per_step else 1
    names = [name for name, _ in maml.net.named_parameters()]
    if sort == "scalar":
        assert {key: tuple(rate.shape) for key, rate in maml.inner_lrs.items()} == {
            "all": (rows,) if per_step else ()
        }
    else:
        assert list(maml.inner_lrs) == [name.replace(".", "__") for name in names]
        for name, value in maml.net.named_parameters():
            shape = value.shape if sort == "element" else (1,) * value.dim()
            assert maml.inner_lrs[name.replace(".", "__")].shape == (rows, 1, *shape)
    with torch.no_grad():
        for rate in maml.inner_lrs.values():
            rate.copy_(0.05 + 0.1 * torch.rand(rate.shape, dtype=torch.float64))
    rates = {key: rate.detach().clone().requires_grad_() for key, rate in maml.inner_lrs.items()}

    def rate(name: str, k: int) -> Tensor:
        mine = rates["all" if sort == "scalar" else name.replace(".", "__")]
        if sort == "scalar":
            return mine[k] if per_step else mine
        return mine[k if per_step else 0, 0]

    params = leaves(network())
    loss = meta_losses(network(), params, episode, rate, STEPS).mean()
    want = torch.autograd.grad(loss, [*params.values(), *rates.values()])
    out = maml(*episode)
    out.loss.backward()
    assert error(out.loss.detach(), loss.detach()) < TOLERANCE
    got = [*maml.net.parameters(), *maml.inner_lrs.values()]
    for leaf, gradient in zip(got, want, strict=True):
        assert error(leaf.grad, gradient) < TOLERANCE


def test_rates_alone_can_be_learned() -> None:
    maml, whole = _maml(learn_lr="tensor", adapt="*"), _maml(learn_lr="tensor")
    maml.net.requires_grad_(False)
    for module in (maml, whole):
        module(*episodes()).loss.backward()
    assert all(value.grad is None for value in maml.net.parameters())
    for mine, other in zip(maml.inner_lrs.values(), whole.inner_lrs.values(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_learned_rates_of_the_head_only() -> None:
    maml = _maml(learn_lr="element", adapt="head")
    assert list(maml.inner_lrs) == ["4__weight", "4__bias"]
    maml(*episodes()).loss.backward()
    assert all(value.grad.any() for value in maml.net.parameters())
    assert maml.inner_lrs["4__weight"].grad.shape == (1, 1, 1, 13)


@pytest.mark.parametrize("form", ["step", "dict", "mixed"])
def test_given_rates_move_with_the_module_and_stay_out_of_checkpoints(form: str) -> None:
    per_step = torch.tensor([0.1, 0.03])
    names = [name for name, _ in network().named_parameters()]
    lr = {
        "step": per_step,
        "dict": {name: torch.tensor(0.1) for name in names},
        "mixed": {name: torch.tensor(0.1) if index % 2 else 0.1 for index, name in enumerate(names)},
    }[form]
    maml = fm.MAML(network(dtype=torch.float32), loss="mse", inner_lr=lr, inner_steps=STEPS).double()
    assert list(maml.state_dict()) == [f"net.{name}" for name in names]
    assert len(list(maml.parameters())) == len(names)
    params = {name: value.detach().requires_grad_() for name, value in maml.net.named_parameters()}
    rate = (lambda name, k: float(per_step[k])) if form == "step" else (lambda name, k: 0.1)
    want = meta_losses(network(), params, episodes(), rate, STEPS).detach()
    for module in (maml, copy.deepcopy(maml)):
        assert error(module(*episodes()).task_losses, want) < 1e-7  # 0.1 was rounded to float32


def test_beyond_the_last_step_its_rates_repeat() -> None:
    episode = episodes()
    x, y = episode[:2]
    rates = torch.tensor([0.1, 0.03], dtype=torch.float64)
    names = [name for name, _ in network().named_parameters()]
    full = {name: rates.reshape(2, 1, *[1] * value.dim()) for name, value in network().named_parameters()}
    for lr in (rates, full):
        maml = _maml(inner_lr=lr)
        for steps in (0, 1, 4):
            wanted = torch.tensor([0.1, 0.03, 0.03, 0.03], dtype=torch.float64)[:steps]
            want = fm.inner_sgd(
                network(), dict(maml.net.named_parameters()), x, y, loss="mse", lr=wanted, steps=steps
            )
            got = maml.adapt(x, y, steps=steps)
            assert all(torch.equal(got[name], want[name]) for name in names)


def test_adaptation_is_differentiable_in_learned_rates() -> None:
    maml = _maml(learn_lr="scalar", lr_per_step=True)
    x, y = episodes()[:2]
    maml.adapt(x, y, steps=4)["0.weight"].sum().backward()
    assert maml.inner_lrs["all"].grad.shape == (2,)
    assert maml.inner_lrs["all"].grad.all()


def test_rejects_rates_at_construction() -> None:
    for options, message in (
        ({"inner_lr": float("nan")}, r"MAML: `inner_lr` must be finite, got nan"),
        ({"inner_lr": torch.ones(3)}, r"MAML: `inner_lr` must be torch.float64, as the parameters"),
        ({"inner_lr": torch.ones(3, dtype=torch.float64)}, r"MAML: `inner_lr` must be .* \(2,\), got \(3,\)"),
        (
            {"inner_lr": torch.ones((), dtype=torch.float64, requires_grad=True)},
            r"requires grad.*use `learn_lr`",
        ),
        ({"learn_lr": "layer"}, r"MAML: `learn_lr` must be None, 'scalar', 'tensor', 'element', got 'layer'"),
        ({"lr_per_step": True}, r"`lr_per_step` is for learned rates"),
        ({"inner_lr": {"0.weight": 0.1}}, r"none for '0.bias'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            _maml(**options)
