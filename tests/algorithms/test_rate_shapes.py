"""Learning rates of every shape between one number and one an element, and their gradients in that
shape."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from plain_autograd import error
from problems import make_problem, mlp
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends._rates import rate_form
from fastmeta.backends.cuda.compile import host_compiler
from fastmeta.capture.capture import captured

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, STEPS, TOLERANCE = 2, 2, 1e-9
BACKENDS = ["reference", "torch", "cpu"]
LEADS = [(1, 1), (STEPS, 1), (1, TASKS), (STEPS, TASKS)]
needs_compiler = pytest.mark.skipif(not host_compiler(), reason="no C++ compiler to stand in for a GPU")


class Scaled(nn.Module):
    """A convolution, then a linear layer, and a number that scales what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1)) * self.scale


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)), (2, 2, 3)),
    "scaled": (Scaled, (2, 2, 3)),
}


def between(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every shape of the same rank that broadcasts to `shape`."""
    return list(dict.fromkeys(product(*[(1, size) for size in shape])))


def _made(name: str) -> tuple[nn.Module, list[Tensor]]:
    make, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().double()
    generator = torch.Generator().manual_seed(1)
    sizes = [(TASKS, 4, *shape), (TASKS, 4, 2), (TASKS, 3, *shape), (TASKS, 3, 2)]
    return net, [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def _rates(shapes: dict[str, tuple[int, ...]], seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 + 0.1 * torch.rand(shape, generator=generator).double() for name, shape in shapes.items()
    }


def _plain(
    net: nn.Module, episode: list[Tensor], rates: dict[str, Tensor], keys: dict[str, str]
) -> list[Tensor]:
    """The mean query loss by parameters and rates, in a loop."""
    params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    lr = {name: rate.detach().clone().requires_grad_() for name, rate in rates.items()}
    total = torch.zeros((), dtype=torch.float64)
    for t, (sx, sy, qx, qy) in enumerate(zip(*episode, strict=True)):
        theta = dict(params)
        for k in range(STEPS):
            loss = (functional_call(net, theta, (sx,)) - sy).square().mean()
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            for (name, value), g in zip(list(theta.items()), grads, strict=True):
                rate = lr[keys[name]]
                theta[name] = value - rate[k % rate.shape[0], t % rate.shape[1]] * g
        total = total + (functional_call(net, theta, (qx,)) - qy).square().mean() / TASKS
    return list(torch.autograd.grad(total, [*params.values(), *lr.values()]))


def _found(
    net: nn.Module, episode: list[Tensor], rates: dict[str, Tensor], backend: str, **options: object
) -> fm.MetaGradient:
    params = {name: value.detach() for name, value in net.named_parameters()}
    sets = (episode[0], episode[1]), (episode[2], episode[3])
    call = {
        "loss": "mse",
        "lr": rates,
        "steps": STEPS,
        "wrt": ("params", "lr"),
        "backend": backend,
        **options,
    }
    return fm.meta_gradient(net, params, *sets, **call)


def _check(net: nn.Module, episode: list[Tensor], rates: dict[str, Tensor], names: list[str]) -> None:
    want = _plain(net, episode, rates, {name: name for name, _ in net.named_parameters()})
    for backend in names:
        got = _found(net, episode, rates, backend)
        for found, wanted in zip([*got.grads.values(), *got.lr.values()], want, strict=True):
            assert error(found, wanted) < TOLERANCE, backend


@pytest.mark.parametrize("name", NETS)
def test_rates_between_one_and_all_match_autograd(name: str) -> None:
    """Every shape for every parameter, the leading dimensions going round beside them."""
    net, episode = _made(name)
    shapes = {n: between(tuple(p.shape)) for n, p in net.named_parameters()}
    for i in range(max(map(len, shapes.values()))):
        lead = LEADS[i % len(LEADS)]
        rates = _rates({n: (*lead, *forms[i % len(forms)]) for n, forms in shapes.items()}, i)
        names = ["reference", "torch"] if name == "scaled" else BACKENDS
        _check(net, episode, rates, names)


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_rates_of_rows_and_columns_with_every_lead_match_autograd(lead: tuple[int, int]) -> None:
    net, episode = _made("linear")
    for last in (True, False):
        shapes = {
            n: (*lead, *([1] * (p.dim() - 1) + [p.shape[-1]] if last else [p.shape[0]] + [1] * (p.dim() - 1)))
            for n, p in net.named_parameters()
        }
        _check(net, episode, _rates(shapes), BACKENDS)


@needs_compiler
def test_rates_between_on_cuda_match_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    net, episode = _made("linear")
    forms = {"0.weight": (2, 1, 4, 1), "0.bias": (1, 2, 4), "2.weight": (1, 1, 1, 4), "2.bias": (1, 1, 1)}
    _check(net, episode, _rates(forms), ["cuda"])


def test_one_entry_for_several_parameters_matches_autograd() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    generator = torch.Generator().manual_seed(1)
    episode = [torch.randn(TASKS, 4, 4, generator=generator).double() for _ in range(4)]
    keys = {name: "*.weight" if name.endswith("weight") else "*.bias" for name, _ in net.named_parameters()}
    for weight in ((1, 1, 4, 1), (STEPS, 1, 1, 4), (1, TASKS, 1, 1)):
        rates = _rates({"*.weight": weight, "*.bias": (1, 1, 1)})
        want = _plain(net, episode, rates, keys)
        for backend in BACKENDS:
            got = _found(net, episode, rates, backend)
            assert list(got.lr) == ["*.weight", "*.bias"]
            for found, wanted in zip([*got.grads.values(), *got.lr.values()], want, strict=True):
                assert error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_inner_sgd_differentiates_by_rates_between(backend: str) -> None:
    net, episode = _made("linear")
    rates = _rates(
        {"0.weight": (1, 1, 4, 1), "0.bias": (STEPS, 1, 4), "2.weight": (1, TASKS, 1, 4), "2.bias": (1, 1, 1)}
    )
    want = _plain(net, episode, rates, {name: name for name in rates})[4:]
    lr = {name: rate.requires_grad_() for name, rate in rates.items()}
    params = {name: value.detach() for name, value in net.named_parameters()}
    theta = fm.inner_sgd(net, params, *episode[:2], loss="mse", lr=lr, steps=STEPS, backend=backend)
    output = fm.task_forward(net, theta, episode[2], backend=backend)
    (output - episode[3]).square().mean().backward()
    for rate, wanted in zip(lr.values(), want, strict=True):
        assert error(rate.grad, wanted) < TOLERANCE


def test_algorithms_take_rates_between() -> None:
    net, episode = _made("linear")
    rates = _rates(
        {"0.weight": (1, 1, 4, 1), "0.bias": (1, 1, 4), "2.weight": (STEPS, 1, 1, 4), "2.bias": (1, 1, 1)}
    )
    want = _plain(net, episode, rates, {name: name for name in rates})
    options = {"loss": "mse", "inner_lr": rates, "inner_steps": STEPS}
    sgd = fm.MetaSGD(net, **options, lr_per_step=True)
    for maml in (fm.MAML(net, **options), fm.MetaCurvature(net, **options), sgd):
        net.zero_grad()
        maml(*episode).loss.backward()
        for parameter, wanted in zip(net.parameters(), want[:4], strict=True):
            assert error(parameter.grad, wanted) < TOLERANCE, type(maml)
        assert maml.explain(*episode).backend == "cpu"
    assert sgd.inner_lrs["0__weight"].shape == (STEPS, 1, 4, 3)
    for name, wanted in zip(rates, want[4:], strict=True):
        gradient = sgd.inner_lrs[name.replace(".", "__")].grad
        assert error(gradient.sum_to_size(wanted.shape), wanted) < TOLERANCE
    three = fm.MAML(net, **options).adapt(*episode[:2], steps=3)  # the last step's repeat
    again = {
        name: torch.cat([rate, rate[-1:]]) if rate.shape[0] > 1 else rate for name, rate in rates.items()
    }
    longer = fm.MAML(net, **{**options, "inner_lr": again, "inner_steps": 3}).adapt(*episode[:2])
    assert all(torch.equal(three[name], value) for name, value in longer.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_of_no_steps_have_an_empty_gradient(backend: str) -> None:
    net, episode = _made("linear")
    rates = _rates(
        {"0.weight": (0, 1, 4, 1), "0.bias": (1, 1, 4), "2.weight": (0, TASKS, 2, 4), "2.bias": (1, 2, 1)}
    )
    got = _found(net, episode, rates, backend, steps=0)
    assert {name: gradient.shape for name, gradient in got.lr.items()} == {
        n: r.shape for n, r in rates.items()
    }
    assert not any(gradient.any() for gradient in got.lr.values())


def test_rejects_rates_that_do_not_broadcast() -> None:
    net, episode = _made("linear")
    for shape in ((1, 1, 4, 2), (1, 1, 3), (1, 1, 3, 4), (3, 1, 4, 3), (1, 3, 4, 3), (0, 1, 4, 3)):
        with pytest.raises(ValueError, match=r"`lr`\['0.weight'\] must be .* got"):
            _found(net, episode, {**_rates({"0.weight": shape}), "0.bias": 0.1, "2.*": 0.1}, "cpu")
    rates = {**_rates({"0.weight": (1, 1, 4, 1)}), "0.bias": 0.1, "2.*": 0.1}
    with pytest.raises(
        ValueError, match=r"\['0.weight'\] must broadcast to \(1, 1, 1, 1\), .* got \(1, 1, 4, 1\)"
    ):
        fm.MAML(net, loss="mse", inner_lr=rates, inner_steps=1, learn_lr="tensor")
    empty = fm.MAML(net, loss="mse", inner_lr=torch.zeros(0).double(), inner_steps=0)
    with pytest.raises(ValueError, match=r"0 inner steps"):
        empty.adapt(*episode[:2], steps=2)


def test_rejects_rates_between_that_no_operator_laid_out() -> None:
    problem = make_problem(mlp())
    problem.program, _ = captured(problem.net, (3,), torch.float64)
    problem.rates["0.weight"] = torch.full((1, 1, 13, 1), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rates of '0.weight' must be .* got \(1, 1, 13, 1\)"):
        rate_form(problem, "0.weight", (13, 3))
    with pytest.raises(ValueError, match=r"rates of '0\.weight'"):
        backends.get("cpu").solve(problem, frozenset({"params", "lr"}), False)
