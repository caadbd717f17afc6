"""`MetaCurvature` against a loop over tasks in plain autograd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from plain_autograd import MSE, error, leaves, meta_losses, network
from plain_autograd import episodes as vectors
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

TOLERANCE = 1e-9
LR, STEPS = 0.1, 2
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])


def _images() -> tuple[nn.Sequential, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, (3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)).double()
        shapes = [(3, 4, 2, 5, 5), (3, 4, 1), (3, 5, 2, 5, 5), (3, 5, 1)]
        return net, [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _make(net: nn.Module, **options: Any) -> fm.MetaCurvature:
    """With matrices that are neither the identity nor symmetric."""
    maml = fm.MetaCurvature(net, **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in maml.extra.values():
            value += 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return maml


def _curved(g: Tensor, m: dict[str, Tensor], key: str) -> Tensor:
    if g.dim() == 1:
        return m[f"{key}__out"] @ g
    if g.dim() == 2:
        return m[f"{key}__out"] @ g @ m[f"{key}__in"].T
    flat = torch.einsum(
        "oid,po,qi,ed->pqe", g.flatten(2), m[f"{key}__out"], m[f"{key}__in"], m[f"{key}__taps"]
    )
    return flat.reshape(g.shape)


def _plain(maml: fm.MetaCurvature, episode: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(query losses [T], leaves in the order of `maml.parameters()`), with their graph."""
    net, params = maml.net, leaves(maml.net)
    rates = {key: value.detach().clone().requires_grad_() for key, value in maml.inner_lrs.items()}
    matrices = {key: value.detach().clone().requires_grad_() for key, value in maml.extra.items()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta = dict(params)
        for k in range(STEPS):
            adapted = {name: theta[name] for name in maml.names}
            loss = MSE(functional_call(net, theta, support_x), support_y)
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=maml.order == "second")
            for (name, value), g in zip(adapted.items(), grads, strict=True):
                key = name.replace(".", "__")
                rate = rates[key][k, 0] if rates else LR
                theta[name] = value - rate * _curved(g, matrices, key)
        losses.append(MSE(functional_call(net, theta, query_x), query_y))
    return torch.stack(losses), [*params.values(), *rates.values(), *matrices.values()]


def _check(maml: fm.MetaCurvature, episode: list[Tensor]) -> None:
    losses, wanted = _plain(maml, episode)
    losses.mean().backward()
    out = maml(*episode)
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    parameters = list(maml.parameters())
    assert len(parameters) == len(wanted)
    for got, want in zip(parameters, wanted, strict=True):
        assert error(got.grad, want.grad) < TOLERANCE


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "first"}, {"adapt": "*.weight"}, {"learn_lr": "element", "lr_per_step": True}],
    ids=["second", "first", "weights", "rates"],
)
def test_gradient_matches_autograd(options: dict[str, Any], backend: str) -> None:
    _check(_make(network(), backend=backend, **options), vectors())


@BACKENDS
def test_convolutions_have_a_matrix_for_their_taps(backend: str) -> None:
    net, episode = _images()
    maml = _make(net, backend=backend)
    sizes = {key: tuple(value.shape) for key, value in maml.extra.items()}
    assert sizes["0__weight__out"] == (4, 4)
    assert sizes["0__weight__in"] == (2, 2)
    assert sizes["0__weight__taps"] == (6, 6)
    assert sizes["3__weight__in"] == (48, 48)
    _check(maml, episode)


@BACKENDS
def test_it_starts_as_maml(backend: str) -> None:
    params = leaves(network())
    losses = meta_losses(network(), params, vectors(), LR, STEPS)
    losses.mean().backward()
    maml = fm.MetaCurvature(network(), loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend)
    out = maml(*vectors())
    out.loss.backward()
    assert error(out.task_losses, losses.detach()) < TOLERANCE
    for name, value in params.items():
        assert error(maml.net.get_parameter(name).grad, value.grad) < TOLERANCE
    assert all(value.grad.any() for value in maml.extra.values())


def test_float32_is_as_accurate_as_autograd() -> None:
    """The engine's gradients leave nothing of what is subtracted from them: as in
    `task_gradient`."""
    exact, single = _make(network()), _make(network())
    single.float()
    exact(*vectors()).loss.backward()
    single(*[tensor.float() for tensor in vectors()]).loss.backward()
    own, wanted = _plain(single, [tensor.float() for tensor in vectors()])
    own.mean().backward()
    for got, want, plain in zip(single.parameters(), exact.parameters(), wanted, strict=True):
        assert error(got.grad.double(), want.grad) <= 2 * error(plain.grad.double(), want.grad) + 1e-6


@BACKENDS
def test_adaptation_step_weights_and_rates_of_tasks(backend: str) -> None:
    x, y, query_x, query_y = vectors()
    maml = _make(network(), backend=backend, step_weights=(0.5, 0.0, 2.0))
    adapted = [maml.adapt(x, y, steps=steps) for steps in (0, STEPS)]
    losses = [(maml.predict(theta, query_x) - query_y).square().mean((1, 2)).detach() for theta in adapted]
    assert error(maml(x, y, query_x, query_y).task_losses, 0.5 * losses[0] + 2 * losses[1]) < TOLERANCE
    rates = torch.tensor([0.1, 0.0, 0.2], dtype=torch.float64).reshape(1, 3, 1, 1)
    maml = _make(network(), backend=backend, adapt="0.weight", inner_lr={"0.weight": rates})
    start = maml.net[0].weight.detach()
    assert [torch.equal(value, start) for value in maml.adapt(x, y)["0.weight"]] == [False, True, False]


def test_flat_copies_and_checkpoints() -> None:
    maml = _make(network())
    want = maml(*vectors())
    want.loss.backward()
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(other(*vectors()).loss, want.loss)
    other = fm.MetaCurvature(network(seed=4), loss="mse", inner_lr=LR, inner_steps=STEPS)
    other.load_state_dict(maml.state_dict())
    assert torch.equal(other(*vectors()).loss, want.loss)
    flat = fm.flatten(other)
    other(*vectors()).loss.backward()
    # its products are PyTorch's, whose sums depend on how their operands are aligned in memory
    assert error(flat.grad, torch.cat([value.grad.flatten() for value in maml.parameters()])) <= 1e-14


def test_training_moves_the_matrices() -> None:
    maml = fm.MetaCurvature(network(), loss="mse", inner_lr=LR, inner_steps=STEPS)
    optimizer = torch.optim.Adam(maml.extra.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out = maml(*vectors())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_rejects() -> None:
    for rule in (fm.SGD(momentum=0.9), fm.SGD(weight_decay=0.1)):
        with pytest.raises(ValueError, match="MetaCurvature: `update_rule` must"):
            _make(network(), update_rule=rule)
    with pytest.raises(ValueError, match="MetaCurvature: `inner_steps` must be at least 0"):
        _make(network(), inner_steps=-1)
    x, y, query_x, query_y = vectors()
    with pytest.raises(ValueError, match="MetaCurvature: `support_y` must be"):
        _make(network())(x, y[:2], query_x, query_y)


def test_explain_and_compile() -> None:
    maml = _make(network(), step_weights=(0.5, 0.0, 1.0))
    told = maml.explain(*vectors())
    assert told.backend == "cpu"
    assert "query losses are computed 2 times" in str(told)
    want = maml(*vectors()).loss
    assert torch.equal(torch.compile(lambda *episode: maml(*episode).loss)(*vectors()), want)
