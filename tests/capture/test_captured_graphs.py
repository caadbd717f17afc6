"""Captured tensors as autograd sees them: accumulated gradients, hooks, other threads, parameters
that a loss reads of its own network."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from captured import RATE, STEPS, TOLERANCE, compare, inner, learned, maml, plain, tensor
from plain_autograd import MSE, episodes, error, network
from torch import Tensor, nn

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


BACKENDS = ("torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_and_graphs_are_retained(backend: str) -> None:
    net, z, hyper = network(width=3), tensor(3), nn.Linear(3, 1).double()
    v = hyper(z)
    leaves = [*net.parameters(), z, *hyper.parameters()]
    module = maml(net, loss=learned(v[0]), query_loss="mse", backend=backend)
    want = torch.autograd.grad(plain(net, learned(v[0]), MSE, "second"), leaves, retain_graph=True)
    loss = module(*episodes()).loss
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    module(*episodes()).loss.backward(retain_graph=True)
    for leaf, gradient in zip(leaves, want, strict=True):
        assert error(leaf.grad, 3 * gradient) < TOLERANCE
    for leaf in leaves:
        leaf.grad = None
    (
        module(*episodes()).loss + 2 * module(*episodes()).loss + v.square().sum()
    ).backward()  # another loss on the same v
    assert error(hyper.bias.grad, 3 * want[-1] + 2 * v.detach()) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_between_leaves_and_hooks_follow_autograd(backend: str) -> None:
    net, z = network(width=3), tensor(2)
    seen: list[Tensor] = []
    z.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    v = z.exp()
    v.retain_grad()
    loss = lambda o, y: (o * v[0] - y * v[1]).square().mean()  # noqa: E731
    out = maml(net, loss=loss, backend=backend)(*episodes()).loss
    assert not seen
    assert v.grad is None
    expected = plain(net, loss, loss, "second")
    (want,) = torch.autograd.grad(expected, v, retain_graph=True)
    (got,) = torch.autograd.grad(out, v, retain_graph=True)
    assert error(got, want) < TOLERANCE
    v.grad = None
    out.backward()
    assert error(v.grad, want) < TOLERANCE
    assert error(z.grad, 2 * want * v.detach()) < TOLERANCE
    assert len(seen) == 1


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_on_another_thread_matches_reference(create_graph: bool) -> None:
    """On an accelerator autograd calls from threads of its own, where nodes are numbered anew."""
    net, z = network(width=3), tensor(2)
    v = z
    for _ in range(1000):
        v = v * 1.0001
    loss = lambda o, y: (o * v[0] - y * v[1]).square().mean()  # noqa: E731
    params, (x, y, *_) = dict(net.named_parameters()), episodes()
    expected = sum(value.sin().sum() for value in inner(net, params, loss))
    want = torch.autograd.grad(expected, [v, z], retain_graph=True)
    theta = fm.inner_sgd(net, params, x, y, loss=loss, lr=RATE, steps=STEPS)
    value, found = sum(value.sin().sum() for value in theta.values()), []
    again = lambda: found.extend(torch.autograd.grad(value, [v, z], create_graph=create_graph))  # noqa: E731
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert error(found[0].detach(), want[0]) < TOLERANCE
    assert error(found[1].detach(), want[1]) < TOLERANCE


def own_parameter(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: MSE(output, target) * net[0].weight.square().sum() + net[4].bias.exp().sum()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_own_parameters_in_a_loss_match_reference(backend: str) -> None:
    net = network(width=3)
    expected = plain(net, own_parameter(net), own_parameter(net), "second")
    compare(
        maml(net, loss=own_parameter(net), backend=backend)(*episodes()).loss, expected, [*net.parameters()]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_parameters_of_a_flat_module_match_reference(backend: str) -> None:
    net = network(width=3)
    params, episode = list(net.parameters()), episodes()
    want = torch.autograd.grad(plain(net, own_parameter(net), own_parameter(net), "second"), params)
    module = maml(net, loss=own_parameter(net), backend=backend)
    moved = inner(net, {name: value.clone() for name, value in net.named_parameters()}, own_parameter(net))
    wanted = torch.autograd.grad(sum(value.square().sum() for value in moved), params)
    flat = fm.flatten(module)
    module(*episode).loss.backward()
    assert error(flat.grad, torch.cat([gradient.flatten() for gradient in want])) < TOLERANCE
    flat.grad = None
    sum(value.square().sum() for value in module.adapt(*episode[:2]).values()).backward()
    assert error(flat.grad, torch.cat([gradient.flatten() for gradient in wanted])) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_network_learns_its_loss(backend: str) -> None:
    net, weight = network(width=3), tensor()
    want = torch.autograd.grad(plain(net, learned(weight), MSE, "second"), weight)[0]
    net.requires_grad_(False)
    options = {"adapt": [name for name, _ in net.named_parameters()], "backend": backend}
    maml(net, loss=learned(weight), query_loss="mse", **options)(*episodes()).loss.backward()
    assert error(weight.grad, want) < TOLERANCE
    x, y, *_ = episodes()
    params = {name: value.detach() for name, value in net.named_parameters()}
    given = {"lr": RATE, "steps": STEPS, "adapt": "*", "backend": backend}
    found = fm.inner_sgd(net, params, x, y, loss=learned(weight), **given)
    assert all(value.requires_grad for value in found.values())


def test_a_loss_that_reads_something_else_in_backward_is_refused() -> None:
    net, weights = network(width=3), [tensor(seed=seed) for seed in range(2)]
    x, y, *_ = episodes()
    theta = dict(net.named_parameters())
    for weight in weights:
        theta = fm.inner_sgd(net, theta, x, y, loss=lambda o, t: weight * MSE(o, t), lr=RATE, steps=1)  # noqa: B023
    with pytest.raises(RuntimeError, match="bind such a tensor in a default argument"):
        theta["0.weight"].sum().backward()
