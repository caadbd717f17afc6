"""Inputs, targets and outputs of several tensors, against a plain loop."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tree_networks import (
    TASKS,
    TREES,
    Pair,
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
from fastmeta import inputs

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


class _Output(OrderedDict):
    """Made like the outputs of a library of transformers: a dict whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _form(tree: Any) -> Any:
    return inputs.flatten(tree)[1]


def _some_trees() -> list[Any]:
    a, b, c = torch.ones(2, 3), torch.arange(2), torch.zeros(2, 0)
    return [
        a,
        (a,),
        [a, b],
        {"x": a, 3: (b, None), None: 1.5},
        OrderedDict(y=b, x=[c, "text"]),
        _Output(logits=a, loss=None),
        Pair(a, {"deep": [b, (c,)]}),
        torch.return_types.max((a, b)),
        fm.Inputs(a, [b], how="no", mask={"c": c}),
        (torch.Size([1, 2]), torch.float32, True, a),
    ]


@pytest.mark.parametrize("at", range(len(_some_trees())))
def test_trees_are_taken_apart_and_put_together(at: int) -> None:
    tree = _some_trees()[at]
    leaves, form = inputs.flatten(tree)
    again = form.build(leaves)
    assert type(again) is type(tree)
    assert [*map(id, inputs.leaves_of(again))] == [*map(id, leaves)]
    assert form.match(again) == leaves
    assert form.match(None) == [None] * len(leaves)
    assert [id(leaf) for _, leaf in inputs.named_leaves(tree)] == [*map(id, leaves)]
    for name, leaf in inputs.named_leaves(tree):
        assert eval(f"tree{name}", {"tree": tree}) is leaf
    doubled = inputs.mapped(lambda x, y: x + y, tree, tree)
    assert _form(doubled) == form
    assert hash(_form(doubled)) == hash(form)
    assert inputs.signature(doubled) == inputs.signature(tree)
    for one, other in zip(inputs.leaves_of(doubled), leaves, strict=True):
        assert torch.equal(one, 2 * other)
    gradient = inputs.like(tree, [None] * len(leaves))
    assert form.match(gradient) == [None] * len(leaves)
    assert inputs.leaves_of(gradient) == []


def test_forms_tell_trees_apart() -> None:
    forms = [_form(tree) for tree in _some_trees()]
    assert all(one != other for i, one in enumerate(forms) for other in forms[:i])
    a = torch.ones(1)
    for one, other in (({"x": a, "n": 1}, {"x": a, "n": True}), ((a, 1), (a, 1.0)), ([a], (a,))):
        assert _form(one) != _form(other)
        assert inputs.signature(one) != inputs.signature(other)
    assert inputs.signature((a,)) != inputs.signature((a.double(),))
    assert inputs.signature((a,), skip=1) == inputs.signature((a.expand(3),), skip=1)


@pytest.mark.parametrize(
    "tree",
    [object(), [object()], {"x": np.ones(2)}, defaultdict(list, x=torch.ones(1)), {1, 2}, range(2)],
    ids=["object", "list", "array", "defaultdict", "set", "range"],
)
def test_what_is_no_tree(tree: Any) -> None:
    with pytest.raises(inputs.NotATreeError):
        inputs.flatten(tree)


@pytest.mark.parametrize(
    ("tree", "other"),
    [
        ((torch.ones(1), torch.ones(1)), (torch.ones(1),)),
        ({"x": torch.ones(1)}, {"y": torch.ones(1)}),
        ([torch.ones(1)], 3),
    ],
)
def test_trees_of_different_forms_are_not_mapped_together(tree: Any, other: Any) -> None:
    with pytest.raises(ValueError, match=r"and|no container"):
        inputs.mapped(lambda a, b: a, tree, other)


def test_networks_are_called_as_functional_call_does() -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert inputs.arguments(a) == ((a,), {})
    assert inputs.arguments((a, b)) == ((a, b), {})
    assert inputs.arguments([a, b]) == (([a, b],), {})
    assert inputs.arguments(Pair(a, b)) == ((Pair(a, b),), {})
    assert inputs.arguments({"x": a}) == (({"x": a},), {})
    assert inputs.arguments(fm.Inputs(a, y=b)) == ((a,), {"y": b})


@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_a_masked_encoder_in_eval_mode(training: bool, backend: str) -> None:
    net, (x, y), query, loss = built("encoder")
    maml = fm.MAML(net.train(training), loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)
    net.train(training)
    want = losses_of(net, dict(net.named_parameters()), (x, y), query, loss, LR, STEPS)
    assert error(maml(x, y, *query).task_losses, want) < 1e-9
    assert "loop" not in str(maml.explain(x, y, *query))


@each_backend
def test_a_tensor_given_twice_gets_both_gradients(backend: str) -> None:
    net, (_, y), (query, query_y), loss = built("named tuple")
    x = torch.randn(TASKS, 4, 3, dtype=torch.float64, requires_grad=True)
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)
    got = torch.autograd.grad(maml(Pair(x, x), y, query, query_y).loss, x, create_graph=True)[0]
    params = dict(net.named_parameters())
    want = torch.autograd.grad(
        losses_of(net, params, (Pair(x, x), y), (query, query_y), loss, LR, STEPS).mean(),
        x,
        create_graph=True,
    )[0]
    assert error(got, want) < 1e-9
    assert error(*(torch.autograd.grad(g.square().sum(), x)[0] for g in (got, want))) < 1e-8


@each_backend
def test_an_output_of_integers_alone(backend: str) -> None:
    class Chooses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    net = Chooses(3, 4).double()
    x = torch.randn(TASKS, 5, 3, dtype=torch.float64)
    params = dict(net.named_parameters())
    got = fm.task_forward(net, params, x, backend=backend)
    assert torch.equal(got, torch.stack([net(one) for one in x]))
    assert not got.requires_grad


@each_backend
def test_numbers_beside_outputs_are_those_of_the_first_task(backend: str) -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": super().forward(x), "largest": x.max().item()}

    net = Counts(3, 2).double()
    x, y = torch.randn(TASKS, 5, 3, dtype=torch.float64), torch.randn(TASKS, 5, 2, dtype=torch.float64)
    loss = lambda output, y: F.mse_loss(output["y"], y) * output["largest"]  # noqa: E731
    out = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)(x, y, x, y)
    want = losses_of(net, dict(net.named_parameters()), (x, y), (x, y), loss, LR, STEPS)
    assert error(out.task_losses, want) < 1e-9
    assert out.output["largest"] == x[0].max().item()


@each_backend
def test_an_output_with_attributes(backend: str) -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> _Output:
            return _Output(loss=None, logits=super().forward(x))

    net = Model(3, 2).double()
    x, y = torch.randn(TASKS, 5, 3, dtype=torch.float64), torch.randint(2, (TASKS, 5))
    loss = lambda output, y: F.cross_entropy(output.logits, y)  # noqa: E731
    out = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)(x, y, x, y)
    assert type(out.output) is _Output
    plain = nn.Linear(3, 2).double()
    plain.load_state_dict(net.state_dict())
    want = fm.MAML(plain, loss="cross_entropy", inner_lr=LR, inner_steps=STEPS)(x, y, x, y)
    assert error(out.loss, want.loss) < 1e-12
    assert error(out.output.logits, want.output) < 1e-12


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_other_integers(dtype: torch.dtype, backend: str) -> None:
    net, (x, y), (query, query_y), loss = built("columns")
    if dtype is torch.uint8:  # an embedding takes none
        net = nn.Sequential(_Converts(), net)
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)
    got = maml(x.to(dtype), y, query.to(dtype), query_y).loss
    assert torch.equal(got, maml(x, y, query, query_y).loss)


class _Converts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


@each_backend
def test_a_learned_input_that_all_tasks_share(backend: str) -> None:
    net, ((x, _), y), _, loss = built("graph")
    shared = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    given = x, shared.expand(TASKS, -1, -1)
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)
    got = torch.autograd.grad(maml(given, y, given, y).loss, shared)[0]
    params = dict(net.named_parameters())
    want = torch.autograd.grad(
        losses_of(net, params, (given, y), (given, y), loss, LR, STEPS).mean(), shared
    )[0]
    assert error(got, want) < 1e-9


@each_backend
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_tasks_in_a_forward_pass(chunk: int, backend: str) -> None:
    net, (x, _), _, _ = built("lstm")
    x, params = required(x), _params(net)
    found = []
    for size in (None, chunk):
        output, (hidden, cell) = fm.task_forward(net, params, x, backend=backend, task_chunk=size)
        by = [*params.values(), *tensors(x)]
        # the cell has no cotangent
        grads = torch.autograd.grad(output.square().sum() + hidden.sum(), by, materialize_grads=True)
        found.append([output, hidden, cell, *grads])
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-9


@each_backend
def test_the_first_tensor_may_have_no_examples(backend: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            assert scale.shape == ()
            return scale * super().forward(x)

    net = Scaled(3, 2).double()
    scale, x = torch.rand(TASKS, dtype=torch.float64), torch.randn(TASKS, 5, 3, dtype=torch.float64)
    y, weights = torch.randn(TASKS, 5, 2, dtype=torch.float64), torch.rand(TASKS, 5, dtype=torch.float64)
    maml = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS, backend=backend)
    out = maml((scale, x), y, (scale, x), y, support_weights=weights)
    text = str(maml.explain((scale, x), y, (scale, x), y, support_weights=weights))
    assert "T = 3 tasks, K = 2" in text
    other = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS)
    swapped = fm.Inputs(x=x, scale=scale)
    want = other(swapped, y, swapped, y, support_weights=weights)
    assert error(out.loss, want.loss) < 1e-12
    assert "N = 5, M = 5" in str(other.explain(swapped, y, swapped, y))


@each_backend
def test_sets_may_differ(backend: str) -> None:
    net, (x, y), (query, query_y), loss = built("encoder")
    support, query = (x.args[0], y), (query, query_y)  # no padding in the support sets
    maml = fm.MAML(net, loss=loss, inner_lr=LR, inner_steps=STEPS, backend=backend)
    want = losses_of(net, dict(net.named_parameters()), support, query, loss, LR, STEPS)
    assert error(maml(*support, *query).task_losses, want) < 1e-9


def test_query_sets_that_take_another_way_are_compared_too() -> None:
    class Twofold(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            # what only the query sets reach looks at values
            return super().forward(x) * (1.0 if mask is None else float(mask.sum()))

    net = Twofold(3, 2).double()
    x, y = torch.randn(TASKS, 5, 3, dtype=torch.float64), torch.randn(TASKS, 5, 2, dtype=torch.float64)
    query = fm.Inputs(x, mask=torch.rand(TASKS, 5) > 0.5)
    maml = fm.MAML(net, loss="mse", inner_lr=LR, inner_steps=STEPS)
    assert "tasks run in a loop: vmap failed" in str(maml.explain(x, y, query, y))
    params = dict(net.named_parameters())
    want = losses_of(net, params, (x, y), (query, y), "mse", LR, STEPS)
    assert error(maml(x, y, query, y).task_losses, want) < 1e-9
    assert "loop" not in str(maml.explain(x, y, x, y))
