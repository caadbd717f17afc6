"""Each step's own support loss in the objective, as test-time training has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_loops import MSE, RuleCase, errors, meta_gradient, problem
from torch.func import functional_call

import fastmeta as fm

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = {
    "reference": {"backend": "reference"},
    "store": {"backend": "torch", "memory": "store"},
    "recompute": {"backend": "torch", "memory": "recompute"},
    "loop": {"backend": "torch", "task_chunk": 1, "memory": "recompute"},
    "checkpoint": {"backend": "torch", "memory": "checkpoint"},
    **{
        f"{engine}-{memory}": {"backend": engine, "memory": memory}
        for engine in ("cpu", "machine")
        for memory in ("store", "recompute", "checkpoint")
    },
}
WEIGHTS = (0.5, 0.0, 1.3, 0.2)
SGD = RuleCase("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.1})
ADAM = RuleCase("adam", "Adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}, lr=0.02)
WRT = ("params", "lr", "support_x", "query_x")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["same", "per_step"])
@pytest.mark.parametrize("case", [SGD, ADAM], ids=["sgd", "adam"])
def test_matches_autograd(case: RuleCase, per_step: bool, order: str, backend: str) -> None:
    net, params, data = problem(4 if per_step else None)
    lr, own = torch.tensor(case.lr, dtype=torch.float64), case.tensors()
    tasks = torch.tensor([0.4, 1.7], dtype=torch.float64)
    want = meta_gradient(
        case, net, params, data, lr, own, 4, per_step=per_step, first_order=order == "first",
        support_weights=WEIGHTS, task_weights=tasks, step_weights=(0, 0.5, 0, 0, 1),
    )  # fmt: skip
    written = case is SGD  # whose adjoint is written out, and which has no gradients by its numbers
    got = fm.meta_gradient(
        net, params, tuple(data[:2]), tuple(data[2:]), loss="mse", lr=lr, steps=4, order=order,
        support_step_weights=WEIGHTS, step_weights=(0, 0.5, 0, 0, 1), task_weights=tasks,
        support_per_step=per_step, update_rule=case.make(None if written else own),
        wrt=WRT if written else (*WRT, "rule"), **BACKENDS[backend],
    )  # fmt: skip
    if written:
        got, want["rule"] = got._replace(rule={}), {}
    for what, error in errors(got, want).items():
        assert error < 1e-9, what


@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_shared_parameters_and_captured_tensors(order: str, memory: str) -> None:
    """A body that does not adapt, and a weight that the loss reads."""
    net, params, (sx, sy, qx, qy) = problem()
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return MSE(scale * output, target)

    theta0 = {n: v.clone().requires_grad_() for n, v in params.items()}
    total = []
    for t in range(len(sx)):
        theta = dict(theta0)
        for weight in WEIGHTS:
            value = loss(functional_call(net, theta, (sx[t],)), sy[t])
            head = ["2.weight", "2.bias"]
            g = torch.autograd.grad(
                value, [theta[n] for n in head], create_graph=order == "second", retain_graph=True
            )
            total.append(weight * value)
            theta = {**theta, **{n: theta[n] - 0.1 * d for n, d in zip(head, g, strict=True)}}
        total.append(loss(functional_call(net, theta, (qx[t],)), qy[t]))
    want = torch.autograd.grad(torch.stack(total).sum() / len(sx), [*theta0.values(), scale])
    got = fm.meta_gradient(
        net, params, (sx, sy), (qx, qy), loss=loss, lr=0.1, steps=4, order=order, adapt="head",
        support_step_weights=WEIGHTS, memory=memory, backend="torch",
    )  # fmt: skip
    found = [*got.grads.values(), got.captured[0][1]]
    for value, expected in zip(found, want, strict=True):
        assert float((value - expected).norm() / expected.norm()) < 1e-9


def test_maml_has_them_in_its_loss_and_its_second_derivatives() -> None:
    net, _, episode = problem()
    maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=4, support_step_weights=WEIGHTS)
    plain = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=4)
    out, leaves = maml(*episode), list(net.parameters())
    theta = dict(net.named_parameters())
    case = RuleCase("", "SGD", {}, lr=0.1)
    lr = torch.tensor(0.1, dtype=torch.float64)
    want = meta_gradient(case, net, theta, episode, lr, {}, 4, support_weights=WEIGHTS)
    assert float((out.task_losses - want["task_losses"]).norm()) < 1e-12
    assert float((out.loss - plain(*episode).loss).abs()) > 0.1
    g = torch.autograd.grad(out.loss, leaves, create_graph=True)
    for found, expected in zip(g, want["params"].values(), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert all(
        bool(h.isfinite().all()) for h in torch.autograd.grad(sum(x.square().sum() for x in g), leaves)
    )


def test_rejects_what_does_not_fit() -> None:
    net, params, data = problem()

    def run(**how: Any) -> Any:
        how = {"loss": "mse", "lr": 0.1, "steps": 2, "support_step_weights": (1.0, 1.0), **how}
        return fm.meta_gradient(net, params, tuple(data[:2]), tuple(data[2:]), **how)

    with pytest.raises(ValueError, match=r"`support_step_weights` must hold steps = 2 numbers, got 3"):
        run(support_step_weights=(1, 2, 3))
    with pytest.raises(TypeError, match=r"`support_step_weights` must be a sequence of numbers, got 'ab'"):
        run(support_step_weights="ab")
    with pytest.raises(fm.BackendUnavailable, match="support losses are in the objective"):
        run(backend="inductor")
    with pytest.raises(ValueError, match="MAMLPlusPlus: `support_step_weights` must be None"):
        fm.MAMLPlusPlus(
            net, loss="mse", inner_lr=0.1, inner_steps=2, support_step_weights=(1, 1),
            multi_step_epochs=0, first_order_epochs=0,
        )  # fmt: skip
