"""Frozen parameters: `adapt="all"`, "head" and "body" leave them alone, names and predicates can
ask for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_autograd import MSE, adapt, episodes, error, leaves, network
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, STEPS, LR, TOLERANCE = 2, 2, 0.1, 1e-9
NAMES = [name for name, _ in network().named_parameters()]
BODY, HEAD = NAMES[:4], NAMES[4:]
BACKENDS = ["reference", "torch", "cpu"]


def _freeze(net: nn.Module, names: list[str]) -> nn.Module:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    return net


def _plain(adapted: list[str]) -> dict[str, Tensor]:
    """The meta-gradient by every parameter, frozen or not, of an inner loop over `adapted`."""
    net, params = network(), leaves(network())
    losses = []
    for sx, sy, qx, qy in zip(*episodes(TASKS), strict=True):
        theta = adapt(net, params, sx, sy, lambda name, k: LR if name in adapted else 0.0, STEPS)
        losses.append(MSE(functional_call(net, theta, (qx,)), qy))
    return dict(
        zip(params, torch.autograd.grad(torch.stack(losses).mean(), list(params.values())), strict=True)
    )


def _check(maml: fm.MAML, adapted: list[str], frozen: list[str]) -> None:
    maml.zero_grad()
    maml(*episodes(TASKS)).loss.backward()
    want = _plain(adapted)
    for name, parameter in maml.net.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert error(parameter.grad, want[name]) < TOLERANCE, name
    theta = maml.adapt(*episodes(TASKS)[:2])
    moved = {n for n, value in theta.items() if not torch.equal(value[0], maml.net.get_parameter(n))}
    assert moved == set(adapted)


def _maml(net: nn.Module, **options: Any) -> fm.MAML:
    return fm.MAML(net, **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "frozen", [[NAMES[0]], BODY, [NAMES[0], HEAD[1]]], ids=["weight", "body", "scattered"]
)
def test_frozen_parameters_are_not_adapted(frozen: list[str], backend: str) -> None:
    net = _freeze(network(), frozen)
    free = [name for name in NAMES if name not in frozen]
    _check(_maml(net, backend=backend), free, frozen)
    _check(_maml(net, backend=backend, adapt="head"), [n for n in HEAD if n in free], frozen)
    if set(frozen) < set(BODY):
        _check(_maml(net, backend=backend, adapt="body"), [n for n in BODY if n in free], frozen)
    for everything in ("*", NAMES, lambda name, parameter: True):
        _check(_maml(net, backend=backend, adapt=everything), NAMES, frozen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_ask_the_module_not_the_tensors(backend: str) -> None:
    net, episode = _freeze(network(), BODY), episodes(TASKS)
    for value in ({n: p.detach() for n, p in net.named_parameters()}, leaves(net)):
        theta = fm.inner_sgd(net, value, *episode[:2], loss="mse", lr=LR, steps=STEPS, backend=backend)
        assert {n for n in NAMES if not torch.equal(theta[n][0], value[n])} == set(HEAD)
        assert list(fm.task_gradient(net, value, *episode[:2], loss="mse", backend=backend)) == HEAD
        call = {"loss": "mse", "lr": LR, "steps": STEPS, "backend": backend}
        got = fm.meta_gradient(net, value, tuple(episode[:2]), tuple(episode[2:]), **call)
        want = _plain(HEAD)
        assert all(error(got.grads[name], want[name]) < TOLERANCE for name in NAMES)


@pytest.mark.parametrize("adapt_what", ["all", "body"])
def test_freezing_after_the_first_call_is_noticed(adapt_what: str) -> None:
    maml = _maml(network(), adapt=adapt_what)
    names = NAMES if adapt_what == "all" else BODY
    for frozen in ([], [NAMES[0]], [], BODY[:3], [NAMES[0]]):
        _freeze(maml.net, frozen)
        _check(maml, [n for n in names if n not in frozen], frozen)


def test_freezing_is_noticed_by_every_algorithm() -> None:
    episode = episodes(TASKS)
    made = {
        "curvature": fm.MetaCurvature(network(), loss="mse", inner_lr=LR, inner_steps=STEPS),
        "plus_plus": fm.MAMLPlusPlus(
            nn.Sequential(network()[0], nn.LayerNorm(13).double(), *network()[1:]),
            loss="mse",
            inner_lr=LR,
            inner_steps=STEPS,
            multi_step_epochs=0,
            first_order_epochs=0,
        ),
        "imaml": fm.IMAML(network(), loss="mse", inner_lr=LR, inner_steps=STEPS, proximal=20.0),
        "reptile": fm.Reptile(network(), loss="mse", inner_lr=LR, inner_steps=STEPS),
    }
    for name, module in made.items():
        for frozen in (False, True, False):
            module.net[0].weight.requires_grad_(not frozen)
            module(*(episode[:2] if name == "reptile" else episode)).loss.backward()
            theta = module.adapt(*episode[:2])
            assert torch.equal(theta["0.weight"][0], module.net[0].weight) is frozen, name
            assert not torch.equal(theta["0.bias"][0], module.net[0].bias), name


def test_learned_rates_belong_to_what_requires_grad() -> None:
    maml = _maml(_freeze(network(), BODY), learn_lr="element")
    assert list(maml.inner_lrs) == [name.replace(".", "__") for name in HEAD]
    _check(maml, HEAD, BODY)
    _freeze(maml.net, [*BODY, HEAD[0]])  # frozen later: its rates have the gradient zero
    maml.zero_grad()
    maml(*episodes(TASKS)).loss.backward()
    assert not maml.inner_lrs["4__weight"].grad.any()
    assert maml.inner_lrs["4__bias"].grad.any()
    _freeze(maml.net, [])
    with pytest.raises(
        ValueError, match=r"must have a rate for every adapted parameter, none for '0\.weight'"
    ):
        maml(*episodes(TASKS))


def test_rates_of_frozen_parameters_are_not_used() -> None:
    net, episode = _freeze(network(), BODY), episodes(TASKS)
    rates = {name: torch.full((), LR, dtype=torch.float64) for name in NAMES}
    got = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        tuple(episode[:2]),
        tuple(episode[2:]),
        loss="mse",
        lr=rates,
        steps=STEPS,
        wrt=("params", "lr"),
    )
    want = _plain(HEAD)
    assert all(error(got.grads[name], want[name]) < TOLERANCE for name in NAMES)
    assert {name for name, gradient in got.lr.items() if gradient != 0} == set(HEAD)
    maml = _maml(net, inner_lr=rates)
    _check(maml, HEAD, BODY)
    _freeze(net, HEAD)
    _check(maml, BODY, HEAD)
    with pytest.raises(ValueError, match=r"has a rate for '9\.weight', which is not adapted"):
        _maml(net, inner_lr={**rates, "9.weight": LR})


def test_flattened_parameters_count_as_what_they_were() -> None:
    maml = _maml(_freeze(network(), [NAMES[0]]))
    flat = fm.flatten(maml)
    maml(*episodes(TASKS)).loss.backward()
    want = _plain(NAMES[1:])
    assert error(flat.grad, torch.cat([want[name].flatten() for name in NAMES[1:]])) < TOLERANCE
    theta = fm.inner_sgd(
        maml.net, dict(maml.net.named_parameters()), *episodes(TASKS)[:2], loss="mse", lr=LR, steps=STEPS
    )
    assert {n for n in NAMES if not torch.equal(theta[n][0], maml.net.get_parameter(n))} == set(NAMES[1:])


@pytest.mark.parametrize(("adapt_what", "frozen"), [("all", NAMES), ("head", HEAD), ("body", BODY)])
def test_rejects_what_is_frozen_altogether(adapt_what: str, frozen: list[str]) -> None:
    net, episode = _freeze(network(), frozen), episodes(TASKS)
    which = f"all of {frozen[0]}, .* are frozen"
    message = rf"MAML: `adapt`='{adapt_what}' means parameters that require grad, and {which}"
    with pytest.raises(ValueError, match=message):
        _maml(net, adapt=adapt_what)
    call = {"loss": "mse", "lr": LR, "steps": STEPS, "adapt": adapt_what}
    with pytest.raises(ValueError, match=r"inner_sgd: `adapt`=.* are frozen"):
        fm.inner_sgd(net, leaves(net), *episode[:2], **call)
    maml = _maml(_freeze(net, []), adapt=adapt_what)
    maml(*episode)
    _freeze(net, frozen)
    with pytest.raises(ValueError, match=message):
        maml(*episode)
    fm.task_forward(net, dict(net.named_parameters()), episode[0])  # adapts nothing
