"""Every algorithm and option with inputs, targets and outputs of several tensors."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tree_networks import (
    TASKS,
    TREES,
    built,
    called,
    draw,
    error,
    function_of,
    ints,
    mapped_tree,
    of_task,
    required,
    tensors,
)

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
each_tree = pytest.mark.parametrize("name", TREES)
some_trees = pytest.mark.parametrize("name", ["columns", "graph", "keywords", "bert"])
OPTIONS = {"inner_lr": 0.1, "inner_steps": 2}


def _gradients(maml: nn.Module, data: list[Any], **weights: Any) -> list[Tensor]:
    """The loss, and its gradients by everything."""
    out = maml(*data, **weights)
    by = [*maml.parameters(), *[x for x in tensors(*data) if x.requires_grad]]
    by += [x for x in weights.values() if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(out.loss, by, materialize_grads=True)
    return [out.loss, *tensors(out.output), *found]


VARIANTS: dict[str, dict[str, Any]] = {
    "chunk": {"task_chunk": 2},
    "alone": {"task_chunk": 1},
    "recompute": {"memory": "recompute"},
    "head": {"adapt": "head"},
    "body": {"adapt": "body", "memory": "store"},
    "steps": {"step_weights": [0.2, 0.3, 0.5], "update_rule": fm.SGD(momentum=0.5, weight_decay=0.1)},
    "first": {"order": "first"},
    "rates": {"learn_lr": "element"},
}


@some_trees
@pytest.mark.parametrize("variant", VARIANTS)
def test_options(name: str, variant: str) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    weights = draw(TASKS, seed=7).requires_grad_()
    got, want = (
        _gradients(
            fm.MAML(net, loss=loss, **OPTIONS, **VARIANTS[variant], backend=backend),
            data,
            task_weights=weights,
        )
        for backend in ("torch", "reference")
    )
    for one, other in zip(got, want, strict=True):
        assert error(one.double(), other.double()) < 1e-9


@each_tree
def test_a_support_set_for_every_step(name: str) -> None:
    net, _, query, loss = built(name)
    sets = [TREES[name].data(4, seed) for seed in (20, 30)]
    support = [
        required(mapped_tree(lambda *leaves: torch.stack(leaves, 1), *trees))
        for trees in zip(*sets, strict=True)
    ]
    query = [required(tree) for tree in query]
    out = fm.MAML(net, loss=loss, **OPTIONS)(*support, *query, support_per_step=True)
    losses = []
    params = dict(net.named_parameters())
    for t in range(TASKS):
        theta = params
        for k in range(2):
            value = function_of(loss)(
                called(net, theta, of_task(support[0], t, k)), of_task(support[1], t, k)
            )
            grads = torch.autograd.grad(value, [*theta.values()], create_graph=True)
            theta = {key: v - 0.1 * g for (key, v), g in zip(theta.items(), grads, strict=True)}
        losses.append(function_of(loss)(called(net, theta, of_task(query[0], t)), of_task(query[1], t)))
    by = [*params.values(), *[x for x in tensors(*support, *query) if x.requires_grad]]
    got, want = (
        torch.autograd.grad(value, by, materialize_grads=True)
        for value in (out.loss, torch.stack(losses).mean())
    )
    for one, other in zip(got, want, strict=True):
        assert error(one, other) < 1e-9


ALGORITHMS = {
    "FOMAML": lambda net, loss: fm.FOMAML(net, loss=loss, **OPTIONS),
    "ANIL": lambda net, loss: fm.ANIL(net, loss=loss, **OPTIONS),
    "BOIL": lambda net, loss: fm.BOIL(net, loss=loss, **OPTIONS),
    "MetaSGD": lambda net, loss: fm.MetaSGD(net, loss=loss, **OPTIONS),
    "MetaCurvature": lambda net, loss: fm.MetaCurvature(net, loss=loss, **OPTIONS),
    "MAMLPlusPlus": lambda net, loss: fm.MAMLPlusPlus(
        net, loss=loss, **OPTIONS, multi_step_epochs=2, first_order_epochs=0
    ),
    "skip": lambda net, loss: fm.MAML(net, loss=loss, **OPTIONS, on_divergence="skip"),
    "skip MetaCurvature": lambda net, loss: fm.MetaCurvature(net, loss=loss, **OPTIONS, on_divergence="skip"),
}


@some_trees
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms(name: str, algorithm: str) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    maml = ALGORITHMS[algorithm](net, loss)
    got, want = [], []
    for backend, found in (("torch", got), ("reference", want)):
        maml.backend = backend
        found += _gradients(maml, data)
        with torch.no_grad():
            theta = maml.adapt(*support)
            found += [*theta.values(), *tensors(maml.predict(theta, query[0]))]
    for one, other in zip(got, want, strict=True):
        assert error(one.double(), other.double()) < 1e-9
    assert f"T = {TASKS} tasks" in str(maml.explain(*data))


@each_tree
def test_without_query_sets_and_implicit(name: str) -> None:
    net, support, query, loss = built(name)
    for make in (
        lambda backend: fm.Reptile(net, loss=loss, **OPTIONS, backend=backend),
        lambda backend: fm.IMAML(
            net, loss=loss, **OPTIONS, proximal=2.0, cg_steps=3, cg_tolerance=1.0, backend=backend
        ),
    ):
        found = []
        for backend in ("torch", "reference"):
            learner = make(backend)
            out = learner(*support, *query) if isinstance(learner, fm.IMAML) else learner(*support)
            found.append([out.loss, *torch.autograd.grad(out.loss, [*learner.parameters()])])
            assert f"backend: {backend}" in str(learner.explain(*support))
        for one, other in zip(*found, strict=True):
            assert error(one, other) < 1e-8


@pytest.mark.parametrize("make", [fm.MAML, fm.MetaCurvature])
def test_a_diverged_task_is_left_out(make: Any) -> None:
    net, support, query, loss = built("bert")
    query = query[0], {**query[1], "value": query[1]["value"].clone()}
    query[1]["value"][1] = float("inf")
    maml = make(net, loss=loss, **OPTIONS, on_divergence="skip")
    with pytest.warns(RuntimeWarning, match="1 of 3 tasks diverged.*task 1"):
        got = _gradients(maml, [*support, *query])
    kept = torch.tensor([0, 2])
    rest = [mapped_tree(lambda x: x[kept], tree) for tree in (*support, *query)]
    want = _gradients(maml, rest)
    outputs = len(tensors(maml(*rest).output))
    for at, (one, other) in enumerate(zip(got, want, strict=True)):
        one = one[kept] if 1 <= at <= outputs else one
        assert error(one.double(), other.double()) < 1e-9


@pytest.mark.parametrize("name", ["ids", "columns", "graph", "dict", "keywords", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_example_weights(name: str, dtype: torch.dtype) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    weights = [draw(TASKS, n, seed=n).square() for n in (4, 5)]
    if dtype is torch.bool:
        weights = [w > 0.1 for w in weights]
        for w in weights:
            w[:, 0] = True
    else:
        weights = [w.requires_grad_() for w in weights]
    given = {"support_weights": weights[0], "query_weights": weights[1]}
    got, want = (
        _gradients(fm.MAML(net, loss=loss, **OPTIONS, backend=backend), data, **given)
        for backend in ("torch", "reference")
    )
    plain = fm.MAML(net, loss=loss, **OPTIONS)(*data).loss
    assert error(plain, want[0]) > 1e-3
    for one, other in zip(got, want, strict=True):
        assert error(one.double(), other.double()) < 1e-9


@some_trees
def test_flat_meta_parameters(name: str) -> None:
    net, support, query, loss = built(name)
    data = [required(tree) for tree in (*support, *query)]
    found = []
    for flat in (False, True):
        maml = fm.MAML(deepcopy(net), loss=loss, **OPTIONS)
        leaves = [fm.flatten(maml)] if flat else [*maml.parameters()]
        by = [x for x in tensors(*data) if x.requires_grad]
        grads = torch.autograd.grad(maml(*data).loss, [*leaves, *by], create_graph=True)
        vector = torch.cat([g.reshape(-1) for g in grads])
        again = torch.autograd.grad(vector.square().sum(), [*leaves, *by], materialize_grads=True)
        found.append([vector, torch.cat([g.reshape(-1) for g in again])])
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-9


class _Keeps(nn.Module):
    """Carries a state from pass to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen = nn.Linear(3, 2), torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor, adjacency: Tensor) -> dict[str, Tensor]:
        output = adjacency @ self.body(x)
        self.seen = 0.5 * self.seen + output.mean(0).tanh()
        return {"y": output + self.seen}


def test_a_network_that_carries_state() -> None:
    net, (x, y), query, _ = built("graph")
    net = _Keeps().double()
    maml = fm.MAML(net, loss=lambda output, y: F.mse_loss(output["y"], y), **OPTIONS)
    assert "carries `net.seen` over" in str(maml.explain(x, y, *query))
    got = _gradients(maml, [x, y, *query])
    maml.backend = "reference"
    for one, other in zip(got, _gradients(maml, [x, y, *query]), strict=True):
        assert error(one, other) < 1e-9


def test_a_loss_that_reads_a_learned_tensor() -> None:
    net, support, query, _ = built("dict")
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    maml = fm.MAML(net, loss=lambda output, y: F.mse_loss(scale * output, y), **OPTIONS)
    found = []
    for backend in ("torch", "reference"):
        maml.backend = backend
        found.append(torch.autograd.grad(maml(*support, *query).loss, [scale, *net.parameters()]))
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-9
        assert one.abs().sum() > 0


def test_inputs_are_not_written_into() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 1)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            batch["x"].mul_(2.0)
            batch["more"] = batch["x"]
            return self.body(batch.pop("x"))

    x = {"x": draw(TASKS, 4, 3, seed=0)}
    before = x["x"].clone()
    y = draw(TASKS, 4, 1, seed=1)
    for backend in ("torch", "reference"):
        fm.MAML(Writes().double(), loss="mse", **OPTIONS, backend=backend)(x, y, x, y).loss.backward()
    assert [*x] == ["x"]
    assert torch.equal(x["x"], before)


def test_an_input_that_changed_before_backward_is_noticed() -> None:
    net, support, query, loss = built("graph")
    x = tuple(part.clone() for part in support[0])
    out = fm.MAML(net, loss=loss, **OPTIONS)(x, support[1], *query)
    x[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_under_torch_compile_the_graph_breaks() -> None:
    net, support, query, loss = built("graph")
    maml = fm.MAML(net, loss=loss, **OPTIONS)
    compiled = torch.compile(lambda *data: maml(*data).loss * 2, backend="eager")
    assert error(compiled(*support, *query), 2 * maml(*support, *query).loss) < 1e-12
    other, support, query, loss = built("bert")
    maml = fm.MAML(other, loss=loss, **OPTIONS)
    got = torch.compile(lambda *data: maml(*data).loss, backend="eager")(*support, *query)
    assert error(got, maml(*support, *query).loss) < 1e-12


def test_under_torch_compile_several_outputs_are_refused() -> None:
    net = nn.LSTM(3, 4, batch_first=True).double()
    maml = fm.MAML(net, loss=lambda output, y: F.mse_loss(output[0], y), **OPTIONS)
    x, y = draw(TASKS, 4, 2, 3, seed=0), draw(TASKS, 4, 2, 4, seed=1)
    assert maml(x, y, x, y).loss.isfinite()
    with pytest.raises(
        Exception, match=r"under torch.compile `net` must return one tensor, LSTM returned tuple"
    ):
        torch.compile(lambda *data: maml(*data).loss, backend="eager")(x, y, x, y)


def test_ids_beyond_the_table_are_named() -> None:
    net, (x, y), query, loss = built("ids")
    with pytest.raises(ValueError, match=r"MAML: `support_x`: the network raised IndexError"):
        fm.MAML(net, loss=loss, **OPTIONS)(ints(99, *x.shape, seed=3) + 50, y, *query)
