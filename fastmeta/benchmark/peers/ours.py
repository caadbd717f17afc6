"""fastmeta itself: `meta_gradient`, and `MAML` with `backward`, on one backend or on the one that
"auto" takes; and the cost of autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.benchmark.peers import plain_torch
from fastmeta.benchmark.peers.peer import Prepared
from fastmeta.cases import Case, Instance
from fastmeta.cases.rules import rule_of_case
from fastmeta.update_rules import UpdateRule
from fastmeta.version import __version__

if TYPE_CHECKING:
    from fastmeta import MAML


class MetaGradientPeer:
    """`fastmeta.meta_gradient`, with more of its options where they are given."""

    def __init__(self, name: str, backend: str, **options: Any) -> None:
        self.name = name
        self.backend = backend
        self.options = options

    def missing(self) -> str:
        return "" if self.backend == "auto" else str(backends.get(self.backend).missing())

    def version(self) -> str:
        return __version__

    def prepare(self, case: Case, made: Instance) -> Prepared:
        from fastmeta import meta_gradient

        support, query = (made.support_x, made.support_y), (made.query_x, made.query_y)

        def step() -> Any:
            return meta_gradient(
                made.net,
                made.params,
                support,
                query,
                loss=made.loss,
                lr=case.lr,
                steps=case.steps,
                order=case.order,
                adapt=case.adapt or "all",
                memory=case.memory,
                backend=self.backend,
                update_rule=_rule(case, made),
                **self.options,
            )

        return Prepared(step, lambda out: dict(out.grads), backend=self._chosen(case, made))

    def _chosen(self, case: Case, made: Instance) -> Callable[[], str]:
        def chosen() -> str:
            if self.backend != "auto":
                return self.backend
            return self._maml(case, made).explain(*plain_torch.episode(made)).backend

        return chosen

    def _maml(self, case: Case, made: Instance) -> MAML:
        from fastmeta import MAML

        return MAML(
            plain_torch.load(made),
            loss=made.loss,
            inner_lr=case.lr,
            inner_steps=case.steps,
            order=case.order,
            memory=case.memory,
            adapt=case.adapt or "all",
            update_rule=_rule(case, made),
            backend=self.backend,
        )


def _rule(case: Case, made: Instance) -> UpdateRule | None:
    if not case.rule:
        return None
    first = next(iter(made.params.values()))
    return rule_of_case(case.rule, first.dtype, first.device, case.steps)


class MAMLPeer(MetaGradientPeer):
    """`fastmeta.MAML`: the call and `loss.backward()`."""

    def prepare(self, case: Case, made: Instance) -> Prepared:
        maml = self._maml(case, made)
        net = maml.net
        episode = plain_torch.episode(made)
        parameters = list(net.parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            maml(*episode).loss.backward()

        def gradient(_: Any) -> dict[str, Tensor]:
            return {name: value.grad for name, value in net.named_parameters() if value.grad is not None}

        return Prepared(step, gradient, backend=self._chosen(case, made))


def seconds_inside(backend: str) -> Callable[[], float] | None:
    """What tells the seconds that the last step spent in the kernel of a backend; None if nothing
    does."""
    if backend != "cpu":
        return None
    from fastmeta import _C

    return _C.last_run_seconds


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.params = params
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.empty_like(param) for param in ctx.params)


class NoOpAutograd:
    """An autograd Function over the same parameters that computes nothing, with its backward: what
    torch charges."""

    name = "noop-autograd"

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return torch.__version__

    def prepare(self, case: Case, made: Instance) -> Prepared:
        parameters = list(plain_torch.load(made).parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            _Nothing.apply(*parameters).backward()

        # There is nothing to check: it takes no part in the comparison.
        return Prepared(step, lambda _: {})
