"""Inputs, targets and outputs of several tensors, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tree_networks import (
    TASKS,
    TREES,
    adapted,
    built,
    called,
    error,
    losses_of,
    of_task,
    parts,
    required,
    tensors,
)

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
each_tree = pytest.mark.parametrize("name", TREES)
each_backend = pytest.mark.parametrize("backend", ["torch", "reference"])
LR, STEPS = 0.1, 2


def _params(net: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}


def _floating(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tensors(*trees) if leaf.is_floating_point()]


@each_backend
@each_tree
def test_meta_gradient(name: str, backend: str) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    params = _params(net)
    fields = ["support_x", "support_y", "query_x", "query_y"]
    wrt = [field for field, tree in zip(fields, data, strict=True) if _floating(tree)]
    found = fm.meta_gradient(
        net,
        params,
        (data[0], data[1]),
        (data[2], data[3]),
        loss=loss,
        lr=LR,
        steps=STEPS,
        wrt=["params", *wrt],
        backend=backend,
    )
    want = losses_of(net, params, (data[0], data[1]), (data[2], data[3]), loss, LR, STEPS)
    assert error(found.task_losses, want) < 1e-9
    by = [*params.values(), *_floating(*data)]
    expected = torch.autograd.grad(want.mean(), by, materialize_grads=True)
    got = [*found.grads.values(), *tensors(*[getattr(found, field) for field in wrt])]
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) < 1e-9
    for field, tree in zip(fields, data, strict=True):
        gradient = getattr(found, field)
        if field not in wrt:
            assert gradient is None
        else:
            assert type(gradient) is type(tree)
            _same_form(parts(gradient), parts(tree))


def _same_form(gradient: Any, tree: Any) -> None:
    """The containers are the same, and None stands for what has no gradient."""
    if isinstance(tree, Tensor) and tree.is_floating_point():
        assert gradient.shape == tree.shape
    elif isinstance(tree, dict):
        assert type(gradient) is type(tree)
        assert [*gradient] == [*tree]
        for key in tree:
            _same_form(gradient[key], tree[key])
    elif isinstance(tree, (tuple, list)):
        assert type(gradient) is type(tree)
        for one, other in zip(gradient, tree, strict=True):
            _same_form(one, other)
    else:
        assert gradient is None


@each_backend
@each_tree
def test_operators(name: str, backend: str) -> None:
    net, (x, y), (query_x, _), loss = built(name)
    x, query_x, params = required(x), required(query_x), _params(net)
    theta = fm.inner_sgd(net, params, x, y, loss=loss, lr=LR, steps=STEPS, backend=backend)
    output = fm.task_forward(net, theta, query_x, backend=backend)
    gradient = fm.task_gradient(net, params, x, y, loss=loss, backend=backend)

    tasks = range(TASKS)
    thetas = [adapted(net, params, of_task(x, t), of_task(y, t), loss, LR, STEPS) for t in tasks]
    outputs = [called(net, own, of_task(query_x, t)) for t, own in enumerate(thetas)]
    firsts = [adapted(net, params, of_task(x, t), of_task(y, t), loss, 1.0, 1) for t in tasks]
    assert type(output) is type(outputs[0])
    pairs = [(theta[key], torch.stack([own[key] for own in thetas])) for key in params]
    pairs += [
        (got, torch.stack(want))
        for got, *want in zip(tensors(output), *[tensors(out) for out in outputs], strict=True)
    ]
    pairs += [(gradient[key], torch.stack([params[key] - own[key] for own in firsts])) for key in params]
    for got, want in pairs:
        assert got.dtype == want.dtype
        assert error(got.double(), want.double()) < 1e-9
    kept = [pair for pair in pairs if pair[0].is_floating_point()]
    by = [*params.values(), *_floating(x, query_x)]
    got_all, want_all = (
        torch.autograd.grad(sum((pair[i] ** 2).sum() for pair in kept), by, materialize_grads=True)
        for i in (0, 1)
    )
    for got, want in zip(got_all, want_all, strict=True):
        assert error(got, want) < 1e-8


@each_tree
def test_maml(name: str) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS)
    params = dict(net.named_parameters())
    by = [*params.values(), *_floating(*data)]
    out = maml(*data)
    want = losses_of(net, params, tuple(data[:2]), tuple(data[2:]), loss, LR, STEPS).mean()
    assert error(out.loss, want) < 1e-9
    (got, expected) = (
        torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)
        for value in (out.loss, want)
    )
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) < 1e-9
    # and once more, by plain autograd
    got, expected = (
        torch.autograd.grad(sum((g**2).sum() for g in grads), by, materialize_grads=True)
        for grads in (got, expected)
    )
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) < 1e-7
    with torch.no_grad():
        predicted = maml.predict(maml.adapt(*support), query[0])
    for one, other in zip(tensors(predicted), tensors(out.output), strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-12)
    assert "not on cpu: the network was not captured: the network's input is" in str(maml.explain(*data))
