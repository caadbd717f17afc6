"""What modules that stand still return: computed in one forward pass, handed out in those that
follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastmeta.backends._captured import Watch
from fastmeta.backends.torch.each_task import each_task
from fastmeta.backends.torch.still import still
from fastmeta.inputs import flatten, mapped
from fastmeta.network.functional import call
from fastmeta.problem import Batch, Problem

#: What a module runs in the place of its own forward, by its name.
Forwards = dict[str, Callable[..., Any]]


class Moved(RuntimeError):
    """What was taken to stand still does not: see `still.give_up`."""


class Features:
    """The outputs of some modules of a network, in the order of their calls.

    Whoever reads one gets a copy of its own: what is written into that, others do not see.
    """

    def __init__(self, problem: Problem, names: Sequence[str]) -> None:
        self._net, self.names = problem.net, names
        self.values: list[Tensor] = []  # empty before a pass with `recording`
        self._calls: list[
            tuple[str, TreeSpec, list[bool]]
        ] = []  # module, what it returned, which leaves are tensors

    def recording(self) -> Forwards:
        """The modules note what they return in the forward pass that runs these."""
        self.values, self._calls = [], []
        return {name: self._recording(name) for name in self.names}

    def replaying(self, values: Sequence[Tensor]) -> Forwards:
        """The modules return `values` in the forward pass that runs these, as many as were
        recorded."""
        calls, left = iter(self._calls), iter(values)

        def replaying(name: str) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                noted = next(calls, None)
                if noted is None or noted[0] != name:
                    raise Moved(f"{name!r} was called in another order than in the pass before")
                return tree_unflatten(
                    [next(left).clone() if tensor else None for tensor in noted[2]], noted[1]
                )

            return run

        return {name: replaying(name) for name in self.names}

    def _recording(self, name: str) -> Callable[..., Any]:
        module = self._net.get_submodule(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            output = type(module).forward(module, *args, **kwargs)  # on the instance is this very function
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
    made: tuple[Tensor, ...]  # the same with their graph
    others: dict[str, Tensor]  # the leaves of that
    seen: Watch


def standing(problem: Problem) -> dict[str, tuple[str, ...]]:
    """ "support" and "query" -> names of the modules that compute the same for every pass over that
    set of a task.

    A set that nothing stands still for, or that is seen only once, is left out.

    Args:
        problem: its tensors detached, its step weights written out.
    """
    p = problem
    if p.steps == 0 or len(p.rates) == len(p.params) or p.autocast is not None:
        return {}  # autocast: what is added up over the steps would be rounded at each of them
    passes = {"support": p.steps, "query": sum(bool(weight) for weight in (p.step_weights or ())[:-1]) + 1}
    params = {name: value[0] if name in p.per_task else value for name, value in p.params.items()}
    found = {}
    for role, times in passes.items():
        batch = getattr(p, role)
        if batch is not None and not batch.per_step and times > 1:
            found[role] = still(p.net, params, p.rates.keys(), mapped(lambda x: x[0], batch.x), p.batch_stats)
    return {role: names for role, names in found.items() if names}


def recorded(
    features: Features,
    problem: Problem,
    params: Mapping[str, Tensor],
    stacked: frozenset[str],
    batch: Batch,
    vectorised: bool,
) -> tuple[Tensor, ...]:
    """What all tasks have of `features`: [T, ...] each. Arguments as of `Evaluation`."""

    net = problem.exchange or problem.net

    data, form = flatten(batch.x)

    def one_task(theta: Mapping[str, Tensor], *x: Tensor) -> tuple[Tensor, ...]:
        forwards = features.recording()
        call(
            net,
            theta,
            form.build(x),
            batch_stats=problem.batch_stats,
            decompose=vectorised,
            forwards=forwards,
        )
        return tuple(features.values)

    found = each_task(one_task, params, stacked, data, vectorised)
    features.values = []
    return found
