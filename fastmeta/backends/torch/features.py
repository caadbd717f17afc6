"""What modules that stand still return: computed in one forward pass, handed out in those that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastmeta.backends import _inputs
from fastmeta.backends._captured import Watch
from fastmeta.backends.torch.still import replaced, still
from fastmeta.network.functional import call
from fastmeta.problem import Batch, Problem


class Moved(RuntimeError):
    """What was taken to stand still does not: see `still.give_up`."""


class Features:
    """The outputs of some modules of a network, in the order of their calls.

    Whoever reads one gets a copy of its own: what is written into that, others do not see.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.net, self.names = net, names
        self.values: list[Tensor] = []  # empty before `record`
        self._calls: list[tuple[str, TreeSpec, list[bool]]] = []  # module, what it returned, which leaves are tensors

    @contextmanager
    def record(self) -> Iterator[None]:
        """Note what the modules return in the forward pass inside."""
        self.values, self._calls = [], []
        with replaced(self.net, {name: self._recording(name) for name in self.names}):
            yield

    @contextmanager
    def replay(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Have the modules return `values` in the forward pass inside, as many as were recorded."""
        calls, left = iter(self._calls), iter(values)

        def replaying(name: str) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                noted = next(calls, None)
                if noted is None or noted[0] != name:
                    raise Moved(f"{name!r} was called in another order than in the pass before")
                return tree_unflatten([next(left).clone() if tensor else None for tensor in noted[2]], noted[1])

            return run

        with replaced(self.net, {name: replaying(name) for name in self.names}):
            yield

    def _recording(self, name: str) -> Callable[..., Any]:
        forward = self.net.get_submodule(name).forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            leaves, spec = tree_flatten(output)
            self.values += [leaf for leaf in leaves if leaf is not None]
            self._calls.append((name, spec, [leaf is not None for leaf in leaves]))
            return tree_unflatten([None if leaf is None else leaf.clone() for leaf in leaves], spec)

        return run


@dataclass(slots=True)
class Body:
    """Features of one set of all tasks, and where they come from."""

    features: Features
    values: dict[str, Tensor]  # [T, ...], by the keys of their gradients in `Sweep.total`
    made: list[Tensor]  # the same with their graph
    others: dict[str, Tensor]  # the leaves of that
    seen: Watch


def of(problem: Problem, role: str) -> Features | None:
    """The features of one role, to be recorded; None: nothing stands still, or it is computed once anyway.

    Args:
        problem: its step weights written out.
        role: "support" or "query".
    """
    p, batch = problem, getattr(problem, role)
    if batch is None or batch.per_step or len(p.rates) == len(p.params):
        return None
    passes = p.steps if role == "support" else sum(bool(weight) for weight in (p.step_weights or ())[:-1]) + 1
    if p.steps == 0 or passes < 2:
        return None
    params = {name: value[0] if name in p.per_task else value for name, value in p.params.items()}
    names = still(p.net, params, p.rates.keys(), batch.x[0], p.batch_stats)
    return Features(p.net, names) if names else None


def recorded(
    features: Features,
    problem: Problem,
    params: Mapping[str, Tensor],
    stacked: frozenset[str],
    batch: Batch,
    vectorised: bool,
) -> list[Tensor]:
    """What all tasks have of `features`: [T, ...] each. Arguments as of `tasks.evaluate`."""

    def one_task(theta: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        with features.record():
            call(problem.net, theta, x, batch_stats=problem.batch_stats, decompose=vectorised)
        return tuple(features.values)

    if vectorised:
        dims = {name: 0 if name in stacked else None for name in params}
        found = torch.func.vmap(one_task, in_dims=(dims, 0), randomness="different")(dict(params), batch.x)
    else:
        answers = [
            one_task({name: value[t] if name in stacked else value for name, value in params.items()}, batch.x[t])
            for t in range(batch.x.shape[0])
        ]
        found = tuple(map(torch.stack, zip(*answers, strict=True)))
    features.values = []
    return [*found]


def names_of(problem: Problem) -> tuple[str, ...]:
    """The modules that are computed once per call, for `explain()`; its tensors are detached."""
    p = _inputs.with_step_weights(problem)
    found = [features.names for role in ("support", "query") if (features := of(p, role)) is not None]
    return tuple(dict.fromkeys(name for names in found for name in names))
