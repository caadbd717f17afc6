"""The checks of an operator's tensors: shapes, dtypes and devices, never values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmeta.inputs import NotATreeError, Tree, leaves_of, named_leaves
from fastmeta.losses import Loss
from fastmeta.ops.options import Options, argument
from fastmeta.ops.wrappers import check_wrappers
from fastmeta.ordinary import check_ordinary, has_memory
from fastmeta.problem import DIFFERENTIABLE


class Tensors(NamedTuple):
    """The tensors of one call, as the user gave them; fields are those of `Problem`, None where
    there is none. Those of x and y may be trees, see `fastmeta.inputs`."""

    support_x: Tree = None
    support_y: Tree = None
    support_weights: Tensor | None = None
    query_x: Tree = None
    query_y: Tree = None
    query_weights: Tensor | None = None
    task_weights: Tensor | None = None


class Shapes(NamedTuple):
    """What the checks have found out."""

    tasks: int  # T
    support: tuple[int, ...]  # leading dimensions of the support set: (T, N) or (T, K, N), () without one
    query: tuple[int, ...]  # (T, M), () without a query set
    # ^ of a tree those of its first tensor, which may have no N or M
    input: tuple[int, ...]  # one example, where it is one tensor
    params: dict[str, tuple[int, ...]]  # name -> S, of one task
    per_task: frozenset[str]
    device: torch.device
    dtype: torch.dtype


def check_tensors(options: Options, net: nn.Module, params: Mapping[str, Tensor], tensors: Tensors) -> Shapes:
    """Check all tensors of one call against each other and against the network.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    who = options.who
    device, dtype = _check_params(who, net, params)
    _check_buffers(who, net)
    for field, tree in zip(tensors._fields, tensors, strict=True):
        for name, tensor in leaves_named(who, field, tree):
            _check_sort(name, field, tensor, device, dtype)
    support = _check_set(options, "support", tensors, None)
    query = _check_set(options, "query", tensors, support[0] if support else None)
    lead = support or query
    tasks = lead[0]
    _check_shape(who, "task_weights", tensors.task_weights, "[T]", (tasks,))
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    per_task = _per_task(who, params, shapes, tasks)
    first = tensors.query_x if tensors.support_x is None else tensors.support_x
    example = tuple(first.shape[len(lead) :]) if isinstance(first, Tensor) else ()
    return Shapes(tasks, support, query, example, shapes, per_task, device, dtype)


def check_net(who: str, net: nn.Module) -> None:
    """Check that a network is a module whose parameters are there.

    Raises:
        TypeError, ValueError: says what it is instead.
    """
    what = argument(who, "net")
    if not isinstance(net, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(net).__name__}")
    check_wrappers(what, net)
    parameters = dict(net.named_parameters())
    if not parameters:
        raise ValueError(f"{what} must have parameters, {type(net).__name__} has none")
    lazy = [name for name, value in parameters.items() if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{what} must be initialised, {lazy[0]!r} has no shape yet: call the network once before"
        )


def check_wrt(who: str, wrt: frozenset[str], tensors: Tensors) -> None:
    """Check that everything a gradient is asked for is there and has one.

    Raises:
        ValueError: an unknown name, or an input that was not given.
        TypeError: an input of integers.
    """
    for name in sorted(wrt):
        if name not in DIFFERENTIABLE:
            allowed = ", ".join(map(repr, DIFFERENTIABLE))
            raise ValueError(f"{argument(who, 'wrt')} must hold names out of {allowed}, got {name!r}")
        if name in ("params", "lr", "rule"):
            continue
        tree = getattr(tensors, name)
        if tree is None:
            raise ValueError(f"{argument(who, 'wrt')} has {name!r}, but no {argument(who, name)} was given")
        leaves = leaves_of(tree)
        if not any(leaf.is_floating_point() for leaf in leaves):
            sorts = ", ".join(dict.fromkeys(str(leaf.dtype) for leaf in leaves))
            raise TypeError(f"{argument(who, 'wrt')} has {name!r}, but {sorts} has no gradient")


def check_losses(who: str, tensors: Tensors, loss: Loss | None, query_loss: Loss | None) -> None:
    """Check that losses which have a name get one tensor as their target.

    Raises:
        TypeError: one gets a tree.
    """
    for field, used in (("support_y", loss), ("query_y", query_loss)):
        target = getattr(tensors, field)
        if used is not None and target is not None:
            used.check_one(argument(who, field), target)


def leaves_named(who: str, field: str, tree: Tree) -> list[tuple[str, Tensor]]:
    """(its name in messages, tensor) of every tensor of an argument; none of None.

    Raises:
        TypeError: it is no tensor, nor a tree of tensors where there may be one.
    """
    if tree is None or isinstance(tree, Tensor):
        return [] if tree is None else [(argument(who, field), tree)]
    what, got = argument(who, field), type(tree).__name__
    if field.endswith("weights"):
        raise TypeError(f"{what} must be a tensor, got {got}")
    try:
        named = named_leaves(tree)
    except NotATreeError as error:
        if error.place:
            raise TypeError(
                f"{what} must hold tensors in tuples, lists, dicts and NamedTuples, got {error}"
            ) from None
        raise TypeError(f"{what} must be a tensor, got {got}") from None
    if not named:
        raise TypeError(f"{what} must be a tensor, got {got} without one")
    return [(argument(who, field, name), leaf) for name, leaf in named]


def _check_params(who: str, net: nn.Module, params: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    what = argument(who, "params")
    check_net(who, net)
    own = dict(net.named_parameters())
    if not isinstance(params, Mapping):
        raise TypeError(f"{what} must be a dict from parameter name to tensor, got {type(params).__name__}")
    missing = [name for name in own if name not in params]
    unexpected = [name for name in params if name not in own]
    if missing:
        raise ValueError(f"{what} must have every parameter of the network, {missing[0]!r} is missing")
    if unexpected:
        raise ValueError(f"{what} has {unexpected[0]!r}, which is no parameter of the network")
    first: Tensor | None = None
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}[{name!r}] must be a tensor, got {type(value).__name__}")
        check_ordinary(f"{what}[{name!r}]", value)
        if not value.is_floating_point():
            raise TypeError(f"{what}[{name!r}] must be floating point, got {value.dtype}")
        first = value if first is None else first
        if value.dtype != first.dtype:
            raise TypeError(
                f"{what}[{name!r}] must be {first.dtype}, as the other parameters, got {value.dtype}"
            )
        if value.device != first.device:
            raise ValueError(
                f"{what}[{name!r}] must be on {first.device}, as the other parameters, got {value.device}"
            )
    first = next(iter(params.values()))
    return first.device, first.dtype


def _check_buffers(who: str, net: nn.Module) -> None:
    """Those that are dense; what else a network keeps is its own concern."""
    for name, buffer in net.named_buffers():
        dense = (
            type(buffer) is Tensor
            and buffer.layout == torch.strided
            and not buffer.is_nested
            and not buffer.is_meta
        )
        if dense and not has_memory(buffer):
            check_ordinary(f"{argument(who, 'net')}: the buffer {name!r}", buffer)


def _per_task(
    who: str, params: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]], tasks: int
) -> frozenset[str]:
    own = set()
    for name, shape in shapes.items():
        got = tuple(params[name].shape)
        if got == (tasks, *shape):
            own.add(name)
        elif got != shape:
            what = f"{argument(who, 'params')}[{name!r}]"
            raise ValueError(f"{what} must be {shape} or {(tasks, *shape)}, one for each task, got {got}")
    return frozenset(own)


def _check_sort(what: str, field: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Device and dtype; inputs and targets may hold integers."""
    check_ordinary(what, tensor)
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device}, as the parameters, got {tensor.device}")
    weights = field.endswith("weights")
    if tensor.dtype != dtype and (weights or tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{what} must be {dtype}, as the parameters, got {tensor.dtype}")


def _check_set(options: Options, role: str, tensors: Tensors, tasks: int | None) -> tuple[int, ...]:
    """The leading dimensions of a set, () if the operator has none.

    Args:
        options, tensors: of the call.
        role: "support" or "query".
        tasks: T of the set before; None: there is none.
    """
    who, x = options.who, getattr(tensors, f"{role}_x")
    if x is None:
        return ()
    per_step = role == "support" and options.support_per_step
    letters = ("T", *"K" * per_step, "N" if role == "support" else "M")
    dims, rank = f"[{', '.join(letters)}, ...]", len(letters)
    (what, first), *others = leaves_named(who, f"{role}_x", x)
    alone, got = isinstance(x, Tensor), tuple(first.shape)
    if first.dim() < (rank if alone else rank - 1):
        raise ValueError(f"{what} must be {dims}, got {got}")
    if per_step and got[1] != options.steps:
        raise ValueError(f"{what} must be {dims} with K = {options.steps} inner steps, got {got}")
    if tasks is not None and got[0] != tasks:
        raise ValueError(
            f"{what} must be {dims} with T = {tasks} tasks, as {argument(who, 'support_x')}, got {got}"
        )
    lead = got[:rank]
    _check_not_empty(what, first, lead[:1] + lead[2:] if per_step else lead)
    front = got[: rank - 1]  # what all tensors of a set have in common
    for name, leaf in others:
        _check_front(name, leaf, front, what)
    _check_targets(who, role, tensors, dims, lead if alone else front, front)
    return lead


def _check_targets(
    who: str, role: str, tensors: Tensors, dims: str, lead: tuple[int, ...], front: tuple[int, ...]
) -> None:
    """The leading dimensions of targets and weights; the rest is the loss's to check, and where the
    inputs are a tree, the number of examples too: it is that of the output."""
    field, x = f"{role}_y", argument(who, f"{role}_x")
    for name, leaf in leaves_named(who, field, getattr(tensors, field)):
        if not isinstance(getattr(tensors, field), Tensor):
            _check_front(name, leaf, front, x)
        elif leaf.shape[: len(lead)] != lead:
            raise ValueError(f"{name} must be {dims} with {lead} in front, got {tuple(leaf.shape)}")
    field, dims = f"{role}_weights", dims.replace(", ...", "")
    weights = getattr(tensors, field)
    if weights is not None and lead == front:
        if weights.dim() != len(front) + 1:
            raise ValueError(f"{argument(who, field)} must be {dims}, got {tuple(weights.shape)}")
        _check_front(argument(who, field), weights, front, x)
    else:
        _check_shape(who, field, weights, dims, lead)


def _check_front(what: str, tensor: Tensor, front: tuple[int, ...], other: str) -> None:
    if tuple(tensor.shape[: len(front)]) != front:
        steps = f" and {front[1]} inner steps" if len(front) > 1 else ""
        as_other = other.rpartition(": ")[2]
        raise ValueError(
            f"{what} must begin with {front[0]} tasks{steps}, as {as_other}, got {tuple(tensor.shape)}"
        )


def _check_not_empty(what: str, x: Tensor, lead: tuple[int, ...]) -> None:
    if lead[0] == 0:
        raise ValueError(f"{what} must hold at least one task, got {tuple(x.shape)}")
    if 0 in lead:
        raise ValueError(f"{what} must hold at least one example a task, got {tuple(x.shape)}")


def _check_shape(who: str, field: str, weights: Tensor | None, dims: str, shape: tuple[int, ...]) -> None:
    if weights is not None and tuple(weights.shape) != shape:
        raise ValueError(f"{argument(who, field)} must be {dims} = {shape}, got {tuple(weights.shape)}")
