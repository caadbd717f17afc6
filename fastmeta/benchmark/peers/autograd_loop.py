"""The peer that everybody writes first: a loop over tasks with `create_graph=True`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared
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
        loss = plain_torch.loss_function(case)

        def step() -> tuple[Tensor, ...]:
            losses = []
            for support_x, support_y, query_x, query_y in plain_torch.tasks(made):
                theta: dict[str, Tensor] = dict(params)
                for _ in range(case.steps):
                    inner = loss(functional_call(made.net, theta, support_x), support_y)
                    now = [theta[name] for name in adapted]
                    gradients = torch.autograd.grad(inner, now, create_graph=True)
                    updated = zip(adapted, now, gradients, strict=True)
                    theta |= {name: value - case.lr * gradient for name, value, gradient in updated}
                losses.append(loss(functional_call(made.net, theta, query_x), query_y))
            return torch.autograd.grad(torch.stack(losses).mean(), tuple(params.values()))

        return Prepared(step, lambda out: dict(zip(params, out, strict=True)))
