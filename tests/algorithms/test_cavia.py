"""`CAVIA` against a loop over tasks in plain autograd, the context concatenated by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_autograd import MSE, episodes, error
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS, SIZE = 0.5, 2, 3
# where each tensor stands in the network below
NAMES = ["1.weight", "1.bias", "3.weight", "3.bias"]


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(fm.Context(SIZE), nn.Linear(2 + SIZE, 13), nn.Tanh(), nn.Linear(13, 1)).double()


def _cavia(**options: Any) -> fm.CAVIA:
    return fm.CAVIA(_network(), **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


def _forward(p: dict[str, Tensor], phi: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(torch.cat((x, phi.expand(len(x), SIZE)), 1), p["1.weight"], p["1.bias"]))
    return F.linear(hidden, p["3.weight"], p["3.bias"])


def _plain(p: dict[str, Tensor], episode: list[Tensor], first_order: bool = False) -> tuple[Tensor, Tensor]:
    """(query losses [T], adapted contexts [T, C]), with their graph."""
    losses, contexts = [], []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        phi = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
        for _ in range(STEPS):
            loss = MSE(_forward(p, phi, support_x), support_y)
            (gradient,) = torch.autograd.grad(loss, phi, create_graph=not first_order)
            phi = phi - LR * gradient
        losses.append(MSE(_forward(p, phi, query_x), query_y))
        contexts.append(phi)
    return torch.stack(losses), torch.stack(contexts)


def _leaves() -> dict[str, Tensor]:
    params = dict(_network().named_parameters())
    return {name: params[name].detach().clone().requires_grad_() for name in NAMES}


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_gradient_matches_autograd(order: str, backend: str) -> None:
    cavia, p = _cavia(order=order, backend=backend), _leaves()
    losses, _ = _plain(p, episodes(), order == "first")
    losses.mean().backward()
    out = cavia(*episodes())
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    assert out.output.shape == (3, 7, 1)
    assert all(error(cavia.net.get_parameter(name).grad, p[name].grad) < TOLERANCE for name in NAMES)
    assert cavia.net[0].phi.grad is None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_only_the_context_is_adapted_and_from_zero(backend: str) -> None:
    cavia, (x, y, query_x, query_y) = _cavia(backend=backend), episodes()
    adapted = cavia.adapt(x, y)
    losses, contexts = _plain(_leaves(), episodes())
    assert error(adapted["0.phi"].squeeze(-1).detach(), contexts.detach()) < TOLERANCE
    for name in NAMES:
        assert torch.equal(adapted[name], cavia.net.get_parameter(name).expand_as(adapted[name]))
    assert error(MSE(cavia.predict(adapted, query_x), query_y).detach(), losses.mean().detach()) < TOLERANCE
    assert not cavia.adapt(x, y, steps=0)["0.phi"].any()


def test_auto_runs_on_cpu() -> None:
    assert _cavia().explain(*episodes()).backend == "cpu"


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_context_before_a_later_layer_matches_one_of_the_users_own(backend: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.context = nn.Parameter(torch.zeros(SIZE), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((x, self.context.expand(x.shape[0], SIZE)), 1)

    def network(context: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        conv = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*conv, context, nn.Linear(36 + SIZE, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (3, 7), generator=generator)
    options: dict[str, Any] = {"loss": "cross_entropy", "inner_lr": LR, "inner_steps": STEPS}
    cavia = fm.CAVIA(network(fm.Context(SIZE)), backend=backend, **options)
    plain = fm.CAVIA(network(Own()), backend="reference", context=["4.context"], **options)
    got, want = (module(x, y, x, y) for module in (cavia, plain))
    got.loss.backward()
    want.loss.backward()
    assert error(got.task_losses, want.task_losses) < TOLERANCE
    for found, expected in zip(cavia.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert (
            found.grad is None
            or error(found.grad, expected.grad) < TOLERANCE
            or float(expected.grad.norm()) < 1e-12
        )


def test_feature_maps_modulated_by_a_context_run_by_traced_steps() -> None:
    class FiLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Parameter(torch.zeros(SIZE), requires_grad=False)
            self.linear = nn.Linear(SIZE, 8)

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.linear(self.phi).chunk(2)
            return (1 + scale[:, None, None]) * x + shift[:, None, None]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), FiLM(), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)).double()
    x, y = torch.randn(3, 4, 2, 5, 5).double(), torch.randn(3, 4, 1).double()
    cavia = fm.CAVIA(net, context=["1.phi"], loss="mse", inner_lr=LR, inner_steps=STEPS)
    assert cavia.explain(x, y, x, y).backend == "machine"
    cavia(x, y, x, y).loss.backward()
    same = fm.CAVIA(copy.deepcopy(net), context=["1.phi"], loss="mse", inner_lr=LR, inner_steps=STEPS)
    same.backend = "reference"
    same.zero_grad()
    same(x, y, x, y).loss.backward()
    assert net[1].linear.weight.grad.any()
    for got, want in zip(cavia.parameters(), same.parameters(), strict=True):
        assert got.grad is want.grad or error(got.grad, want.grad) < TOLERANCE


def test_the_context_stays_zero_whatever_becomes_of_it() -> None:
    cavia, want = _cavia(), _cavia()(*episodes()).loss
    cavia.requires_grad_(True)
    with torch.no_grad():
        cavia.net[0].phi.fill_(3.0)
    out = cavia(*episodes())
    out.loss.backward()
    assert torch.equal(out.loss, want)
    assert cavia.net[0].phi.grad is None
    assert not cavia.adapt(*episodes()[:2], steps=0)["0.phi"].any()


@pytest.mark.parametrize("learn_lr", [None, "element"])
def test_flattened_parameters_leave_the_context_out(learn_lr: str | None) -> None:
    plain, cavia = _cavia(learn_lr=learn_lr), _cavia(learn_lr=learn_lr)
    flat = fm.flatten(cavia)
    plain(*episodes()).loss.backward()
    cavia(*episodes()).loss.backward()
    wanted = [p.grad.flatten() for p in plain.parameters() if p.grad is not None]
    assert flat.numel() == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert torch.equal(flat.grad, torch.cat(wanted))


def test_training_and_copies() -> None:
    cavia = _cavia()
    optimizer = torch.optim.Adam(cavia.parameters(), lr=1e-2, weight_decay=1e-3)
    losses = []
    for _ in range(60):
        out = cavia(*episodes())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not cavia.net[0].phi.any()
    other = _cavia()
    other.load_state_dict(cavia.state_dict())
    assert torch.equal(other(*episodes()).loss, copy.deepcopy(cavia)(*episodes()).loss)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_diverged_tasks_are_counted_and_named(backend: str) -> None:
    episode = episodes()
    episode[1][0], episode[1][2] = torch.inf, torch.nan
    cavia = _cavia(backend=backend)
    with pytest.raises(FloatingPointError, match=r"CAVIA: 2 of 3 tasks diverged.*: tasks 0, 2$"):
        cavia(*episode)
    assert all(p.grad is None for p in cavia.parameters())
    with torch.no_grad():
        assert cavia(*episode).task_losses.isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("support_x", torch.zeros(3, 5, 2)),
        ("support_y", torch.zeros(3, 5).double()),
        ("query_x", torch.zeros(2, 7, 2).double()),
        ("task_weights", torch.ones(2).double()),
    ],
    ids=["other-dtype", "broadcast-target", "other-number-of-tasks", "task-weights"],
)
def test_rejects_tensors(field: str, bad: Tensor, backend: str) -> None:
    good = dict(zip(["support_x", "support_y", "query_x", "query_y"], episodes(), strict=True))
    with pytest.raises((ValueError, TypeError), match=f"CAVIA: `{field}`"):
        _cavia(backend=backend)(**{**good, field: bad})


def test_rejects_inputs_of_another_width() -> None:
    x = torch.zeros(3, 5, 4).double()
    with pytest.raises(ValueError, match="CAVIA: `support_x`"):
        _cavia()(x, episodes()[1], x, torch.zeros(3, 5, 1).double())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": "all"}, "CAVIA: `context` must be names of parameters or None, got 'all'"),
        ({"context": ["no.such.weight"]}, "CAVIA: `context`: the network has no parameter"),
        ({"context": ["1.weight"]}, "CAVIA: `context`: '1.weight' must be zero"),
        ({"context": []}, "CAVIA: `context` leaves nothing to adapt"),
        ({"adapt": "all"}, "`adapt`.*`context`"),
        ({"inner_lr": float("nan")}, "CAVIA: `inner_lr`"),
        ({"inner_steps": -1}, "CAVIA: `inner_steps`"),
        ({"order": "third"}, "CAVIA: `order`"),
    ],
)
def test_rejects_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        _cavia(**options)


def test_rejects_a_network_without_context_and_a_context_without_size() -> None:
    with pytest.raises(ValueError, match=r"CAVIA: `net` must have a fastmeta.Context"):
        fm.CAVIA(nn.Linear(2, 1), loss="mse", inner_lr=0.1, inner_steps=1)
    with pytest.raises(TypeError, match=r"CAVIA: `net` must be a torch.nn.Module, got int"):
        fm.CAVIA(3, loss="mse", inner_lr=0.1, inner_steps=1)
    with pytest.raises(ValueError, match="Context: `size`"):
        fm.Context(0)
    with pytest.raises(TypeError, match="Context: `size`"):
        fm.Context(1.5)
