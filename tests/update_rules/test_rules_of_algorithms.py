"""Update rules in the MAML family: values, gradients of learned numbers, parameters, copies and
errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from plain_autograd import network
from rule_loops import CASES, MSE, RuleCase, loop, meta_gradient, problem
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
ADAM = RuleCase("adam", "Adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}, lr=0.02)
OPTIONS: dict[str, Any] = {"loss": "mse", "inner_lr": 0.02, "inner_steps": 3}


def learned(value: float = 0.9) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


class Scale(nn.Module):
    """Plain SGD with a learned size."""

    def __init__(self) -> None:
        super().__init__()
        self.size = learned(0.5)

    def forward(self, theta: Any, gradient: Any, state: Any) -> Any:
        return {n: v - self.size * gradient[n] for n, v in theta.items()}, state


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_maml_matches_the_plain_loop(case: RuleCase) -> None:
    net, _, episode = problem()
    numbers = {name: nn.Parameter(value) for name, value in case.tensors().items()}
    maml = fm.MAML(net, loss="mse", inner_lr=case.lr, inner_steps=3, update_rule=case.make(numbers))
    lr = torch.tensor(case.lr, dtype=torch.float64)
    want = meta_gradient(case, net, dict(net.named_parameters()), episode, lr, case.tensors(), 3)
    names = dict(maml.named_parameters())
    assert {f"inner_rule.{name}" for name in numbers} == {n for n in names if n.startswith("inner_rule")}
    out = maml(*episode)
    assert float((out.task_losses - want["task_losses"]).norm()) < 1e-12
    out.loss.backward()
    for name, value in net.named_parameters():
        assert float((value.grad - want["params"][name]).norm()) <= 1e-9 * float(want["params"][name].norm())
    for name, value in numbers.items():
        assert float((value.grad - want["rule"][name]).norm()) <= 1e-9 * float(want["rule"][name].norm())


def test_second_derivatives_reach_learned_numbers() -> None:
    net, _, episode = problem()
    beta = learned()
    rule = fm.Adam(betas=(beta, 0.99), eps=1e-2)
    maml = fm.MAML(net, **OPTIONS, update_rule=rule, learn_lr="scalar")
    leaves = [*net.parameters(), beta, maml.inner_lrs["all"]]
    g = torch.autograd.grad(maml(*episode).loss, leaves, create_graph=True)
    found = torch.autograd.grad(sum(x.square().sum() for x in g), leaves)

    def loss(values: list[Tensor]) -> Tensor:
        theta0 = dict(zip(dict(net.named_parameters()), values, strict=False))
        sx, sy, qx, qy = episode
        case = RuleCase("", "Adam", {})
        numbers = {"beta1": values[-2], "beta2": torch.tensor(0.99, dtype=torch.float64), "eps": 1e-2}
        ends = [loop(case, net, theta0, sx[t], sy[t], values[-1], numbers, 3)[0][-1] for t in range(len(sx))]
        return torch.stack([MSE(functional_call(net, e, (qx[t],)), qy[t]) for t, e in enumerate(ends)]).mean()

    plain = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    g = torch.autograd.grad(loss(plain), plain, create_graph=True)
    want = torch.autograd.grad(sum(x.square().sum() for x in g), plain)
    for one, other in zip(found, want, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-9


def test_gradients_reach_what_a_number_was_made_of() -> None:
    """A tensor that is no leaf: momentum as a sigmoid."""
    net, _, episode = problem()
    raw = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.SGD(momentum=raw.sigmoid()))
    maml(*episode).loss.backward()
    case, s = RuleCase("", "SGD", {}), torch.sigmoid(raw.detach())
    lr = torch.tensor(0.02, dtype=torch.float64)
    want = meta_gradient(case, net, dict(net.named_parameters()), episode, lr, {"momentum": s}, 3)
    assert float((raw.grad - want["rule"]["momentum"] * s * (1 - s)).abs()) < 1e-12


def test_adapt_repeats_the_last_numbers_and_is_differentiable() -> None:
    net, params, (x, y, *_) = problem()
    momentum = nn.Parameter(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64))
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.SGD(momentum=momentum))
    adapted = maml.adapt(x, y, steps=5)
    rows = momentum.detach()[[0, 1, 2, 2, 2]].requires_grad_()
    case, lr = RuleCase("", "SGD", {}), torch.tensor(0.02, dtype=torch.float64)
    ends = []
    for t in range(len(x)):
        theta = {n: v.clone().requires_grad_() for n, v in params.items()}
        ends.append(loop(case, net, theta, x[t], y[t], lr, {"momentum": rows}, 5)[0][-1])
    for name, value in adapted.items():
        torch.testing.assert_close(value, torch.stack([end[name] for end in ends]), rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(sum(v.sin().sum() for v in adapted.values()), momentum)
    (want,) = torch.autograd.grad(sum(v.sin().sum() for end in ends for v in end.values()), rows)
    torch.testing.assert_close(got, torch.stack([want[0], want[1], want[2:].sum()]), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", ["FOMAML", "ANIL", "BOIL", "MetaSGD"])
def test_relatives_take_rules(make: str) -> None:
    net, _, episode = problem()
    beta = learned()
    maml = getattr(fm, make)(net, **OPTIONS, update_rule=fm.Adam(betas=(beta, 0.99), eps=1e-2))
    maml(*episode).loss.backward()
    assert beta.grad is not None
    assert bool(beta.grad.isfinite())
    assert float(beta.grad.abs()) > 0


def test_cavia_takes_rules() -> None:
    net = nn.Sequential(fm.Context(3), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    _, _, episode = problem()
    cavia = fm.CAVIA(net, **OPTIONS, update_rule=fm.RMSProp(alpha=learned(), eps=1e-2))
    cavia(*episode).loss.backward()
    assert float(cavia.inner_rule.alpha.grad.abs()) > 0


def test_reptile_takes_rules() -> None:
    net, params, (x, y, *_) = problem()
    reptile = fm.Reptile(net, **OPTIONS, update_rule=ADAM.make(ADAM.tensors()))
    adapted = reptile(x, y).adapted
    lr = torch.tensor(0.02, dtype=torch.float64)
    for t in range(len(x)):
        theta = {n: v.clone().requires_grad_() for n, v in params.items()}
        for name, value in loop(ADAM, net, theta, x[t], y[t], lr, ADAM.numbers, 3)[0][-1].items():
            torch.testing.assert_close(adapted[name][t], value.detach(), rtol=1e-10, atol=0)


def test_maml_plus_plus_takes_rules() -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()
    _, _, episode = problem()
    how = {**OPTIONS, "multi_step_epochs": 0, "first_order_epochs": 0}
    size, clip = Scale(), learned(0.05)
    rules = [(fm.CustomRule(size), size.size), (fm.SGD(clip_norm=clip), clip)]
    rules.append((fm.SGD(momentum=0.5, clip_norm=clip), clip))
    for rule, leaf in rules:
        leaf.grad = None
        maml = fm.MAMLPlusPlus(net, **how, update_rule=rule)
        assert any(leaf is value for value in maml.parameters())
        maml(*episode).loss.backward()
        assert float(leaf.grad.abs()) > 0
        losses, before = [], leaf.detach().clone()
        for sign in (1, -1):
            with torch.no_grad():
                leaf.copy_(before + sign * 1e-6)
                losses.append(maml(*episode).loss)
        with torch.no_grad():
            leaf.copy_(before)
        assert float(((losses[0] - losses[1]) / 2e-6 - leaf.grad).abs()) < 1e-7
    with pytest.raises(ValueError, match="`update_rule` must be plain SGD"):
        fm.MetaCurvature(net, **OPTIONS, update_rule=fm.SGD(clip_norm=1.0))


def test_copies_pickles_and_conversions_have_tensors_of_their_own() -> None:
    net, _, episode = problem()
    given = torch.tensor(0.99, dtype=torch.float64)
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.Adam(betas=(learned(), given), eps=1e-2))
    loss = maml(*episode).loss.detach()
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert other.inner_rule.beta1 is not maml.inner_rule.beta1
        torch.testing.assert_close(other(*episode).loss.detach(), loss, rtol=0, atol=0)
        with torch.no_grad():
            other.inner_rule.beta1.fill_(0.1)
        assert not torch.equal(other(*episode).loss, loss)
        assert torch.equal(maml(*episode).loss, loss)
        other.load_state_dict(maml.state_dict())
        assert torch.equal(other(*episode).loss, loss)
    single = copy.deepcopy(maml).float()  # a tensor that is no parameter goes with it
    found = single(*[x.float() for x in episode]).loss
    torch.testing.assert_close(found.double().detach(), loss, rtol=1e-4, atol=1e-5)
    assert "inner_rule.beta2" not in maml.state_dict()


def test_a_rule_can_be_changed_between_calls() -> None:
    net, _, episode = problem()
    maml = fm.MAML(net, **OPTIONS)
    before = maml(*episode).loss.detach()
    size = Scale()
    maml.update_rule = fm.CustomRule(size)
    assert any(value is size.size for value in maml.parameters())
    half = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=3)
    torch.testing.assert_close(maml(*episode).loss, half(*episode).loss, rtol=1e-12, atol=0)
    maml.update_rule = fm.SGD()
    assert list(maml.parameters()) == list(net.parameters())
    assert torch.equal(maml(*episode).loss, before)
    with pytest.raises(TypeError, match="MAML: `update_rule` must be an update rule"):
        maml.update_rule = 3


def test_flatten_takes_learned_numbers_last() -> None:
    net, _, episode = problem()
    beta = learned()
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.Adam(betas=(beta, 0.99), eps=1e-2), learn_lr="tensor")
    maml(*episode).loss.backward()
    want = torch.cat(
        [value.grad.reshape(-1) for value in (*net.parameters(), *maml.inner_lrs.values(), beta)]
    )
    flat = fm.flatten(maml)
    maml(*episode).loss.backward()
    torch.testing.assert_close(flat.grad, want, rtol=1e-12, atol=1e-15)
    raw = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    other = fm.MAML(network(), **OPTIONS, update_rule=fm.SGD(momentum=raw))
    with pytest.raises(ValueError, match=r"flatten: `update_rule` of `maml` has a tensor .* momentum, which"):
        fm.flatten(other)


def test_a_task_that_diverges_is_left_out_of_the_numbers_too() -> None:
    net, _, episode = problem(tasks=3)
    beta = learned()
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.Adam(betas=(beta, 0.99), eps=1e-2), on_divergence="skip")
    maml(next(x[:2] for x in episode), *[x[:2] for x in episode][1:]).loss.backward()
    want, beta.grad = beta.grad.clone(), None
    episode[1][2] = torch.inf
    with pytest.warns(RuntimeWarning, match="1 of 3 tasks diverged"):
        maml(*episode).loss.backward()
    torch.testing.assert_close(beta.grad, want, rtol=1e-12, atol=1e-15)


def test_compiled_training_steps_take_rules() -> None:
    net, _, episode = problem()
    beta = learned()
    maml = fm.MAML(net, **OPTIONS, update_rule=fm.Adam(betas=(beta, 0.99), eps=1e-2))
    maml(*episode).loss.backward()
    want, beta.grad = beta.grad.clone(), None
    torch.compile(lambda *episode: maml(*episode).loss, backend="eager")(*episode).backward()
    torch.testing.assert_close(beta.grad, want, rtol=1e-12, atol=1e-15)
