"""The three pieces of a meta-step, traced over all tasks and compiled: the gradient of an inner
step, its Hessian-vector product, the query pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fastmeta.backends import _inputs
from fastmeta.backends._sweep import goes_back
from fastmeta.backends._twice import check_twice
from fastmeta.backends.inductor.compile import Compiled, compiled
from fastmeta.backends.inductor.passes import Buffers, Given, Pass
from fastmeta.inputs import Form, flatten
from fastmeta.problem import Problem
from fastmeta.trace.record import UntraceableError

_FRESH = frozenset({torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default})


@dataclass(frozen=True, slots=True)
class Support:
    """What runs on the support set of a step."""

    given: Given
    gradient: Compiled  # given -> g_k for every adapted parameter
    others: tuple[str, ...]  # what else mixed derivatives are wanted by, as keys of `Sweep.total`
    product: Compiled | None  # given, directions -> H_k v, then d<g_k, v> by `others`


@dataclass(frozen=True, slots=True)
class Query:
    """What runs on the query set."""

    given: Given
    form: Form  # of the output
    outputs: int  # leaves of it
    seeded: tuple[int, ...]  # those leaves that cotangents are taken for
    adapted: bool  # gradients by adapted parameters are among the results
    others: tuple[str, ...]
    run: Compiled  # given, dJ/d losses [T], cotangents -> losses, outputs, gradients


@dataclass(frozen=True, slots=True)
class Pieces:
    """What was compiled for one sort of problem."""

    buffers: Buffers
    support: Support | None
    query: Query | None

    def compiled(self) -> dict[str, Compiled]:
        """All of it by name."""
        found = {}
        if self.support is not None:
            found["gradient"] = self.support.gradient
            if self.support.product is not None:
                found["Hessian-vector product"] = self.support.product
        if self.query is not None:
            found["query"] = self.query.run
        return found


def traced(p: Problem, wrt: frozenset[str]) -> Pieces:
    """The pieces of a problem.

    Args:
        p: its tensors detached, inside `isolated`.
        wrt: the gradients wanted.

    Raises:
        UntraceableError: what the module or a loss does cannot be a program.
        CompileError: PyTorch's compiler failed.
    """
    buffers = Buffers.of(p)
    names = list(p.rates) if p.steps else []
    fixed = [n for n in p.params if n not in names and n not in p.frozen] if "params" in wrt else []
    data = _inputs.wanted_parts(p, wrt)

    def others(role: str) -> tuple[str, ...]:
        return (*(f"params.{name}" for name in fixed), *(name for name in data if name.startswith(role)))

    support = _support(p, wrt, buffers, names, others("support")) if p.steps else None
    query = None
    if p.query is not None:
        query = _query(p, wrt, buffers, names, others("query"))
    return Pieces(buffers, support, query)


def _support(
    p: Problem, wrt: frozenset[str], buffers: Buffers, names: Sequence[str], others: tuple[str, ...]
) -> Support:
    keys = [f"params.{name}" for name in names]
    stacked = p.per_task | frozenset(names)
    second = p.order == "second" and goes_back(p, wrt)
    first = Pass(p, buffers, "support", keys)
    first.watch()
    example = first.example(names)

    def gradient(*tensors: Tensor) -> list[Tensor]:
        losses, _, leaves = first.evaluated(tensors, stacked)
        return _inputs.gradients([losses.sum()], [*leaves.values()])

    product = None
    if second:
        whole = Pass(p, buffers, "support", (*keys, *others))
        count = len(example)

        def hessian(*tensors: Tensor) -> list[Tensor]:
            losses, _, leaves = whole.evaluated(tensors[:count], stacked)
            theta = [leaves[key] for key in keys]
            found = _inputs.gradients([losses.sum()], theta, create_graph=True)
            check_twice(losses, found)
            return _inputs.gradients(found, [*leaves.values()], tensors[count:])

        directions = [torch.ones_like(tensor) for tensor in _adapted(example, first.given, keys)]
        product = _made(hessian, [*example, *directions])
    return Support(first.given, _made(gradient, example), others if second else (), product)


def _query(
    p: Problem, wrt: frozenset[str], buffers: Buffers, names: Sequence[str], others: tuple[str, ...]
) -> Query:
    back = goes_back(p, wrt)
    keys = [f"params.{name}" for name in names] if back else []
    stacked = p.per_task | frozenset(names)
    run = Pass(p, buffers, "query", (*keys, *others))
    run.watch()
    example = run.example(names)
    count, forms, seeded = len(example), list[Form](), list[int]()

    def query(*tensors: Tensor) -> list[Tensor]:
        losses, output, leaves = run.evaluated(tensors[:count], stacked)
        outputs, form = flatten(output)
        forms[:] = [form]
        seed, cotangents = tensors[count], tensors[count + 1 :]
        ends = [losses, *(outputs[at] for at in seeded)] if wrt else []
        found = _inputs.gradients(ends, [*leaves.values()], [seed, *cotangents]) if leaves else []
        return [losses.detach(), *(leaf.detach() for leaf in outputs), *found]

    first = next(iter(p.params.values()))
    cotangents: list[Tensor] = []
    if wrt and p.output_grad is not None:
        with torch.no_grad():
            leaves, form = flatten(run.evaluated(example, stacked)[1])
        given = form.match(p.output_grad)
        seeded += [at for at, cotangent in enumerate(given) if cotangent is not None]
        cotangents = [torch.ones_like(leaves[at]) for at in seeded]
    made = _made(query, [*example, first.new_ones(p.tasks), *cotangents])
    form = forms[0]
    outputs = sum(1 for _ in form.match(None))
    return Query(run.given, form, outputs, tuple(seeded), bool(keys), others, made)


def _adapted(tensors: Sequence[Tensor], given: Given, keys: Sequence[str]) -> list[Tensor]:
    found = dict(zip(given.names, tensors, strict=True))
    return [found[key] for key in keys]


def _made(function: Callable[..., list[Tensor]], example: Sequence[Tensor]) -> Compiled:
    """A function, traced with these tensors and compiled."""
    graph = make_fx(function)(*example)
    graph.graph.eliminate_dead_code()
    _check_constants(graph)
    graph.recompile()
    return compiled(graph, example)


def _check_constants(graph: fx.GraphModule) -> None:
    """Constants are those that the code has made itself.

    Raises:
        UntraceableError: one is a tensor from outside, whose values may change.
    """
    for node in graph.graph.nodes:
        if node.op == "get_attr" and any(user.target not in _FRESH for user in node.users):
            shape = tuple(getattr(graph, node.target).shape)
            raise UntraceableError(
                f"it reads a tensor {shape} that is none of its arguments, parameters or buffers"
            )
