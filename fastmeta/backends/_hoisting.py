"""What depends on no adapted parameter, computed once: the captured network's body apart from the
inner loop.

The body runs on support and query sets, the K steps on what it returns, and the body once more with
the gradients of that, J being the inner loop's as a function of features F = body(x):

    dJ / d phi = <dJ / dF_support, dF_support / d phi> + <dJ / dF_query, dF_query / d phi>

Each of the three is a problem of its own for the same backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from fastmeta.backends._pieces import add
from fastmeta.graph.cost import multiply_adds
from fastmeta.graph.program import Program
from fastmeta.graph.split import Halves, split
from fastmeta.problem import Batch, Gradients, Problem, Result, Scratch

#: Multiply-adds that have to be saved before three to five calls are worth more than one, by kind
#: of device: on the CPU as bench/hoisting.py measures it, on a GPU an estimate, some 100
#: microseconds of launches.
WORTH = {"cpu": 10_000_000, "cuda": 1_000_000_000}
#: A multiply-add of a pass of the body alone takes as long as so many of the meta-step: it writes
#: down what the other has in caches.
ALONE = 1.2

Solve = Callable[[Problem, frozenset[str], bool], Result]
Refuses = Callable[[Problem, frozenset[str]], str]

_THROUGH_STEPS = frozenset({"params", "lr", "support_x", "support_y", "support_weights"})
_INPUTS = {"support": "support_x", "query": "query_x"}


@dataclass(slots=True)
class _Pass:
    """The body's way over the support or the query sets, and back."""

    role: str
    wrt: frozenset[str]  # of the way back; empty: there is none
    forward: Scratch = field(default_factory=Scratch)
    backward: Scratch = field(default_factory=Scratch)


@dataclass(slots=True)
class Hoisted:
    """How problems that differ in nothing but the values of tensors are taken apart."""

    halves: Halves
    passes: list[_Pass]
    wrt: frozenset[str]  # of the inner loop
    scratch: Scratch = field(default_factory=Scratch)

    def body(self, problem: Problem, run: _Pass, output_grad: Tensor | None = None) -> Problem:
        """The body's output for the examples of one pass; with a cotangent its way back."""
        names = [name for name, _ in self.halves.body.params]
        return Problem(
            net=problem.net,
            params={name: problem.params[name] for name in names},
            per_task=problem.per_task.intersection(names),
            tasks=problem.tasks,
            steps=0,
            query=Batch(_inputs(problem, run.role)),
            memory=problem.memory,
            batch_stats=problem.batch_stats,
            output_grad=output_grad,
            program=self.halves.body,
            scratch=run.forward if output_grad is None else run.backward,
        )

    def inner(self, problem: Problem, features: dict[str, Tensor]) -> Problem:
        """The inner loop on features."""
        names = [name for name, _ in self.halves.rest.params]
        cotangents = problem.adapted_grad
        return replace(
            problem,
            params={name: problem.params[name] for name in names},
            per_task=problem.per_task.intersection(names),
            support=_on(problem.support, features.get("support")),
            query=_on(problem.query, features.get("query")),
            adapted_grad=None if cotangents is None else {name: cotangents[name] for name in names},
            program=self.halves.rest,
            prefer_flat=False,
            scratch=self.scratch,
        )


def solve(one: Solve, refuses: Refuses, problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem` by `one`, in parts where that saves enough.

    Args:
        one: a backend's answer to a single problem.
        refuses: whether that can answer one.
        problem, wrt, adapted: as a backend has them.
    """
    key = ("hoisted", wrt)
    known = problem.scratch.get(key, ...)  # type: ignore[call-overload]
    if known is ...:
        known = problem.scratch[key] = hoisted(refuses, problem, wrt)  # type: ignore[index]
    return one(problem, wrt, adapted) if known is None else _solve(one, known, problem, wrt, adapted)


def hoisted(refuses: Refuses, problem: Problem, wrt: frozenset[str]) -> Hoisted | None:
    """How to take `problem` apart; None: it had better run in one piece. Reads shapes and options
    only."""
    program, support = problem.program, problem.support
    if program is None or support is None or support.per_step or problem.steps < 1:
        return None  # every example is seen once, however that is done
    halves = split(program, problem.rates)
    if halves is None:
        return None
    plan = _plan(problem, wrt, halves)
    if _saving(problem, wrt, plan) < WORTH["cpu" if support.x.device.type == "cpu" else "cuda"]:
        return None
    return None if any(refuses(part, of) for _, part, of in parts(problem, plan)) else plan


def parts(problem: Problem, plan: Hoisted) -> Iterator[tuple[str, Problem, frozenset[str]]]:
    """What `problem` is taken apart into, each with a word for it and the gradients wanted; nobody
    has run the ones before, so that features and their gradients hold no numbers."""
    features = {role: _like(problem, role, plan.halves.body) for role in _roles(problem)}
    for run in plan.passes:
        yield "body", plan.body(problem, run), frozenset()
    yield "inner loop", plan.inner(problem, features), plan.wrt
    for run in plan.passes:
        if run.wrt:
            yield "body, way back", plan.body(problem, run, features[run.role]), run.wrt


def _saving(problem: Problem, wrt: frozenset[str], plan: Hoisted) -> float:
    """About how many multiply-adds of the meta-step, of all tasks, are saved by taking `problem`
    apart."""
    each = sum(_repeated(problem, wrt, plan.halves.body).values()) - ALONE * _once(problem, plan)
    return problem.tasks * each


def _once(problem: Problem, plan: Hoisted) -> int:
    """Multiply-adds of the body's passes for one task."""
    f, first = multiply_adds(plan.halves.body)
    total = 0
    for run in plan.passes:
        total += _examples(problem, run.role) * (4 * f - first if run.wrt else f)
    return total


def cost(problem: Problem, plan: Hoisted, of: Callable[[Problem], dict[str, int]]) -> dict[str, int]:
    """Multiply-adds by memory mode, where `of` gives those of a single problem."""
    (inner,) = (part for what, part, _ in parts(problem, plan) if what == "inner loop")
    return {mode: count + problem.tasks * _once(problem, plan) for mode, count in of(inner).items()}


def _repeated(problem: Problem, wrt: frozenset[str], body: Program) -> dict[str, int]:
    """Multiply-adds of the body for one task inside the meta-step: of support and query sets."""
    f, first = multiply_adds(body)
    second = problem.order == "second" and not wrt.isdisjoint(_THROUGH_STEPS)
    step = 8 * f - 5 * first if second else 2 * f - first  # the gradients of its weights are not wanted
    queries = sum(weight != 0 for weight in problem.step_weights or (1,))
    return {
        "support": _examples(problem, "support") * problem.steps * step,
        "query": _examples(problem, "query") * queries * (3 * f - first if wrt else f),
    }


def describe(
    one: Callable[[Problem, frozenset[str]], list[str]],
    refuses: Refuses,
    problem: Problem,
    wrt: frozenset[str],
) -> list[str]:
    """What runs, for `explain()`: what `one` says of a single problem, for each part where there
    are several."""
    plan = hoisted(refuses, problem, wrt)
    if plan is None:
        return one(problem, wrt)
    body, rest = len(plan.halves.body.layers), len(plan.halves.rest.layers)
    lines = [
        f"computed once per call: the first {body} of {body + rest} layers, which depend on no adapted "
        "parameter; the inner steps begin at their output"
    ]
    for what, part, of in parts(problem, plan):
        lines += [f"{what}: {line}" for line in one(part, of)]
    return list(dict.fromkeys(lines))


def _plan(problem: Problem, wrt: frozenset[str], halves: Halves) -> Hoisted:
    back = {role: _wanted(problem, role, wrt, halves.body) for role in _roles(problem)}
    inner = wrt.difference(_INPUTS.values()) | {_INPUTS[role] for role in back if back[role]}
    return Hoisted(halves, [_Pass(role, back[role]) for role in back], inner)


def _wanted(problem: Problem, role: str, wrt: frozenset[str], body: Program) -> frozenset[str]:
    """What the body's way back from a set is wanted for: "params", and "query_x" for the set's
    inputs."""
    if role == "support" and problem.order == "first":
        return frozenset()  # the inner gradients are constants
    params = "params" in wrt and any(name not in problem.frozen for name, _ in body.params)
    return frozenset(["params"] * params + ["query_x"] * (_INPUTS[role] in wrt))


def _solve(one: Solve, plan: Hoisted, problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    features = {}
    for run in plan.passes:
        features[run.role] = cast(Tensor, one(plan.body(problem, run), frozenset(), False).output)
    result = one(plan.inner(problem, features), plan.wrt, adapted)
    if result.adapted is not None:
        own = result.adapted
        result.adapted = {
            name: own[name] if name in own else _every_task(problem, name).clone() for name in problem.params
        }
    _way_back(one, plan, problem, wrt, result.grads)
    return result


def _way_back(one: Solve, plan: Hoisted, problem: Problem, wrt: frozenset[str], grads: Gradients) -> None:
    """Make the gradients of the inner loop those of the whole."""
    params = grads.params
    for run in plan.passes:
        name = _INPUTS[run.role]
        cotangent = getattr(grads, name)
        setattr(grads, name, torch.zeros_like(_inputs(problem, run.role)) if name in wrt else None)
        if not run.wrt:
            continue
        found = one(plan.body(problem, run, cotangent), run.wrt, False).grads
        if name in wrt:
            setattr(grads, name, found.query_x)
        if params is not None and found.params is not None:
            for key, gradient in found.params.items():
                params[key] = add(params[key], gradient) if key in params else gradient
    if params is None:
        return
    for key, _ in plan.halves.body.params:
        if key not in params:
            params[key] = torch.zeros_like(problem.params[key])
        if problem.adapted_grad is not None and key not in dict(plan.halves.rest.params):
            seed = problem.adapted_grad[key].detach()
            params[key] += seed if key in problem.per_task else seed.sum(0)
    grads.params = {name: params[name] for name in problem.params}


def _every_task(problem: Problem, name: str) -> Tensor:
    value = problem.params[name].detach()
    return value if name in problem.per_task else value.expand(problem.tasks, *value.shape)


def _on(batch: Batch | None, features: Tensor | None) -> Batch | None:
    return None if batch is None or features is None else replace(batch, x=features)


def _roles(problem: Problem) -> list[str]:
    return [role for role in _INPUTS if getattr(problem, role) is not None]


def _inputs(problem: Problem, role: str) -> Tensor:
    """x: [T, N, *in]."""
    return cast(Tensor, getattr(problem, role).x.detach())


def _examples(problem: Problem, role: str) -> int:
    return 0 if getattr(problem, role) is None else int(getattr(problem, role).x.shape[1])


def _like(problem: Problem, role: str, body: Program) -> Tensor:
    """A tensor of the shape of the features, without memory."""
    x = getattr(problem, role).x
    return x.new_empty(()).expand(*x.shape[:2], *body.output_shape)
