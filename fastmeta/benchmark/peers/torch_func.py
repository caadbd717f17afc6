"""torch.func: vmap over tasks of the inner loop, grad of grad; and the same compiled as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared, sgd_alone
from fastmeta.cases import Case, Instance
from fastmeta.inputs import Tree


def _meta_gradient(case: Case, made: Instance) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    task = vmap(plain_torch.functional_task(case, made.net), in_dims=(None, 0, 0, 0, 0))

    def objective(params: dict[str, Tensor], *episode: Tree) -> Tensor:
        losses: Tensor = task(params, *episode)
        return losses.mean()

    return grad_and_value(objective)


class TorchFunc:
    """`grad(vmap(inner loop of grad))` with `functional_call`."""

    name = "torch.func"

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return torch.__version__

    def prepare(self, case: Case, made: Instance) -> Prepared:
        sgd_alone(case)
        function = _meta_gradient(case, made)
        episode = plain_torch.episode(made)
        return Prepared(lambda: function(made.params, *episode), lambda out: dict(out[0]))


class TorchCompile(TorchFunc):
    """`torch.compile` of the whole of `TorchFunc`."""

    name = "torch.compile"

    def missing(self) -> str:
        if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
            return "torch.compile needs a C++ compiler, found none"
        return ""

    def prepare(self, case: Case, made: Instance) -> Prepared:
        sgd_alone(case)
        # A fresh cache a case: at the limit of recompilations torch would silently run the function
        # uncompiled.
        torch.compiler.reset()
        function = torch.compile(_meta_gradient(case, made), fullgraph=True, dynamic=False)
        episode = plain_torch.episode(made)
        return Prepared(lambda: function(made.params, *episode), lambda out: dict(out[0]))
