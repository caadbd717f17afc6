"""The peer that everybody writes first: a loop over tasks with `create_graph=True`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared, adam_of
from fastmeta.cases import Case, Instance


class AutogradLoop:
    """Per-task loop, one graph for all tasks, one backward."""

    name = "autograd-loop"

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return torch.__version__

    def prepare(self, case: Case, made: Instance) -> Prepared:
        params = plain_torch.leaves(made)
        adapted = [name for name in params if case.adapts(name)]
        loss, adam = plain_torch.loss_function(case), adam_of(case)

        def step() -> tuple[Tensor, ...]:
            losses = []
            for support_x, support_y, query_x, query_y in plain_torch.tasks(made):
                theta: dict[str, Tensor] = dict(params)
                moments: dict[str, tuple[Tensor | float, Tensor | float]] = {}
                for k in range(case.steps):
                    inner = loss(functional_call(made.net, theta, support_x), support_y)
                    now = [theta[name] for name in adapted]
                    gradients = torch.autograd.grad(inner, now, create_graph=True)
                    for name, value, gradient in zip(adapted, now, gradients, strict=True):
                        change = gradient
                        if adam is not None:
                            m, v = moments.get(name, (0.0, 0.0))
                            change, moments[name] = _adam(adam.numbers, gradient, m, v, k)
                        theta[name] = value - case.lr * change
                losses.append(loss(functional_call(made.net, theta, query_x), query_y))
            return torch.autograd.grad(torch.stack(losses).mean(), tuple(params.values()))

        return Prepared(step, lambda out: dict(zip(params, out, strict=True)))


def _adam(
    numbers: Mapping[str, float], g: Tensor, m: Tensor | float, v: Tensor | float, k: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(what the learning rate is times, the moments) of step k, from 0."""
    b1, b2 = numbers["beta1"], numbers["beta2"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    root = (v / (1 - b2 ** (k + 1)) + numbers["eps_root"]).sqrt()
    return m / (1 - b1 ** (k + 1)) / (root + numbers["eps"]), (m, v)
