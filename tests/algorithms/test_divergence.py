"""One diverged task: the others' losses, and the meta-gradient without it, against a plain loop
over the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_autograd import all_near, episodes, error, leaves, meta_losses, network
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends import cpu
from fastmeta.backends.cuda.compile import host_compiler

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, STEPS, LR, TOLERANCE = 4, 2, 0.1, 1e-9
LEFT, BAD = [0, 2, 3], 1
BACKENDS = ["reference", "torch", "cpu"]
needs_compiler = pytest.mark.skipif(not host_compiler(), reason="no C++ compiler to stand in for a GPU")


def _broken(task: int = BAD, value: float = float("nan"), field: int = 0) -> list[Tensor]:
    episode = episodes(TASKS)
    episode[field][task, 0, 0] = value
    return episode


def _maml(**options: Any) -> fm.MAML:
    return fm.MAML(network(), **{"loss": "mse", "inner_lr": LR, "inner_steps": STEPS, **options})


def _of(tensors: list[Tensor], tasks: list[int]) -> list[Tensor]:
    return [tensor[tasks] for tensor in tensors]


def _plain(weights: Tensor | None = None, count: int = len(LEFT)) -> tuple[Tensor, list[Tensor]]:
    """(the loss, its gradients) over the tasks that are left."""
    params = leaves(network())
    losses = meta_losses(network(), params, _of(episodes(TASKS), LEFT), LR, STEPS)
    loss = (losses if weights is None else losses * weights[LEFT]).sum() / count
    return loss.detach(), list(torch.autograd.grad(loss, list(params.values())))


def _skipped(call: Callable[[], Any]) -> Any:
    with pytest.warns(RuntimeWarning, match=r"1 of 4 tasks diverged, left out .*: task 1$"):
        return call()


def _same(module: nn.Module, want: list[Tensor]) -> bool:
    return all_near([p.grad for p in module.parameters()], want)


#: One input or target that makes its task diverge: the place of its tensor in an episode, and its
#: value.
FAULTS = [(0, float("nan")), (0, float("inf")), (1, 1e200), (2, float("nan"))]


@pytest.mark.parametrize(
    ("backend", "field", "value"),
    [(backend, *fault) for backend in BACKENDS for fault in FAULTS]
    + [pytest.param("cuda", *FAULTS[1], marks=needs_compiler)],
)
def test_other_tasks_losses_match_those_without_it(
    backend: str, field: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    maml = _maml(backend=backend, on_divergence="keep")
    with torch.no_grad():
        whole, alone = maml(*episodes(TASKS)), maml(*_broken(value=value, field=field))
    assert torch.equal(whole.task_losses[LEFT], alone.task_losses[LEFT])
    assert torch.equal(whole.output[LEFT], alone.output[LEFT])
    assert whole.task_losses.isfinite().all()
    assert not alone.task_losses[BAD].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipping_matches_autograd_over_the_rest(backend: str) -> None:
    maml = _maml(backend=backend, on_divergence="skip")
    out = _skipped(lambda: maml(*_broken()))
    loss, want = _plain()
    out.loss.backward()
    assert error(out.loss.detach(), loss) < TOLERANCE
    assert _same(maml.net, want)
    assert out.task_losses[BAD].isnan()
    assert error(out.task_losses[LEFT].mean(), loss) < TOLERANCE
    with torch.no_grad():
        assert error(_skipped(lambda: maml(*_broken())).loss, loss) < TOLERANCE


@pytest.mark.parametrize("choice", ["raise", "skip", "keep"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_zero_contributes_nothing(backend: str, choice: str) -> None:
    """The mean is over T as always; nobody is warned."""
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    loss, want = _plain(weights, TASKS)
    maml = _maml(backend=backend, on_divergence=choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = maml(*_broken(), weights)
    out.loss.backward()
    assert error(out.loss.detach(), loss) < TOLERANCE
    assert _same(maml.net, want)
    episode = _broken()
    got = fm.meta_gradient(
        maml.net,
        dict(maml.net.named_parameters()),
        (episode[0], episode[1]),
        (episode[2], episode[3]),
        loss="mse",
        lr=LR,
        steps=STEPS,
        task_weights=weights,
        wrt=("params", "lr", "support_x"),
        backend=backend,
    )
    assert error(got.loss, loss) < TOLERANCE
    assert all(error(g, w) < TOLERANCE for g, w in zip(got.grads.values(), want, strict=True))
    assert got.lr.isfinite()
    assert not got.support_x[BAD].any()
    nothing = maml(*_broken(), torch.zeros(TASKS, dtype=torch.float64))
    maml.zero_grad()
    nothing.loss.backward()
    assert not any(p.grad.any() for p in maml.parameters())
    assert nothing.loss == 0


def test_skipped_and_weightless_tasks_together_match_autograd() -> None:
    weights = torch.tensor([0.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    loss, want = _plain(weights, TASKS - 1)
    maml = _maml(on_divergence="skip")
    episode = _broken()
    episode[0][0] = torch.nan  # has no weight
    out = _skipped(lambda: maml(*episode, weights))
    out.loss.backward()
    assert error(out.loss.detach(), loss) < TOLERANCE
    assert _same(maml.net, want)


class Root(nn.Module):
    """The mean squared error, whose gradient is not finite where targets are large."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        small = (target.abs().sum() < 1e3).to(
            output.dtype
        )  # 1 or 0, of which the square root has no derivative
        return (output - target).square().mean() + (small + 0 * output.sum()).sqrt() - small


def test_finite_loss_with_a_gradient_that_is_not() -> None:
    episode = episodes(TASKS)
    episode[3][BAD] = 1e4
    whole = _maml(query_loss=Root(), on_divergence="keep")(*episode)
    assert whole.task_losses.isfinite().all()
    maml = _maml(query_loss=Root(), on_divergence="skip")
    out = _skipped(lambda: maml(*episode))
    out.loss.backward()
    loss, want = _plain()
    assert error(out.loss.detach(), loss) < TOLERANCE
    assert _same(maml.net, want)
    assert torch.equal(out.task_losses, whole.task_losses)
    weighted = _maml(query_loss=Root())  # raising does not look at gradients, but a weight of zero does
    weighted(*episode, torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)).loss.backward()
    assert _same(weighted.net, [w * len(LEFT) / TASKS for w in want])


ALGORITHMS: dict[str, Callable[..., Any]] = {
    "fomaml": lambda net, **o: fm.FOMAML(net, inner_lr=LR, inner_steps=STEPS, **o),
    "anil": lambda net, **o: fm.ANIL(net, inner_lr=LR, inner_steps=STEPS, **o),
    "boil": lambda net, **o: fm.BOIL(net, inner_lr=LR, inner_steps=STEPS, **o),
    "meta_sgd": lambda net, **o: fm.MetaSGD(net, inner_lr=LR, inner_steps=STEPS, **o),
    "scalar": lambda net, **o: fm.MAML(
        net, inner_lr=LR, inner_steps=STEPS, learn_lr="scalar", lr_per_step=True, **o
    ),
    "meta_curvature": lambda net, **o: fm.MetaCurvature(
        net, inner_lr=LR, inner_steps=STEPS, learn_lr="tensor", **o
    ),
    "maml_plus_plus": lambda net, **o: fm.MAMLPlusPlus(
        nn.Sequential(net[0], nn.LayerNorm(13).double(), *net[1:]),
        inner_lr=LR,
        inner_steps=STEPS,
        multi_step_epochs=3,
        first_order_epochs=0,
        **o,
    ),
    "imaml": lambda net, **o: fm.IMAML(
        net, inner_lr=LR, inner_steps=STEPS, proximal=20.0, cg_tolerance=1e-6, **o
    ),
    "reptile": lambda net, **o: fm.Reptile(net, inner_lr=LR, inner_steps=STEPS, **o),
}


def _call(algorithm: Any, episode: list[Tensor], *weights: Tensor) -> Any:
    return algorithm(*(episode[:2] if isinstance(algorithm, fm.Reptile) else episode), *weights)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_skips_and_ignores(name: str) -> None:
    """As the same algorithm on the other tasks alone, which its own tests compare with plain
    loops."""
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    alone = ALGORITHMS[name](network(), loss="mse")
    out = _call(alone, _of(episodes(TASKS), LEFT))
    out.loss.backward()
    want = [p.grad.clone() for p in alone.parameters()]
    skipping = ALGORITHMS[name](network(), loss="mse", on_divergence="skip")
    got = _skipped(lambda: _call(skipping, _broken()))
    got.loss.backward()
    assert error(got.loss.detach(), out.loss.detach()) < TOLERANCE
    assert _same(skipping, want)
    assert not got.task_losses[BAD].isfinite()
    assert torch.allclose(got.task_losses[LEFT], out.task_losses, rtol=1e-9)
    alone.zero_grad()
    weighted = _call(alone, _of(episodes(TASKS), LEFT), weights[LEFT] * len(LEFT) / TASKS)
    weighted.loss.backward()
    want = [p.grad.clone() for p in alone.parameters()]
    raising = ALGORITHMS[name](network(), loss="mse")
    got = _call(raising, _broken(), weights)
    got.loss.backward()
    assert error(got.loss.detach(), weighted.loss.detach()) < TOLERANCE
    assert _same(raising, want)
    with pytest.raises(FloatingPointError, match=r"1 of 4 tasks diverged, .* not finite: task 1$"):
        _call(raising, _broken())
    with pytest.raises(FloatingPointError, match=r"1 of 4 tasks diverged, .* not finite: task 1$"):
        _call(raising, _broken(), weights.flip(0) + torch.tensor([1.0, 1.0, -2.0, 0.0], dtype=torch.float64))
    everything = [torch.full_like(tensor, torch.nan) for tensor in episodes(TASKS)]
    with pytest.raises(FloatingPointError, match=r"4 of 4 tasks diverged, none is left: tasks 0, 1, 2, 3$"):
        _call(skipping, everything)
    keeping = ALGORITHMS[name](network(), loss="mse", on_divergence="keep")
    kept = _call(keeping, _broken())
    kept.loss.backward()
    assert not kept.loss.isfinite()
    assert any(not p.grad.isfinite().all() for p in keeping.parameters())
    with pytest.raises(ValueError, match=r"`on_divergence` must be 'raise', 'skip' or 'keep', got 'drop'"):
        ALGORITHMS[name](network(), loss="mse", on_divergence="drop")


@pytest.mark.parametrize("name", ["maml", "meta_curvature"])
def test_inputs_rates_and_steps_match_those_of_the_rest(name: str) -> None:
    """Rates of every task's own, a support set a step, example weights, masks, and gradients of all
    inputs."""
    generator = torch.Generator().manual_seed(5)

    def positive(*shape: int) -> Tensor:
        return 0.05 + 0.1 * torch.rand(shape, generator=generator).double()

    params = dict(network().named_parameters())
    rates = {
        n: positive(STEPS, TASKS, *p.shape) if p.dim() > 1 else positive(1, 1, *p.shape)
        for n, p in params.items()
    }
    x, y, qx, qy = _broken()
    inputs = [torch.stack([x, x.flip(1)], 1), torch.stack([y, y.flip(1)], 1), qx, qy, 10 * positive(TASKS)]
    inputs += [10 * positive(TASKS, STEPS, 5), positive(TASKS, 7) > 0.1]
    inputs[6][:, 0] = True
    make = fm.MAML if name == "maml" else fm.MetaCurvature

    def run(tensors: list[Tensor], rates: dict[str, Tensor], **options: Any) -> tuple[Any, list[Tensor]]:
        own = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
        module = make(network(), loss="mse", inner_lr=rates, inner_steps=STEPS, **options)
        out = module(*own, support_per_step=True)
        out.loss.backward()
        return out, [*[p.grad for p in module.parameters()], *[t.grad for t in own if t.is_floating_point()]]

    got, gradients = _skipped(lambda: run(inputs, rates, on_divergence="skip"))
    few = {n: rate[:, LEFT] if rate.shape[1] > 1 else rate for n, rate in rates.items()}
    want, wanted = run(_of(inputs, LEFT), few)
    assert error(got.loss.detach(), want.loss.detach()) < TOLERANCE
    for mine, other in zip(gradients, wanted, strict=True):
        if mine.shape != other.shape:
            assert not mine[BAD].any()
            mine = mine[LEFT]
        assert error(mine, other) < TOLERANCE


def test_cavia_and_flat_parameters_skip_too() -> None:
    net = nn.Sequential(fm.Context(3), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    results = []
    for choice, episode in (("skip", _broken()), ("raise", _of(episodes(TASKS), LEFT))):
        net.zero_grad()
        cavia = fm.CAVIA(net, loss="mse", inner_lr=LR, inner_steps=STEPS, on_divergence=choice)
        out = _skipped(lambda c=cavia, e=episode: c(*e)) if choice == "skip" else cavia(*episode)
        out.loss.backward()
        results.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(error(a, b) < TOLERANCE for a, b in zip(*results, strict=True))
    maml = _maml(on_divergence="skip", learn_lr="tensor")
    flat = fm.flatten(maml)
    _skipped(lambda: maml(*_broken())).loss.backward()
    want = _maml(learn_lr="tensor")
    want(*_of(episodes(TASKS), LEFT)).loss.backward()
    assert error(flat.grad, torch.cat([p.grad.flatten() for p in want.parameters()])) < TOLERANCE


def test_skipping_under_the_compiler_matches_autograd_over_the_rest() -> None:
    maml = _maml(on_divergence="skip")
    step = torch.compile(lambda *episode: maml(*episode).loss, backend="aot_eager", fullgraph=True)
    loss = _skipped(lambda: step(*_broken()))
    loss.backward()
    want, gradients = _plain()
    assert error(loss.detach(), want) < TOLERANCE
    assert _same(maml.net, gradients)


def test_nothing_is_computed_again_while_all_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    solve = cpu.solve
    monkeypatch.setattr(cpu, "solve", lambda *args: calls.append(1) or solve(*args))
    for choice in ("raise", "skip", "keep"):
        maml = _maml(on_divergence=choice)
        maml(*episodes(TASKS))
        calls.clear()
        maml(*episodes(TASKS)).loss.backward()
        assert len(calls) == 1
