"""Public architectures in float64: value and every gradient of the backends that run any module,
against the loop that everybody writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.architectures import ARCHITECTURES
from fastmeta.inputs import arguments, leaves_of, mapped
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import Key

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = {"mse": F.mse_loss, "ce": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits}
IDS = [case.label for case in ARCHITECTURES]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """What PyTorch has no second derivative of, or a wrong one, by elementary operators."""

    def bag(ids: Tensor, weight: Tensor, *options: object) -> Tensor:
        return F.embedding(ids, weight).mean(1)

    def normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
        return v * (g / v.norm(2, 1, keepdim=True))

    with (
        sdpa_kernel(SDPBackend.MATH),
        runs.without_onednn(),
        mock.patch.object(F, "embedding_bag", bag),
        mock.patch.object(torch, "_weight_norm", normed),
    ):
        yield


@cache
def _plain(case: Case) -> dict[Key, Tensor]:
    """The case by plain PyTorch: a loop over tasks with one graph. Keys are those of a backend's
    result."""
    made = case.build(torch.float64, 0)
    loss = LOSSES[case.loss]
    params = {name: value.requires_grad_() for name, value in made.params.items()}
    rates = {name: value.requires_grad_() for name, value in made.rates.items()}
    data = {name: getattr(made, name) for name in ("support_x", "support_y", "query_x", "query_y")}
    floating: dict[Key, Tensor] = {}
    for name, tree in data.items():
        for i, leaf in enumerate(leaves_of(tree)):
            if leaf.is_floating_point():
                key = (f"d_{name}", "" if isinstance(tree, Tensor) else str(i))
                floating[key] = leaf.requires_grad_()
    losses, outputs = [], []
    with _twice_differentiable():
        for t in range(case.tasks):
            support_x, support_y, query_x, query_y = (
                mapped(lambda leaf, t=t: leaf[t], tree) for tree in data.values()
            )
            inputs, query_inputs = arguments(support_x)[0], arguments(query_x)[0]
            theta: dict[str, Tensor] = dict(params)
            for _ in range(case.steps):
                inner = loss(functional_call(made.net, theta, inputs), support_y)
                gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
                theta = {
                    name: value - rates[name][0, 0] * gradient
                    for (name, value), gradient in zip(theta.items(), gradients, strict=True)
                }
            outputs.append(functional_call(made.net, theta, query_inputs))
            losses.append(loss(outputs[-1], query_y))
        total = torch.stack(losses).mean()
        keys: dict[Key, Tensor] = {("d_params", name): value for name, value in params.items()}
        keys |= {("d_lr", name): value for name, value in rates.items()}
        keys |= floating
        found = torch.autograd.grad(total, list(keys.values()), materialize_grads=True)
    values = {
        ("task_losses", ""): torch.stack(losses).detach(),
        ("output", ""): torch.stack(outputs).detach(),
    }
    return {**values, **dict(zip(keys, found, strict=True))}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ARCHITECTURES, ids=IDS)
def test_matches_the_plain_loop(case: Case, backend: str) -> None:
    errors = rule.errors(runs.run(case, backend, torch.float64, 0), _plain(case), torch.float64)
    assert len(errors) > 5
    assert {name: error for name, error in errors.items() if not error <= rule.FLOAT64} == {}


@pytest.mark.skipif("machine" not in backends.NAMES, reason="there is no machine backend")
def test_most_run_through_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """And those are right; of the others the reason is printed."""
    refused, wrong = {}, {}
    for case in ARCHITECTURES:
        problem = problem_of(case, torch.float64, 0)
        reason = backends.why_not("machine", problem, wanted(case, problem))
        if reason:
            refused[case.label] = reason
            continue
        found = rule.errors(runs.run(case, "machine", torch.float64, 0), _plain(case), torch.float64)
        wrong |= {f"{case.label} {name}": error for name, error in found.items() if not error <= rule.FLOAT64}
    with capsys.disabled():
        print(f"\n{len(ARCHITECTURES) - len(refused)} of {len(ARCHITECTURES)} through the machine")
        print("\n".join(f"  not {label}: {reason}" for label, reason in refused.items()))
    assert wrong == {}
    assert len(ARCHITECTURES) - len(refused) >= 32


def test_architectures_are_many_and_second_order() -> None:
    assert len(ARCHITECTURES) >= 40
    assert len(set(IDS)) == len(ARCHITECTURES)
    assert all(case.steps >= 2 and case.order == "second" and case.wrt_inputs for case in ARCHITECTURES)
