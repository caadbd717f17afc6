"""Tensors that require grad and that a loss or a network reads past its arguments get their
gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captured import RATE, STEPS, TOLERANCE, compare, inner, learned, maml, plain, tensor
from plain_autograd import MSE, episodes, error, network
from torch import Tensor, nn

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


BACKENDS = ("torch", "reference")


ORDERS = ("first", "second")


GLOBAL = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


class Holder:
    """An object of the user's."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.weight * MSE(output, target)


class LearnedLoss(nn.Module):
    """A loss network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(seed=5, width=3)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.net(torch.cat([output, target], -1)).square().mean()


class Doubled(torch.autograd.Function):
    """Called without PyTorch's functions seeing its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return 2 * scale * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return 2 * scale * grad, (2 * x * grad).sum()


class Modulated(nn.Module):
    """A network whose features something from elsewhere scales."""

    def __init__(self, scale: Callable[[], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.scale()))


def losses() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]]:
    """(a loss, what it reads)."""
    a, z, net = tensor(), tensor(3), LearnedLoss()
    hyper = nn.Linear(3, 2).double()
    v = hyper(z)  # made outside, once
    held, pieces = {"list": [tensor(seed=7)]}, z.unbind()
    module = LearnedLoss()
    return {
        "closure": (lambda o, y: a * MSE(o, y), [a]),
        "default": (lambda o, y, w=a: w.exp() * MSE(o, y), [a]),
        "partial": (partial(lambda w, o, y: w * MSE(o, y), a), [a]),
        "attribute": (Holder(a), [a]),
        "global": (lambda o, y: GLOBAL * MSE(o, y), [GLOBAL]),
        "container": (lambda o, y: held["list"][0] * MSE(o, y), held["list"]),
        "network behind a lambda": (lambda o, y: net(o, y), list(net.parameters())),
        "module": (module, list(module.parameters())),
        "made by a network": (lambda o, y: (o - y - v[0]).square().mean() * v[1], [z, *hyper.parameters()]),
        "pieces": (lambda o, y: (o * pieces[0] - y * pieces[1]).square().mean() * a, [z, a]),
        "made and made of": (lambda o, y: (o * v.sum() - y * z[0]).square().mean(), [z, *hyper.parameters()]),
        "function": (lambda o, y: MSE(Doubled.apply(o, a), y), [a]),
        "function of made and made of": (
            lambda o, y: MSE(Doubled.apply(o, z[0] * a), y * v[0]),
            [a, z, hyper.weight],
        ),
        "transposed": (lambda o, y: MSE(o @ net.net[4].weight.mT[:1], y), [net.net[4].weight]),
        "list of tensors": (lambda o, y: torch.cat([o - y, a.expand(2, 1)]).square().mean(), [a]),
        "einsum": (lambda o, y: torch.einsum("nd,nd,k->", o, o - y, a.expand(1)), [a]),
        "argument by name": (lambda o, y: torch.square(o - y).mean().mul(other=a), [a]),
    }


def forwards() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """(a network, what it reads)."""
    a, z, hyper = tensor(3), tensor(2), nn.Linear(2, 3).double()
    film = hyper(z)
    attribute, buffer = Modulated(lambda: attribute.here), Modulated(lambda: buffer.there)
    attribute.here = a
    buffer.register_buffer("there", film)
    return {
        "closure": (Modulated(lambda: a), [a]),
        "computed inside": (Modulated(lambda: a.exp()), [a]),
        "made by a network": (Modulated(lambda: film), [z, *hyper.parameters()]),
        "another network": (Modulated(lambda: hyper(z)), [z, *hyper.parameters()]),
        "attribute": (attribute, [a]),
        "buffer": (buffer, [z, *hyper.parameters()]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", losses())
def test_captured_by_a_loss_matches_reference(name: str, order: str, backend: str) -> None:
    for where in ("loss", "query_loss"):
        loss, read = losses()[name]
        net = network(width=3)
        both = {"loss": MSE, "query_loss": MSE, where: loss}
        expected = plain(net, both["loss"], both["query_loss"], order)
        value = maml(net, order=order, backend=backend, **both)(*episodes()).loss
        compare(value, expected, [*net.parameters(), *read])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", forwards())
def test_captured_by_a_forward_matches_reference(name: str, order: str, backend: str) -> None:
    net, read = forwards()[name]
    value = maml(net, order=order, backend=backend)(*episodes()).loss
    compare(value, plain(net, MSE, MSE, order), [*net.parameters(), *read])


@pytest.mark.parametrize(
    "options", [{"memory": "recompute"}, {"task_chunk": 2}, {"task_chunk": 1, "memory": "store"}]
)
def test_memory_and_chunks_match_reference(options: dict[str, Any]) -> None:
    net, weight, film = network(width=3), tensor(), tensor(seed=4)
    film = film.exp()
    given = {
        "loss": lambda o, y: weight * MSE(o * film, y),
        "query_loss": lambda o, y: weight.sin() * MSE(o + film, y),
    }
    leaves = [*net.parameters(), weight]
    expected = plain(net, given["loss"], given["query_loss"], "second")
    compare(maml(net, backend="torch", **given, **options)(*episodes()).loss, expected, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_single_tasks_and_steps_match_reference(backend: str) -> None:
    """Each evaluation may read something else."""
    weights = [tensor(seed=seed) for seed in range(4)]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return weights[int(output.detach().sum() * 40) % 3] * MSE(output, target)

    def query(output: Tensor, target: Tensor) -> Tensor:
        return MSE(output, target) if output.sum() > 0 else weights[3] * MSE(output, target)

    net = network(width=3)
    leaves = [*net.parameters(), *weights]
    expected = plain(net, loss, query, "second")
    assert (
        sum(
            1
            for x in torch.autograd.grad(expected, weights, retain_graph=True, allow_unused=True)
            if x is not None
        )
        > 2
    )
    compare(maml(net, loss=loss, query_loss=query, backend=backend)(*episodes()).loss, expected, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_match_reference(backend: str) -> None:
    a, film = tensor(3), tensor(3, seed=8)
    net = Modulated(lambda: film.sin())
    loss = lambda o, y: (a[0] * (o - a[1] * y)).square().mean()  # noqa: E731
    params = dict(net.named_parameters())
    leaves = [*params.values(), a, film]
    x, y, query_x, query_y = episodes()
    found = fm.inner_sgd(net, params, x, y, loss=loss, lr=RATE, steps=STEPS, backend=backend)
    value = sum(v.sin().sum() for v in found.values())
    compare(value, sum(v.sin().sum() for v in inner(net, params, loss)), leaves)

    value = fm.task_forward(net, params, x, backend=backend).sin().sum()
    compare(value, torch.stack([net(one) for one in x]).sin().sum(), [*params.values(), film])

    found = fm.task_gradient(net, params, x, y, loss=loss, backend=backend)
    grads = [
        torch.autograd.grad(loss(net(one), target), list(params.values()), create_graph=True)
        for one, target in zip(x, y, strict=True)
    ]
    expected = sum(gradient.sin().sum() for task in grads for gradient in task)
    compare(sum(g.sin().sum() for g in found.values()), expected, leaves)

    result = fm.meta_gradient(
        net,
        params,
        (x, y),
        (query_x, query_y),
        loss=loss,
        lr=RATE,
        steps=STEPS,
        backend=backend,
        wrt=("query_x",),
    )
    want = torch.autograd.grad(plain(net, loss, loss, "second"), [a, film])
    by = {id(leaf): gradient for leaf, gradient in result.captured}
    assert len(by) == 2
    assert error(by[id(a)], want[0]) < TOLERANCE
    assert error(by[id(film)], want[1]) < TOLERANCE
    assert (
        fm.meta_gradient(
            network(), dict(network().named_parameters()), (x, y), (x, y), loss="mse", lr=RATE, steps=1
        ).captured
        == ()
    )


def relatives(weight: Tensor) -> dict[str, nn.Module]:
    net, loss = network(width=3), learned(weight)
    normed = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)).double()
    context = nn.Sequential(fm.Context(2), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    given = {
        "loss": loss,
        "inner_lr": RATE,
        "inner_steps": STEPS,
        "query_loss": lambda o, y: weight.sin() * MSE(o, y),
    }
    return {
        "MAML++": fm.MAMLPlusPlus(normed, multi_step_epochs=2, first_order_epochs=0, **given),
        "MetaCurvature": fm.MetaCurvature(net, **given),
        "MetaSGD": fm.MetaSGD(net, **given),
        "CAVIA": fm.CAVIA(context, **given),
        "IMAML": fm.IMAML(
            net,
            loss=loss,
            query_loss=given["query_loss"],
            proximal=2.0,
            inner_lr=0.2,
            inner_steps=60,
            cg_tolerance=1e-12,
        ),
    }


@pytest.mark.parametrize("name", ["MAML++", "MetaCurvature", "MetaSGD", "CAVIA", "IMAML"])
def test_relatives_match_finite_differences(name: str) -> None:
    weight = tensor()
    module = relatives(weight)[name]
    episode, step = episodes(), 1e-5
    module(*episode).loss.backward()
    got, losses = weight.grad, []
    with torch.no_grad():
        for change in (step, -2 * step):
            weight += change
            losses.append(module(*episode).loss)
    want = (losses[0] - losses[1]) / (2 * step)
    assert abs(got - want) < 1e-7 * abs(want) + 1e-9


@pytest.mark.parametrize("algorithm", [fm.MAML, fm.MetaCurvature])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0]])
def test_tasks_that_are_left_out_match_the_others_alone(
    algorithm: type[fm.MAML], weights: list[float] | None
) -> None:
    weight, net, episode = tensor(), network(width=3), episodes()
    module = algorithm(
        net,
        loss=learned(weight),
        query_loss=lambda o, y: MSE(o, y) / weight,
        inner_lr=RATE,
        inner_steps=STEPS,
        on_divergence="skip",
    )
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    kept = torch.tensor([0, 2])
    few = [x[kept] for x in episode]
    want = module(*few, task_weights=None if given is None else given[kept]).loss
    scale = 1.0 if weights is None else 2 / 3  # a task of weight zero counts in the mean
    wanted = torch.autograd.grad(scale * want, [*net.parameters(), weight])
    episode[1][1] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        loss = module(*episode, task_weights=given).loss
    found = torch.autograd.grad(loss, [*net.parameters(), weight])
    assert error(loss.detach(), scale * want.detach()) < TOLERANCE
    assert all(error(got, gradient) < TOLERANCE for got, gradient in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_inside_a_forward_are_left_alone(backend: str) -> None:
    """A network whose output is the gradient of an energy makes a leaf of its own, and may read
    something as well."""

    class Energy(nn.Module):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.net, self.scale = network(width=3), scale

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = (self.net(x) * self.scale).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0].sum(-1, keepdim=True)

    scale = tensor()
    for read in ([], [scale]):
        net = Energy(scale if read else scale.detach())
        value = maml(net, backend=backend)(*episodes()).loss
        compare(value, plain(net, MSE, MSE, "second"), [*net.parameters(), *read])


def test_a_learned_weight_of_a_named_loss_matches_reference() -> None:
    weight, net = tensor(1), network(width=3)
    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    episode = [x.sigmoid() for x in episodes()]

    def by_hand(output: Tensor, target: Tensor) -> Tensor:
        log = nn.functional.logsigmoid
        return -(weight * target * log(output) + (1 - target) * log(-output)).mean()

    value = maml(net, loss=loss)(*episode).loss
    compare(value, plain(net, by_hand, by_hand, "second", episode), [*net.parameters(), weight])
    with pytest.raises(fm.BackendUnavailable, match="`pos_weight` of the loss bce_with_logits requires grad"):
        maml(net, loss=loss, backend="cpu")(*episode)


def test_rejects_captured_tensors_under_compile() -> None:
    weight = tensor()
    module = maml(network(width=3), loss=learned(weight))
    step = torch.compile(lambda *episode: module(*episode).loss, backend="eager")
    with pytest.raises(ValueError, match=r"reads a tensor .* that requires grad"):
        step(*episodes())
