"""`IMAML` against a dense solve with the exact Hessian, task by task, in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_autograd import MSE, adapt, episodes, error, leaves, network
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

LR, STEPS, PROXIMAL = 0.1, 5, 1.5
# of conjugate gradients; a meta-gradient is wrong by at most this times the condition number of I +
# H / lambda
CG = 1e-12
TOLERANCE = 1e-9
WIDTH = 4
HEAD = ("4.weight", "4.bias")


def _net() -> nn.Sequential:
    return network(width=WIDTH)


def _imaml(**options: Any) -> fm.IMAML:
    defaults = {"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, "proximal": PROXIMAL, "cg_tolerance": CG}
    return fm.IMAML(_net(), **{**defaults, **options})


def _inner(x: Tensor, y: Tensor, names: tuple[str, ...], steps: int = STEPS) -> dict[str, Tensor]:
    """The inner loop of one task."""
    start = dict(_net().named_parameters())
    theta = dict(start)
    for _ in range(steps):
        near = sum((theta[name] - start[name]).square().sum() for name in names)
        objective = MSE(functional_call(_net(), theta, (x,)), y) + PROXIMAL / 2 * near
        gradient = torch.autograd.grad(objective, [theta[name] for name in names])
        moved = {
            n: (theta[n] - LR * g).detach().requires_grad_() for n, g in zip(names, gradient, strict=True)
        }
        theta |= moved
    return {name: value.detach() for name, value in theta.items()}


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _dense(
    theta: dict[str, Tensor], task: list[Tensor], names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(query loss, the implicit gradient) of one task, with the whole Hessian of the support
    loss."""
    support_x, support_y, query_x, query_y = task
    order = [*names, *(name for name in theta if name not in names)]
    sizes, p = [theta[name].numel() for name in order], sum(theta[name].numel() for name in names)

    def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(order, vector.split(sizes), strict=True)
        return MSE(functional_call(_net(), {n: part.view(theta[n].shape) for n, part in parts}, (x,)), y)

    at = _flat(theta[name] for name in order).requires_grad_()
    query = loss(at, query_x, query_y)
    (gradient,) = torch.autograd.grad(query, at)
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, support_x, support_y), at.detach())
    eye = torch.eye(p, dtype=torch.float64)
    u = torch.linalg.solve(eye + hessian[:p, :p] / PROXIMAL, gradient[:p])
    total = torch.cat((u, gradient[p:] - hessian[p:, :p] @ u / PROXIMAL))
    return query.detach(), dict(zip(order, total.split(sizes), strict=True))


def _want(episode: list[Tensor], names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """(query losses [T], the meta-gradients [T, ...])."""
    tasks = [list(task) for task in zip(*episode, strict=True)]
    answers = [_dense(_inner(task[0], task[1], names), task, names) for task in tasks]
    losses, gradients = zip(*answers, strict=True)
    return torch.stack(losses), {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}


def _same(imaml: fm.IMAML, want: dict[str, Tensor]) -> bool:
    return all(
        error(p.grad, want[name].view(p.shape)) < TOLERANCE for name, p in imaml.net.named_parameters()
    )


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("names", [tuple(leaves(_net())), HEAD], ids=["all", "head"])
def test_gradient_matches_a_dense_solve(names: tuple[str, ...], backend: str) -> None:
    imaml, episode = _imaml(adapt=names, backend=backend), episodes()
    out = imaml(*episode)
    out.loss.backward()
    losses, gradients = _want(episode, names)
    assert error(out.task_losses, losses) < TOLERANCE
    assert error(out.loss.detach(), losses.mean()) < TOLERANCE
    assert out.output.shape == (3, 7, 1)
    assert _same(imaml, {name: value.mean(0) for name, value in gradients.items()})
    assert out.residuals.shape == (3,)
    assert bool((out.residuals <= CG).all())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inner_loop_matches_the_regularised_problem(backend: str) -> None:
    imaml, (x, y, query_x, _) = _imaml(backend=backend), episodes()
    adapted = imaml.adapt(x, y)
    for t in range(3):
        want = _inner(x[t], y[t], tuple(adapted))
        assert all(error(adapted[name][t], value) < TOLERANCE for name, value in want.items())
    want = functional_call(
        _net(), {name: value[2] for name, value in adapted.items()}, (query_x[2],)
    ).detach()
    assert error(imaml.predict(adapted, query_x)[2].detach(), want) < TOLERANCE
    none = imaml.adapt(x, y, steps=0)
    assert all(torch.equal(none[name][1], value) for name, value in imaml.net.named_parameters())
    assert not any(value.requires_grad for value in adapted.values())


def test_solved_inner_problems_have_the_gradient_of_the_unrolled_loop() -> None:
    episode, steps = episodes(), 400
    imaml = _imaml(inner_steps=steps, inner_lr=0.2)
    out = imaml(*episode)
    out.loss.backward()
    assert float(out.inner_residuals.max()) < 1e-10
    params = leaves(_net())
    losses = []
    for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
        theta = dict(params)
        for _ in range(steps):
            step = adapt(_net(), theta, support_x, support_y, lambda name, k: 0.2, 1)
            theta = {name: step[name] - 0.2 * PROXIMAL * (theta[name] - params[name]) for name in theta}
        losses.append(MSE(functional_call(_net(), theta, (query_x,)), query_y))
    want = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    assert _same(imaml, dict(zip(params, want, strict=True)))


def test_inner_residuals_are_the_norms_of_the_inner_gradients() -> None:
    imaml, (x, y, *query) = _imaml(), episodes()
    out = imaml(x, y, *query)
    for t in range(3):
        theta = {
            name: value.requires_grad_() for name, value in _inner(x[t], y[t], tuple(leaves(_net()))).items()
        }
        near = sum((theta[name] - value.detach()).square().sum() for name, value in _net().named_parameters())
        objective = MSE(functional_call(_net(), theta, (x[t],)), y[t]) + PROXIMAL / 2 * near
        gradient = _flat(torch.autograd.grad(objective, list(theta.values())))
        assert error(out.inner_residuals[t], gradient.norm()) < TOLERANCE


def test_task_weights_scale_the_systems() -> None:
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    imaml, episode = _imaml(), episodes()
    out = imaml(*episode, task_weights=weights)
    out.loss.backward()
    losses, gradients = _want(episode, tuple(leaves(_net())))
    assert error(out.loss.detach(), (weights * losses).mean()) < TOLERANCE
    assert _same(imaml, {name: (weights[:, None] * value).mean(0) for name, value in gradients.items()})
    assert float(out.residuals[1]) == 0.0


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_losses_norms_and_example_weights_match_reference(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    x, query_x = (torch.randn(3, n, 2, generator=generator) for n in (6, 5))
    y, query_y = (torch.randint(0, 3, (3, n), generator=generator) for n in (6, 5))
    weights, query_weights = (torch.rand(3, n, generator=generator) for n in (6, 5))
    options: dict[str, Any] = {"inner_lr": 0.05, "inner_steps": 3, "proximal": 8.0, "weight_norm": "sum"}

    def gradient(backend: str, dtype: torch.dtype, tolerance: float) -> Tensor:
        imaml = fm.IMAML(
            copy.deepcopy(net).to(dtype),
            loss="cross_entropy",
            backend=backend,
            cg_tolerance=tolerance,
            **options,
        )
        batch = (x.to(dtype), y, query_x.to(dtype), query_y)
        imaml(
            *batch, support_weights=weights.to(dtype), query_weights=query_weights.to(dtype)
        ).loss.backward()
        return _flat(p.grad for p in imaml.parameters())

    want = gradient("reference", torch.float64, CG)
    assert error(gradient(backend, torch.float64, CG), want) < TOLERANCE
    assert error(gradient(backend, torch.float32, 1e-5).double(), want) < 1e-4


def test_systems_that_are_not_solved_are_reported_with_their_tasks() -> None:
    episode = episodes()
    imaml = _imaml(cg_steps=2, cg_tolerance=1e-3, proximal=0.5)
    with torch.no_grad():
        episode[3][1] = imaml(*episode).output[
            1
        ]  # task 1 has nothing to improve on: a right-hand side of zero
    with pytest.warns(
        RuntimeWarning, match=r"IMAML: after 2 .* 2 of 3 systems .*0\.001: tasks 0, 2, largest residual"
    ):
        out = imaml(*episode)
    assert (out.residuals > 1e-3).tolist() == [True, False, True]


def test_residuals_are_those_of_the_gradient_returned() -> None:
    task = [tensor[:1] for tensor in episodes()]
    imaml = _imaml(cg_steps=3, cg_tolerance=1e-9)
    with pytest.warns(RuntimeWarning, match=r"1 of 1 systems .*: task 0,"):
        out = imaml(*task)
    out.loss.backward()
    names = tuple(leaves(_net()))
    one = [tensor[0] for tensor in task]
    theta = _inner(one[0], one[1], names)
    u = _flat(p.grad for p in imaml.parameters())

    def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(names, vector.split([theta[name].numel() for name in names]), strict=True)
        return MSE(functional_call(_net(), {n: part.view(theta[n].shape) for n, part in parts}, (x,)), y)

    at = _flat(theta.values())
    b = torch.autograd.functional.jacobian(lambda v: loss(v, one[2], one[3]), at)
    hu = torch.autograd.functional.hvp(lambda v: loss(v, one[0], one[1]), at, u)[1]
    want = (b - u - hu / PROXIMAL).norm() / b.norm()
    assert error(out.residuals[0], want) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_each_task_converges_by_itself(backend: str) -> None:
    x, y, query_x, query_y = episodes()
    x[1] *= 2  # systems that take different numbers of steps
    y[2] *= 0.1
    together = _imaml(backend=backend, cg_tolerance=1e-6, proximal=4.0)
    out = together(x, y, query_x, query_y)
    assert bool((out.residuals <= 1e-6).all())
    total = [torch.zeros_like(p) for p in together.parameters()]
    for t in range(3):
        alone = _imaml(backend=backend, cg_tolerance=1e-6, proximal=4.0)
        alone(*(tensor[t : t + 1] for tensor in (x, y, query_x, query_y))).loss.backward()
        total = [sum_ + p.grad / 3 for sum_, p in zip(total, alone.parameters(), strict=True)]
    out.loss.backward()
    for p, want in zip(together.parameters(), total, strict=True):
        assert error(p.grad, want) < TOLERANCE


def test_negative_curvature_is_reported() -> None:
    # mean of -theta^2: the Hessian is -2, and lambda = 1 does not outweigh it
    class Concave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.theta.expand(x.shape[0], 1) * x

    x = torch.ones(2, 3, 1, dtype=torch.float64)
    imaml = fm.IMAML(
        Concave(),
        loss=lambda o, t: -(o - t).square().mean(),
        inner_lr=0.1,
        inner_steps=2,
        proximal=1.0,
        query_loss="mse",
    )
    with pytest.warns(
        RuntimeWarning, match=r"2 of 2 systems .* negative curvature in tasks 0, 1: `proximal`"
    ):
        out = imaml(x, 0 * x, x, 0 * x)
    assert torch.equal(out.residuals, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_diverged_tasks_are_counted_and_named(backend: str) -> None:
    episode = episodes()
    episode[1][0] = torch.inf
    imaml = _imaml(backend=backend)
    with pytest.raises(FloatingPointError, match=r"IMAML: 1 of 3 tasks diverged.*: task 0$"):
        imaml(*episode)
    episode[3][2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"IMAML: 2 of 3 tasks diverged.*: tasks 0, 2$"):
        imaml(*episode)
    assert all(p.grad is None for p in imaml.parameters())
    with torch.no_grad():
        assert imaml(*episode).task_losses.isfinite().tolist() == [False, True, False]


def test_gradients_follow_the_rules_of_autograd() -> None:
    imaml, episode = _imaml(adapt="*"), episodes()
    imaml(*episode).loss.backward()
    once = [p.grad.clone() for p in imaml.parameters()]
    imaml(*episode).loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(imaml.parameters(), once, strict=True))
    with torch.no_grad():
        out = imaml(*episode)
    assert not out.loss.requires_grad
    assert out.residuals is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        imaml(*episode).task_losses.mean().backward()
    imaml.net[0].weight.requires_grad_(False)
    imaml.zero_grad()
    imaml(*episode).loss.backward()
    assert imaml.net[0].weight.grad is None
    assert torch.equal(imaml.net[0].bias.grad, once[1])
    assert list(imaml.state_dict()) == [f"net.{name}" for name, _ in imaml.net.named_parameters()]
    assert torch.equal(copy.deepcopy(imaml)(*episode).loss, imaml(*episode).loss)


def test_explain_names_the_backend_and_what_comes_on_top() -> None:
    x, y = episodes()[:2]
    told = _imaml(cg_steps=7).explain(x, y)
    assert told.backend == "cpu"
    assert "at most 7 steps of conjugate gradients" in str(told)


def test_ordinary_optimiser_trains() -> None:
    imaml, episode = _imaml(), episodes()
    optimizer = torch.optim.Adam(imaml.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        out = imaml(*episode)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("support_x", torch.zeros(3, 5, 2)),
        ("support_y", torch.zeros(3, 5).double()),
        ("query_x", torch.zeros(2, 7, 2).double()),
        ("query_x", None),
        ("query_y", torch.zeros(3, 7, 1).double().requires_grad_()),
        ("task_weights", torch.ones(2).double()),
        ("query_weights", torch.ones(3, 2).double()),
    ],
)
def test_rejects_tensors(field: str, bad: Tensor, backend: str) -> None:
    good = dict(zip(["support_x", "support_y", "query_x", "query_y"], episodes(), strict=True))
    with pytest.raises((ValueError, TypeError), match=f"IMAML: `{field}`"):
        _imaml(backend=backend)(**{**good, field: bad})


def test_rejects_inputs_of_another_width() -> None:
    _, y, query_x, query_y = episodes()
    with pytest.raises(ValueError, match=r"IMAML: `support_x` must be \[T, N, 2\]"):
        _imaml()(torch.zeros(3, 5, 4).double(), y, query_x, query_y)


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("inner_lr", -0.1),
        ("inner_lr", torch.tensor(0.1)),
        ("inner_steps", -1),
        ("inner_steps", 2.0),
        ("proximal", 0.0),
        ("proximal", float("inf")),
        ("proximal", "strong"),
        ("cg_steps", 0),
        ("cg_steps", 2.5),
        ("cg_tolerance", 0.0),
        ("adapt", ["no.such.weight"]),
        ("backend", "gpu"),
    ],
)
def test_rejects_options(option: str, bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match=f"IMAML: `{option}`"):
        _imaml(**{option: bad})


def test_rejects_steps_to_adapt_by() -> None:
    x, y = episodes()[:2]
    with pytest.raises(TypeError, match=r"IMAML.adapt: `steps` must be an int, got 1.5"):
        _imaml().adapt(x, y, steps=1.5)
    with pytest.raises(ValueError, match=r"IMAML.adapt: `steps` must be at least 0"):
        _imaml().adapt(x, y, steps=-1)
    with pytest.raises(TypeError, match=r"IMAML.adapt: `y`"):
        _imaml().adapt(x, None)
