"""The ground truth against derivations that share nothing with it: finite differences and closed
forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import EVERYTHING, error, make_problem, mlp, tensors_of
from torch import Tensor, nn

from fastmeta.backends import reference
from fastmeta.problem import Batch, Problem
from fastmeta.update_rules import SGD

torch.manual_seed(0)
TINY = mlp(2, 3, 1)


def objective(problem: Problem) -> Tensor:
    """J of fastmeta.problem, from the values of a result alone."""
    result = reference.solve(problem, frozenset(), True)
    weights = torch.ones(problem.tasks) if problem.task_weights is None else problem.task_weights
    j = (weights * result.task_losses).sum() / problem.tasks
    if problem.adapted_grad is not None:
        j = j + sum(
            (cotangent * result.adapted[name]).sum() for name, cotangent in problem.adapted_grad.items()
        )
    if problem.output_grad is not None:
        j = j + (problem.output_grad * result.output).sum()
    return j


def inputs_of(problem: Problem) -> dict[str, Tensor]:
    """Everything that J depends on, by the names of `tensors_of`."""
    found = {f"params[{name}]": value for name, value in problem.params.items()}
    found |= {f"lr[{name}]": value for name, value in problem.rates.items()}
    for role, batch in (("support", problem.support), ("query", problem.query)):
        found |= {f"{role}_{part}": getattr(batch, part) for part in ("x", "y", "weights")}
    return {name: value for name, value in found.items() if value is not None}


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.6, "weight_decay": 0.2, "rate_form": "all"},
    "weighted": {"weighted": True, "step_weights": True},
    "per_step": {"per_step": True, "weighted": True, "rate_form": "step"},
    "per_task": {"per_task": "some", "rate_form": "task"},
    "cotangents": {"cotangents": True, "rate_form": "element"},
    "head": {"adapt": ("2.weight",), "cotangents": True},
    "no_steps": {"steps": 0, "cotangents": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_gradient_matches_finite_differences(options: dict) -> None:
    problem = make_problem(TINY, (2,), tasks=2, shots=3, queries=2, **options)
    gradients = tensors_of(reference.solve(problem, EVERYTHING, True))
    for name, tensor in inputs_of(problem).items():
        numeric = torch.zeros_like(tensor)
        for index in range(tensor.numel()):
            entry = tensor.view(-1)
            centre, values = entry[index].item(), []
            for shift in (1e-5, -1e-5):
                entry[index] = centre + shift
                values.append(objective(problem))
            entry[index] = centre
            numeric.view(-1)[index] = (values[0] - values[1]) / 2e-5
        assert gradients[name].shape == tensor.shape
        assert error(gradients[name], numeric) < 1e-7, name


class Slope(nn.Module):
    """y = theta x."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta * x


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_linear_regression_matches_closed_form(steps: int, order: str) -> None:
    # L = mean (theta x - y)^2 has gradient h theta - b, so that theta_k follows from theta_0 in
    # closed form.
    net, alpha = Slope(), 0.1
    problem = replace(make_problem(net, (1,), tasks=1, steps=steps, order=order), rule=SGD())
    problem.rates = {"theta": torch.full((1, 1), alpha, dtype=torch.float64)}
    result = reference.solve(problem, EVERYTHING, True)
    (xs, ys), (xq, yq) = ((b.x[0], b.y[0]) for b in (problem.support, problem.query))
    h, b = 2 * (xs * xs).mean(), 2 * (xs * ys).mean()
    hq, bq = 2 * (xq * xq).mean(), 2 * (xq * yq).mean()
    decay = 1 - alpha * h
    theta = [decay**k * (net.theta - b / h) + b / h for k in range(steps + 1)]
    q = hq * theta[-1] - bq
    assert error(result.adapted["theta"][0], theta[-1]) < 1e-12
    assert error(result.grads.params["theta"], q * (decay**steps if order == "second" else 1)) < 1e-12
    rate = -sum(
        (decay ** (steps - 1 - k) if order == "second" else 1) * q * (h * theta[k] - b) for k in range(steps)
    )
    assert error(result.grads.lr["theta"], torch.as_tensor(rate, dtype=torch.float64)) < 1e-12
    assert result.grads.lr["theta"].shape == (1, 1)
    if order == "first" or steps == 0:
        assert not result.grads.support_x.any()
        assert not result.grads.support_y.any()


def test_textbook_maml_of_one_task_matches_reference() -> None:
    problem = make_problem(TINY, (2,), tasks=1, steps=1, lr=0.2)
    x, y, xq, yq = problem.support.x[0], problem.support.y[0], problem.query.x[0], problem.query.y[0]
    theta = [value.clone().requires_grad_() for value in problem.params.values()]

    def mse(x: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return ((torch.tanh(x @ w1.T + b1) @ w2.T + b2 - y) ** 2).mean()

    inner = torch.autograd.grad(mse(x, y, *theta), theta, create_graph=True)
    rates = [rate.item() for rate in problem.rates.values()]
    adapted = [value - rate * g for value, rate, g in zip(theta, rates, inner, strict=True)]
    expected = torch.autograd.grad(mse(xq, yq, *adapted), theta)
    result = reference.solve(problem, frozenset({"params"}), False)
    for found, value in zip(result.grads.params.values(), expected, strict=True):
        assert error(found, value) < 1e-12


def test_momentum_and_weight_decay_match_torch_sgd() -> None:
    problem = make_problem(TINY, (2,), steps=3, momentum=0.7, weight_decay=0.3)
    problem.rates = {name: torch.full_like(rate, 0.1) for name, rate in problem.rates.items()}
    adapted = reference.solve(problem, frozenset(), True).adapted
    for task in range(problem.tasks):
        net = mlp(2, 3, 1)
        net.load_state_dict(problem.params)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.7, weight_decay=0.3)
        for _ in range(3):
            optimiser.zero_grad()
            nn.functional.mse_loss(net(problem.support.x[task]), problem.support.y[task]).backward()
            optimiser.step()
        for name, value in net.named_parameters():
            assert error(adapted[name][task], value.detach()) < 1e-12


def test_only_what_is_asked_for_is_returned() -> None:
    problem = make_problem(TINY, (2,), weighted=True)
    assert tensors_of(reference.solve(problem, frozenset(), False)).keys() == {"task_losses", "output"}
    for name in EVERYTHING - {"params", "lr", "rule"}:
        assert tensors_of(reference.solve(problem, frozenset({name}), False)).keys() == {
            "task_losses",
            "output",
            name,
        }


def test_without_query_set_gradients_come_from_the_cotangent() -> None:
    problem = make_problem(TINY, (2,), cotangents=True)
    problem.query = problem.query_loss = problem.output_grad = None
    result = reference.solve(problem, EVERYTHING, True)
    assert result.task_losses is None
    assert result.output is None
    assert result.grads.query_x is None
    whole = make_problem(TINY, (2,), cotangents=True)
    whole.output_grad = torch.zeros_like(whole.output_grad)
    whole.task_weights = torch.zeros(whole.tasks, dtype=torch.float64)
    expected = reference.solve(whole, EVERYTHING, True)
    assert error(result.grads.support_x, expected.grads.support_x) < 1e-12


def test_rejects_class_index_out_of_range() -> None:
    net = mlp(2, 3, 4)
    problem = make_problem(net, (2,), loss="cross_entropy")
    problem.support.y[1, 2] = 4
    with pytest.raises(
        ValueError, match=r"`support_y` must hold class indices in \[0, 4\).*got 4 at \[1, 2\]"
    ):
        reference.solve(problem, EVERYTHING, False)


def test_task_forward_needs_no_support_set() -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    params = {name: value.detach() for name, value in TINY.named_parameters()}
    problem = Problem(
        net=TINY,
        params=params,
        per_task=frozenset(),
        tasks=3,
        steps=0,
        query=Batch(x),
        output_grad=torch.ones(3, 5, 1).double(),
    )
    result = reference.solve(problem, EVERYTHING, False)
    assert error(result.output, TINY(x).detach()) < 1e-12
    assert error(result.grads.params["2.bias"], torch.tensor([15.0]).double()) < 1e-12
