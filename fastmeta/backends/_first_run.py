"""What is found out about a module before it is run with parameters of a task's own, by a few runs
of one task.

Three things that a forward pass can do are seen by nothing else: it can reach a parameter of the
module otherwise than by the module's attribute, read parameters in the backward pass, when the
module has its own again, and depend on what an earlier pass left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.backends import _inputs
from fastmeta.backends._random_state import preserved_for
from fastmeta.bounded import Known
from fastmeta.inputs import Tree, mapped, signature
from fastmeta.network.functional import call, own
from fastmeta.network.swap import Carried, Exchange
from fastmeta.problem import Problem
from fastmeta.undisturbed import asynchronous

_NUMBERS = (type(None), bool, int, float, complex, str, bytes)
_HELD_APART = ("_parameters", "_buffers", "_modules")
#: Sorts of problems of one network that something is remembered of.
_MOST_SORTS = 1024
_known: Known[int, str] = Known(_MOST_SORTS)


def carries_state(problem: Problem) -> str:
    """What the network carries from one forward pass to the next, e.g. "net.hidden"; "" if nothing.

    Decided once per network, its plain attributes, and shapes, and remembered. Draws nothing from
    the random state. To be called inside `isolated`, with the tensors of `problem` detached.

    Raises:
        ValueError: the network cannot be evaluated with parameters of a task's own; says why.
    """
    key = _key(problem)
    found = _known.get(problem.net, key)
    if found is None:
        found = _examined(problem)
        if found is None:
            return ""
        _known.put(problem.net, key, found)
    return found


def _key(problem: Problem) -> int:
    batch = _inputs.any_batch(problem)
    attributes = [
        (key, value)
        for module in problem.net.modules()
        for key, value in vars(module).items()
        if type(value) in _NUMBERS
    ]
    return hash((*attributes, signature(batch.x, skip=1), problem.device, problem.order, problem.batch_stats))


def _examined(problem: Problem) -> str | None:
    """What the network carries; None if nothing can be said, since it raises: the backend's own run
    then does."""
    exchange = problem.exchange or Exchange(problem.net)
    params = {
        name: own(value[0] if name in problem.per_task else value, requires_grad=True)
        for name, value in problem.params.items()
    }
    x, other = _two_inputs(problem)
    with preserved_for(problem) as start:

        def run(inputs: Tree, carried: Carried | None) -> Tree:
            start.restore()
            return call(exchange, params, inputs, batch_stats=problem.batch_stats, carried=carried)

        try:
            carried = Carried()
            output = run(x, carried)
            _check_reached(_inputs.differentiable(output), exchange)
            _check_backward(
                _inputs.differentiable(output), params, exchange, second=problem.order == "second"
            )
            return _what_is_carried(run, x, other, output, exchange, carried)
        except _Unsuitable as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            if asynchronous(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            return None


class _Unsuitable(Exception):
    """The network cannot be evaluated with parameters of a task's own."""


def _two_inputs(problem: Problem) -> tuple[Tree, Tree]:
    """The first task's, and others of the same kind."""
    batch = _inputs.any_batch(problem)

    def other(x: Tensor) -> Tensor:
        return x * 0.75 if x.is_floating_point() else x.flip(0) if x.dim() else x

    first = _inputs.one_task(batch)
    if problem.tasks > 1:
        return first, mapped(lambda x: x[1, 0] if batch.per_step else x[1], batch.x)
    if problem.query is not None and problem.query is not batch:
        return first, _inputs.one_task(problem.query)
    return first, mapped(other, first)


def _check_reached(outputs: Sequence[Tensor], exchange: Exchange) -> None:
    """All parameters were exchanged: none of the module's own is in the graph."""
    names = {at: name for name, at in exchange.own.items()}
    pending: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise _Unsuitable(
                f"the network reaches its parameter {name!r} otherwise than by the attribute of its module "
                "(a closure, a bound method or an object holds it), so that no task can have its own: read "
                "it from the module in the forward pass"
            )
        pending += [child for child, _ in node.next_functions]


def _check_backward(
    outputs: Sequence[Tensor], params: Mapping[str, Tensor], exchange: Exchange, second: bool
) -> None:
    """The backward pass is the same whatever parameters the module has while it runs."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs:
        return
    leaves = [leaf for leaf in params.values() if leaf.requires_grad]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    objective = torch.stack([(y * v).sum() for y, v in zip(outputs, directions, strict=True)]).sum()

    def gradients() -> list[Tensor]:
        first = _inputs.gradients([objective], leaves, create_graph=second, retain_graph=True)
        return [*first, *(_inputs.gradients(first, leaves, leaves, retain_graph=True) if second else [])]

    right = exchange.run(params, gradients)
    off = exchange.run({name: value + 1 for name, value in params.items()}, gradients)
    if any(leaf.grad is not None for leaf in leaves):
        raise _Unsuitable(
            "the network's backward pass calls .backward() itself, by which no gradient reaches a task"
        )
    if not all(_close(a, b) for a, b in zip(right, off, strict=True)):
        raise _Unsuitable(
            "the network reads its parameters in the backward pass, when they are not the task's any more (a "
            "custom autograd.Function, or saved-tensor hooks that compute anew): hand them to the function "
            "as arguments and save them with ctx.save_for_backward"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6 if a.dtype == torch.float64 else 1e-3, atol=1e-12, equal_nan=True)


def _what_is_carried(
    run: Callable[[Tree, Carried | None], Tree],
    x: Tree,
    other: Tree,
    first: Tree,  # the output for x
    exchange: Exchange,
    carried: Carried,  # after that
) -> str:
    once = _values(exchange, carried)
    change = _difference(exchange, [*exchange.old], once)
    if not change:
        return ""
    again = run(x, carried)
    twice = _values(exchange, carried)
    # a buffer that counts passes is nothing to the output: the attributes of user's own code may be
    grows = _difference(exchange, once, twice, buffers=False)
    if grows or not _equal(again, first) or not _equal(run(other, carried), run(other, None)):
        return grows or change
    return ""


def _values(exchange: Exchange, carried: Carried) -> list[Any]:
    """What the module holds after a pass, the tensors copied."""

    def value(item: Any) -> Any:
        item = carried.copies.get(id(item), item)
        if issubclass(type(item), Tensor):  # what `__class__` says may be anything
            return item if isinstance(item, nn.Parameter) else item.detach().clone()
        if type(item) is dict:
            return {key: value(part) for key, part in item.items()}
        return type(item)(map(value, item)) if type(item) in (list, tuple, set) else item

    return [value(content) for content in carried.contents or []]


def _difference(exchange: Exchange, before: list[Any], after: list[Any], buffers: bool = True) -> str:
    """A place where the module holds something else than before, "" if there is none."""
    for place, container, old, new in zip(exchange.places, exchange.containers, before, after, strict=True):
        if id(container) in exchange.buffers and (not buffers or exchange.buffers[id(container)]):
            continue
        if isinstance(old, dict):
            for key in dict.fromkeys(chain(old, new)):
                if key in _HELD_APART:
                    continue
                if key not in old or key not in new or not _equal(old[key], new[key]):
                    return f"{place.removesuffix(_BUFFERS)}.{key}"
        elif not _equal(old, new):
            return place
    return ""


_BUFFERS = "'s buffers"


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are the same to a forward pass, as far as can be told."""
    if a is b:
        return True
    if issubclass(type(a), Tensor) and issubclass(type(b), Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if issubclass(type(a), dict) and issubclass(type(b), dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if issubclass(type(a), (list, tuple)) and issubclass(type(b), (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and issubclass(type(a), (*_NUMBERS, set, frozenset)) and a == b
