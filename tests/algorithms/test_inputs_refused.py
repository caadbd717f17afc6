"""What is wrong with an input of several tensors is said by the name of the one it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tree_networks import TASKS, TREES, Pair, built, draw, error, ints

import fastmeta as fm

OPTIONS = {"inner_lr": 0.1, "inner_steps": 2}


class _Subclass(torch.Tensor):
    pass


def _deep(x: Tensor) -> Any:
    tree: Any = x
    for _ in range(60):
        tree = [tree]
    return tree


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


#: network, field, what it becomes, the message
WRONG: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "tasks of a tuple": (
        "graph",
        "support_x",
        lambda x: (x[0], x[1][:2]),
        r"`support_x\[1\]` must begin with 3 tasks, as `support_x\[0\]`, got \(2, 4, 4\)",
    ),
    "tasks of a dict": (
        "dict",
        "query_x",
        lambda x: x | {"scale": x["scale"][:1]},
        r"`query_x\['scale'\]` must begin with 3 tasks, as `query_x\['column'\]`, got \(1,\)",
    ),
    "tasks of a named tuple": (
        "named tuple",
        "support_x",
        lambda x: x._replace(right=x.right[0]),
        r"`support_x.right` must begin with 3 tasks, as `support_x.left`, got \(4, 3\)",
    ),
    "tasks of a keyword": (
        "bert",
        "support_x",
        lambda x: fm.Inputs(*x.args, attention_mask=x.kwargs["attention_mask"][:, :, 0].flatten()),
        r"`support_x.kwargs\['attention_mask'\]` must begin with 3 tasks, as `support_x.args\[0\]`, "
        r"got \(12,\)",
    ),
    "other tasks than before": (
        "graph",
        "query_x",
        lambda x: (x[0][:2], x[1][:2]),
        r"`query_x\[0\]` must be \[T, M, ...\] with T = 3 tasks, as MAML: `support_x`, got \(2, 5, 3\)",
    ),
    "no dimension": (
        "dict",
        "support_x",
        lambda x: x | {"column": torch.tensor(1)},
        r"`support_x\['column'\]` must be \[T, N, ...\], got \(\)",
    ),
    "no example": (
        "graph",
        "support_x",
        lambda x: (x[0][:, :0], x[1]),
        r"`support_x\[0\]` must hold at least one example a task, got \(3, 0, 3\)",
    ),
    "dtype": (
        "graph",
        "support_x",
        lambda x: (x[0], x[1].float()),
        r"`support_x\[1\]` must be torch.float64, as the parameters, got torch.float32",
    ),
    "device": (
        "graph",
        "support_x",
        lambda x: (x[0], x[1].to("meta")),
        r"`support_x\[1\]` must be on cpu",
    ),
    "freed": ("graph", "query_x", lambda x: (_freed(x[0]), x[1]), r"`query_x\[0\]` must have memory"),
    "sparse": (
        "graph",
        "support_x",
        lambda x: (x[0], x[1].to_sparse()),
        r"`support_x\[1\]` must be a dense tensor",
    ),
    "array": (
        "dict",
        "support_x",
        lambda x: x | {"scale": np.ones(3)},
        r"`support_x` must hold tensors in tuples, lists, dicts and NamedTuples, got ndarray at \['scale'\]",
    ),
    "object": ("graph", "support_x", lambda x: object(), "`support_x` must be a tensor, got object"),
    "numbers": (
        "graph",
        "support_x",
        lambda x: [1.0, 2.0],
        "`support_x` must be a tensor, got list without one",
    ),
    "nothing": (
        "graph",
        "query_y",
        lambda x: fm.Inputs(),
        "`query_y` must be a tensor, got Inputs without one",
    ),
    "too deep": (
        "graph",
        "support_x",
        lambda x: _deep(x[0]),
        "`support_x` must hold tensors.*containers 50 deep",
    ),
    "target of a loss with a name": (
        "graph",
        "support_y",
        lambda y: {"y": y},
        "`support_y` must be one tensor for mse, got dict; a function loss.output, target. takes",
    ),
    "tasks of a target": (
        "bert",
        "query_y",
        lambda y: y | {"labels": y["labels"][:1]},
        r"`query_y\['labels'\]` must begin with 3 tasks, as `query_x`, got \(1, 5\)",
    ),
    "target": (
        "graph",
        "support_y",
        lambda y: y[:, :3],
        r"`support_y` must be \(3, 4, 2\), the shape of the network's output \(mse broadcasts",
    ),
    "weights": (
        "graph",
        "support_weights",
        lambda _: draw(TASKS, 7, seed=0),
        r"`support_weights` must be \(3, 4\), as the output, got \(3, 7\)",
    ),
    "tasks of weights": (
        "graph",
        "query_weights",
        lambda _: draw(2, 5, seed=0),
        r"`query_weights` must begin with 3 tasks, as `query_x`, got \(2, 5\)",
    ),
    "dimensions of weights": (
        "graph",
        "query_weights",
        lambda _: draw(3, 5, 1, seed=0),
        r"`query_weights` must be \[T, M\], got \(3, 5, 1\)",
    ),
    "weights in a tuple": (
        "graph",
        "query_weights",
        lambda _: (draw(3, 5, seed=0),),
        "`query_weights` must be a tensor, got tuple",
    ),
    "too few arguments": (
        "graph",
        "support_x",
        lambda x: x[0],
        "`net` must take one tensor, Graph.forward missing a required argument: 'adjacency': give several",
    ),
    "too many arguments": (
        "graph",
        "support_x",
        lambda x: fm.Inputs(*x, more=x[0]),
        "`net` must take what it is given, 2 arguments, 'more', Graph.forward got an unexpected keyword",
    ),
    "shapes": (
        "graph",
        "query_x",
        lambda x: (x[0], x[1][:, :, :3]),
        r"`query_x`: the network raised RuntimeError: .*; given were \[0\] \(3, 5, 3\) torch.float64, "
        r"\[1\] \(3, 5, 3\) torch.float64",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_says_what_is_wrong(case: str, backend: str) -> None:
    name, field, spoil, message = WRONG[case]
    net, support, query, loss = built(name)
    data = dict(zip(("support_x", "support_y", "query_x", "query_y"), (*support, *query), strict=True))
    data[field] = spoil(data.get(field))
    with pytest.raises((TypeError, ValueError), match=f"^MAML: {message}"):
        fm.MAML(net, loss=loss, **OPTIONS, backend=backend)(**data)


def test_inner_steps_of_a_leaf() -> None:
    net, (x, y), query, loss = built("graph")
    x, y = (torch.stack([x[0]] * 2, 1), torch.stack([x[1]] * 3, 1)), torch.stack([y] * 2, 1)
    with pytest.raises(ValueError, match=r"`support_x\[1\]` must begin with 3 tasks and 2 inner steps, as"):
        fm.MAML(net, loss=loss, **OPTIONS)(x, y, *query, support_per_step=True)


def test_operators_name_their_own_arguments() -> None:
    net, (x, y), _, loss = built("graph")
    params = dict(net.named_parameters())
    wrong = x[0], x[1][:2]
    with pytest.raises(ValueError, match=r"^task_forward: `x\[1\]` must begin with 3 tasks, as `x\[0\]`"):
        fm.task_forward(net, params, wrong)
    with pytest.raises(ValueError, match=r"^inner_sgd: `x\[1\]` must begin with 3 tasks, as `x\[0\]`"):
        fm.inner_sgd(net, params, wrong, y, loss=loss, lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"^task_gradient: `x\[1\]` must begin with 3 tasks"):
        fm.task_gradient(net, params, wrong, y, loss=loss)
    with pytest.raises(ValueError, match=r"^MAML.predict: `x\[1\]` must begin with 3 tasks"):
        fm.MAML(net, loss=loss, **OPTIONS).predict(params, wrong)


def test_integers_have_no_gradient() -> None:
    net, support, query, loss = built("ids")
    given = {"loss": loss, "lr": 0.1, "steps": 1}
    with pytest.raises(TypeError, match=r"`wrt` has 'support_x', but torch.int64 has no gradient"):
        fm.meta_gradient(net, dict(net.named_parameters()), support, query, **given, wrt=["support_x"])
    net, support, query, loss = built("bert")
    given["loss"] = loss
    with pytest.raises(TypeError, match=r"`wrt` has 'query_x', but torch.int64, torch.bool has no gradient"):
        fm.meta_gradient(net, dict(net.named_parameters()), support, query, **given, wrt=["query_x"])


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("name", ["ids", "graph", "dict", "keywords"])
def test_backends_of_layer_programs_say_why_not(name: str, backend: str) -> None:
    net, support, query, loss = built(name)
    kind = {
        "ids": "torch.int64",
        "graph": "no single tensor, but tuple",
        "dict": "no single tensor, but dict",
    }
    why = kind.get(name, "no single tensor, but Inputs")
    maml = fm.MAML(net, loss=loss, **OPTIONS, backend=backend)
    with pytest.raises(fm.BackendUnavailable) as raised:
        maml(*support, *query)
    assert f"the network's input is {why}" in str(raised.value) or "cannot run this call" in str(raised.value)
    if backend == "cpu":
        assert f"the network was not captured: the network's input is {why}" in str(raised.value)


@pytest.mark.parametrize("name", ["bert", "lstm"])
def test_a_loss_with_a_name_needs_one_tensor(name: str) -> None:
    net, support, query, _ = built(name)
    y, query_y = draw(TASKS, 4, 1, seed=0), draw(TASKS, 5, 1, seed=1)
    kind = {"bert": "dict", "lstm": "tuple"}[name]
    for loss in ("mse", nn.BCEWithLogitsLoss(), "cross_entropy"):
        targets = [y.long()[..., 0], query_y.long()[..., 0]] if loss == "cross_entropy" else [y, query_y]
        for backend in ("torch", "reference"):
            with pytest.raises(TypeError, match=f"output must be one tensor for .*, got {kind}; a function"):
                fm.MAML(net, loss=loss, **OPTIONS, backend=backend)(
                    support[0], targets[0], query[0], targets[1]
                )


def test_algorithms_without_gradients_of_inputs_name_the_leaf() -> None:
    net, (x, y), query, loss = built("graph")
    x = x[0], x[1].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^Reptile: `support_x\[1\]` must not require grad"):
        fm.Reptile(net, loss=loss, **OPTIONS)(x, y)
    with pytest.raises(ValueError, match=r"^IMAML: `support_x\[1\]` must not require grad"):
        fm.IMAML(net, loss=loss, **OPTIONS, proximal=1.0)(x, y, *query)


def test_subclasses_of_tensors_are_taken_off() -> None:
    net, support, query, loss = built("named tuple")
    want = fm.MAML(net, loss=loss, **OPTIONS)(*support, *query).loss
    x = Pair(*[part.as_subclass(_Subclass) for part in support[0]])
    got = fm.MAML(net, loss=loss, **OPTIONS)(x, support[1], *query).loss
    assert type(got) is Tensor
    assert torch.equal(got, want)


def test_a_network_must_return_the_same_containers_for_every_task() -> None:
    class Odd(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            output = super().forward(x)
            return (output,) if x.sum() > 0 else [output]

    x = torch.stack([torch.ones(4, 3), -torch.ones(4, 3)])
    with pytest.raises(ValueError, match="must return the same containers for every task"):
        fm.task_forward(Odd(3, 2), dict(Odd(3, 2).named_parameters()), x, backend="torch")


def test_target_and_output_trees_of_any_shape() -> None:
    """A loss of one's own may compare what has no examples at all."""
    net = nn.Linear(3, 2).double()
    x, y = draw(TASKS, 4, 3, seed=0), (draw(TASKS, 2, seed=1), 0.5, None)

    def loss(output: Tensor, target: Any) -> Tensor:
        assert target[1:] == (0.5, None)
        return target[1] * F.mse_loss(output.mean(0), target[0])

    found = [fm.MAML(net, loss=loss, **OPTIONS, backend=b)(x, y, x, y).loss for b in ("torch", "reference")]
    assert error(*found) < 1e-12


def test_inputs_show_what_they_hold() -> None:
    assert repr(fm.Inputs(1, "a", mask=None)) == "Inputs(1, 'a', mask=None)"
    x = TREES["bert"].data(2, 0)[0]
    assert repr(x).startswith("Inputs(tensor(")
    assert fm.Inputs(ints(3, 2, seed=0)).kwargs == {}
