"""How the torch backend runs its tasks: by vmap where that is right, else in a loop, and with which
random numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import EVERYTHING, assert_same, error, make_problem, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.backends import reference
from fastmeta.backends import torch as backend
from fastmeta.backends.torch import memory as torch_memory
from fastmeta.backends.torch import tasks as torch_tasks
from fastmeta.problem import Problem


def dense(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 13, bias=False), norm, nn.Tanh(), nn.Linear(13, 2))


@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_plain_vmap_over_affine_norm_is_wrong_and_this_backend_is_not(kind: str) -> None:
    # pytorch/functorch#534: autograd over vmap(grad), as in functorch's MAML-Omniglot example.
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(13, track_running_stats=False) if kind == "batch_norm" else nn.LayerNorm(13)
    net = dense(norm).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += torch.randn_like(parameter)
    problem = make_problem(net, steps=1, lr=0.5, tasks=4)
    wrt = frozenset({"params"})
    expected = reference.solve(problem, wrt, False)

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, theta, (x,)), y)

    def after_one_step(theta: dict[str, Tensor], x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        gradient = torch.func.grad(loss)(theta, x, y)
        return loss(
            {name: theta[name] - problem.rates[name][0, 0] * g for name, g in gradient.items()}, xq, yq
        )

    leaves = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    data = (problem.support.x, problem.support.y, problem.query.x, problem.query.y)
    losses = torch.func.vmap(after_one_step, in_dims=(None, 0, 0, 0, 0))(leaves, *data)
    losses.mean().backward()
    found = backend.solve(problem, wrt, False)
    assert error(losses, expected.task_losses) < 1e-12

    def all_of(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].flatten() for name in problem.params])

    truth = all_of(expected.grads.params)
    plain = all_of({name: leaf.grad for name, leaf in leaves.items()})
    ours = all_of(found.grads.params)
    assert backend.notes(problem) == []
    assert error(plain, truth) > 1e-4
    assert error(ours, truth) < 1e-9


class Sine(torch.autograd.Function):
    """The sine, with a vmap rule that is right in value and gradient only."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info: object, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        fixed = x.detach()
        return fixed.sin() + (x - fixed) * fixed.cos(), in_dims[0]


class SineLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sine.apply(x)


def test_self_check_finds_vmap_that_is_silently_wrong() -> None:
    problem = make_problem(dense(SineLayer()).double())
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))
    (note,) = backend.notes(problem)
    assert note.startswith("tasks run in a loop: the Hessian-vector product by vmap was off by")


class Branching(nn.Module):
    """Looks at values, for inputs of some numbers of examples only."""

    def __init__(self, *examples: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.examples = examples

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] in self.examples and x.sum() > 0:
            return self.linear(x).sin()
        return self.linear(x).tanh()


@pytest.mark.parametrize("examples", [(5, 7), (5,)], ids=["support", "query_only"])
def test_module_without_vmap_runs_in_a_loop_and_notes_say_so(examples: tuple[int, ...]) -> None:
    problem = make_problem(Branching(*examples).double())
    assert_same(backend.solve(problem, EVERYTHING, True), reference.solve(problem, EVERYTHING, True))
    (note,) = backend.notes(problem)
    assert note.startswith(
        "tasks run in a loop: vmap failed with RuntimeError: vmap: It looks like you're attempting"
    )


def test_error_of_the_network_is_raised_and_not_remembered() -> None:
    class Failing(nn.Sequential):
        broken = True

        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise ZeroDivisionError("of the network's own")
            return super().forward(x)

    net = Failing(nn.Linear(3, 2)).double()
    net.broken = False
    problem = make_problem(net)
    net.broken = True
    with pytest.raises(ZeroDivisionError, match="of the network's own"):
        backend.solve(problem, EVERYTHING, True)
    net.broken = False
    assert backend.notes(problem) == []


_CALLS: list[None] = []


class Counting(nn.Sequential):
    """Counts its forward passes; under vmap one is of all tasks. A count of its own would be put
    back, as a state."""

    def forward(self, x: Tensor) -> Tensor:
        _CALLS.append(None)
        return super().forward(x)


@pytest.mark.parametrize(
    ("memory", "chunk", "steps", "calls"),
    [
        ("store", None, 3, 4),
        ("recompute", None, 3, 7),
        ("store", 2, 3, 12),  # three chunks
        ("recompute", 2, 3, 21),
        ("recompute", 9, 3, 7),
        ("recompute", 1, 3, 35),
        ("auto", None, 3, 4),  # a small graph is stored
    ],
)
def test_store_runs_no_step_twice_and_recompute_keeps_no_graph(
    memory: str, chunk: int | None, steps: int, calls: int
) -> None:
    net = Counting(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 2)).double()
    problem = make_problem(net, tasks=5, steps=steps, memory=memory, task_chunk=chunk, lr=1e-3)
    wrt = frozenset({"params"})
    backend.solve(replace(problem, steps=1, step_weights=None), wrt, False)  # what is found out once
    _CALLS.clear()
    backend.solve(problem, wrt, False)
    assert len(_CALLS) == calls


def test_auto_stores_while_the_graphs_of_what_runs_at_once_stay_below_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Counting(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 2)).double()
    problem = make_problem(net, tasks=4, steps=3)
    one = torch_tasks.graph_bytes(problem, vectorised=True)
    hidden = 7 * 13 * 8  # the activations of one task's hidden layer
    assert hidden < one < 10 * hidden + 4 * 8 * sum(value.numel() for value in problem.params.values())
    monkeypatch.setattr(torch_memory, "STORE_AT_MOST", 2 * 3 * one)
    for chunk, calls in ((None, 7), (2, 2 * 4), (3, 2 * 7)):
        backend.solve(replace(problem, task_chunk=chunk), EVERYTHING, False)
        _CALLS.clear()
        backend.solve(replace(problem, task_chunk=chunk), EVERYTHING, False)
        assert len(_CALLS) == calls


def test_notes_name_the_chunks() -> None:
    assert backend.notes(make_problem(dropout_net(), task_chunk=2)) == [
        "tasks run 2 at a time, and no more than theirs is in memory"
    ]
    assert backend.notes(make_problem(dropout_net(), task_chunk=3)) == []


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_dropout_in_chunks_matches_finite_differences_with_the_same_masks(chunk: int, memory: str) -> None:
    problem = make_problem(
        dropout_net(), steps=3, step_weights=True, tasks=3, task_chunk=chunk, memory=memory
    )
    _check_by_finite_differences(problem)


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Dropout(0.4), nn.Linear(13, 2)).double().train()


def seeded(problem: Problem, wrt: frozenset[str] = EVERYTHING) -> dict[str, Tensor]:
    torch.manual_seed(11)
    return tensors_of(backend.solve(problem, wrt, True))


def test_dropout_of_one_task_matches_reference_with_the_same_masks() -> None:
    problem = make_problem(dropout_net(), tasks=1, steps=3, step_weights=True, momentum=0.4)
    torch.manual_seed(11)
    expected = reference.solve(problem, EVERYTHING, True)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert_same(backend.solve(problem, EVERYTHING, True), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_under_vmap_matches_finite_differences_with_the_same_masks() -> None:
    # From one seed J is a smooth function of the parameters; a recompute with other masks would not
    # be its gradient.
    problem = make_problem(dropout_net(), steps=3, step_weights=True, tasks=4)
    assert backend.notes(problem) == []
    _check_by_finite_differences(problem)


def _check_by_finite_differences(problem: Problem) -> None:
    gradients = seeded(problem)
    for name, value in problem.params.items():
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        values = []
        for shift in (1e-5, -1e-5):
            problem.params[name] = value + shift * direction
            values.append(seeded(problem, frozenset())["task_losses"].mean())
        problem.params[name] = value
        numeric = (values[0] - values[1]) / 2e-5
        assert error((gradients[f"params[{name}]"] * direction).sum(), numeric) < 1e-6


def test_dropout_differs_between_tasks_and_calls() -> None:
    problem = make_problem(dropout_net(), tasks=3)
    for tensor in (problem.support.x, problem.support.y, problem.query.x, problem.query.y):
        tensor[1:] = tensor[:1]
    first = backend.solve(problem, EVERYTHING, True).task_losses
    second = backend.solve(problem, EVERYTHING, True).task_losses
    assert first.unique().numel() == 3
    assert not torch.equal(first, second)


def test_random_state_moves_on_once_a_forward_pass() -> None:
    problem = make_problem(dropout_net(), steps=2)
    backend.notes(problem)
    seeded(problem, frozenset())
    forward_only = torch.get_rng_state()
    seeded(problem)
    assert torch.equal(torch.get_rng_state(), forward_only)
    unknown = make_problem(dropout_net())
    torch.manual_seed(11)
    backend.notes(unknown)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)
