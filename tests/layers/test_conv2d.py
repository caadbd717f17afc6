"""Convolutions as the cpu backend computes them: large ones by Winograd, a first one again instead
of kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.backends.cpu.plan import make_plan
from fastmeta.cases import Case
from fastmeta.verify.problems import problem_of


def stem(norm: nn.Module, *, pool: bool) -> nn.Sequential:
    """A convolution of colour images, whose output is large, and the norm behind it."""
    first = [nn.Conv2d(3, 32, 3, padding=1), norm, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
    second = [
        nn.Conv2d(32, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    return nn.Sequential(*first, *second, nn.Linear(32, 5))


def batch(tasks: int, examples: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(tasks, examples, *shape, dtype=torch.float64), torch.randint(5, (tasks, examples))


def relative_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Of all gradients as one vector: those of biases that a norm subtracts again are zero but for
    rounding."""
    a, b = (torch.cat([value.flatten() for value in grads.values()]) for grads in (ours, reference))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no_pool"])
@pytest.mark.parametrize("size", [(32, 30), (33, 31)], ids=["even", "odd"])
@pytest.mark.parametrize("groups", [None, 4, 32], ids=["batch_norm", "group_norm", "instance_norm"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_first_convolution_that_is_not_kept_matches_reference(
    pool: bool, size: tuple[int, int], groups: int | None, memory: str
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32) if groups is None else nn.GroupNorm(groups, 32)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.5, 0.5)
    net = stem(norm, pool=pool).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    support, query = batch(2, 6, 3, *size), batch(2, 5, 3, *size)
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": 2, "memory": memory}
    ours, reference = (
        fm.meta_gradient(net, params, support, query, backend=b, **options) for b in ("cpu", "reference")
    )
    assert torch.allclose(ours.task_losses, reference.task_losses, rtol=1e-9)
    assert relative_error(ours.grads, reference.grads) < 1e-9


def test_a_first_convolution_takes_no_memory() -> None:
    case = Case("stem", lambda: stem(nn.BatchNorm2d(32), pool=True), (3, 32, 30), 1, 6, 5, 2, "ce")
    problem = problem_of(case, torch.float64, 0)
    without, kept = (
        make_plan(problem, frozenset(wrt), "store").workspace_bytes
        for wrt in (["params"], ["params", "support_x"])
    )
    values = (
        8 * 32 * 32 * 30 * (6 * 2 * 2 + 6 * 2 + 5 * 2)
    )  # of two steps with gradients, their tangents, the query
    assert without < kept - 0.8 * values


def test_values_between_layers_run_as_one_take_no_memory() -> None:
    layers = (nn.Conv2d(5, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    case = Case(
        "block", lambda: nn.Sequential(*layers, nn.Linear(16 * 100, 5)), (5, 20, 20), 1, 6, 5, 1, "ce"
    )
    plan = make_plan(problem_of(case, torch.float64, 0), frozenset(["params"]), "store")
    values = (
        8 * 16 * 20 * 20 * (6 * 4 + 5 * 2)
    )  # the convolution's, their gradients, and of the support set tangents
    assert plan.workspace_bytes < 2 * values + 20 * plan.parameter_set_bytes


def test_a_first_convolution_is_kept_where_inputs_want_gradients() -> None:
    torch.manual_seed(0)
    net = stem(nn.BatchNorm2d(32), pool=True).double()
    params = {name: value.detach() for name, value in net.named_parameters()}
    support, query = batch(1, 6, 3, 32, 30), batch(1, 5, 3, 32, 30)
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": 2, "wrt": ("params", "support_x", "query_x")}
    ours, reference = (
        fm.meta_gradient(net, params, support, query, backend=b, **options) for b in ("cpu", "reference")
    )
    assert relative_error(ours.grads, reference.grads) < 1e-9
    for name in ("support_x", "query_x"):
        a, b = getattr(ours, name), getattr(reference, name)
        assert float((a - b).norm() / b.norm()) < 1e-9
