"""higher: a monkey-patched module and a differentiable optimiser, one task after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared, installed_version, not_installed, sgd_alone
from fastmeta.cases import Case, Instance


class Higher:
    """`higher.innerloop_ctx` per task; gradients accumulate in the net's own parameters."""

    name = "higher"

    def missing(self) -> str:
        return not_installed("higher")

    def version(self) -> str:
        return installed_version("higher")

    def prepare(self, case: Case, made: Instance) -> Prepared:
        sgd_alone(case)
        import higher

        net = plain_torch.load(made)
        loss = plain_torch.loss_function(case)
        adapted = [value for name, value in net.named_parameters() if case.adapts(name)]
        optimizer = torch.optim.SGD(adapted, lr=case.lr)

        def step() -> Any:
            net.zero_grad(set_to_none=True)
            for support_x, support_y, query_x, query_y in plain_torch.tasks(made):
                with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (adapted, inner):
                    for _ in range(case.steps):
                        inner.step(loss(adapted(*support_x), support_y))
                    (loss(adapted(*query_x), query_y) / case.tasks).backward()

        def gradient(_: Any) -> dict[str, Tensor]:
            return {name: value.grad for name, value in net.named_parameters() if value.grad is not None}

        return Prepared(step, gradient)
