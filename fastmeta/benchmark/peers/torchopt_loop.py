"""TorchOpt: its differentiable `MetaSGD` or `MetaAdam`, the network's state restored after each
task, as its MAML example does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared, adam_of, installed_version, not_installed
from fastmeta.cases import Case, Instance
from fastmeta.errors import BackendUnavailable


class TorchOpt:
    """`torchopt.MetaSGD`, or `MetaAdam`, per task, one backward over all of them."""

    name = "torchopt"

    def missing(self) -> str:
        return not_installed("torchopt")

    def version(self) -> str:
        return installed_version("torchopt")

    def prepare(self, case: Case, made: Instance) -> Prepared:
        import torchopt

        if case.adapt:
            raise BackendUnavailable("torchopt.MetaSGD adapts every parameter")
        net = plain_torch.load(made)
        loss = plain_torch.loss_function(case)
        # The optimiser replaces the module's parameters as it steps; these are the leaves.
        parameters = dict(net.named_parameters())
        adam = adam_of(case)
        if adam is None:
            inner = torchopt.MetaSGD(net, lr=case.lr)
        else:
            n = adam.numbers
            betas, roots = (n["beta1"], n["beta2"]), {"eps": n["eps"], "eps_root": n["eps_root"]}
            inner = torchopt.MetaAdam(net, lr=case.lr, betas=betas, **roots, moment_requires_grad=False)

        def step() -> tuple[Tensor, ...]:
            net_state = torchopt.extract_state_dict(net, by="reference")
            inner_state = torchopt.extract_state_dict(inner, by="reference")
            losses = []
            for support_x, support_y, query_x, query_y in plain_torch.tasks(made):
                for _ in range(case.steps):
                    inner.step(loss(net(*support_x), support_y))
                losses.append(loss(net(*query_x), query_y))
                torchopt.recover_state_dict(net, net_state)
                torchopt.recover_state_dict(inner, inner_state)
            return torch.autograd.grad(torch.stack(losses).mean(), tuple(parameters.values()))

        def gradient(out: Any) -> dict[str, Tensor]:
            return dict(zip(parameters, out, strict=True))

        return Prepared(step, gradient)
