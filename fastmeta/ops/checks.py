"""The checks of an operator's tensors: shapes, dtypes and devices, never values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmeta.ops.options import Options, argument
from fastmeta.ops.wrappers import check_wrappers
from fastmeta.ordinary import check_ordinary, has_memory
from fastmeta.problem import DIFFERENTIABLE


class Tensors(NamedTuple):
    """The tensors of one call, as the user gave them; fields are those of `Problem`, None where
    there is none."""

    support_x: Tensor | None = None
    support_y: Tensor | None = None
    support_weights: Tensor | None = None
    query_x: Tensor | None = None
    query_y: Tensor | None = None
    query_weights: Tensor | None = None
    task_weights: Tensor | None = None


class Shapes(NamedTuple):
    """What the checks have found out."""

    tasks: int  # T
    support: tuple[int, ...]  # leading dimensions of the support set: (T, N) or (T, K, N), () without one
    query: tuple[int, ...]  # (T, M), () without a query set
    input: tuple[int, ...]  # one example
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
    for field, tensor in zip(tensors._fields, tensors, strict=True):
        if tensor is not None:
            _check_sort(argument(who, field), field, tensor, device, dtype)
    support = _check_support(options, tensors)
    query = _check_query(who, tensors)
    lead = support or query
    tasks = lead[0]
    _check_shape(who, "task_weights", tensors.task_weights, "[T]", (tasks,))
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    per_task = _per_task(who, params, shapes, tasks)
    first = tensors.query_x if tensors.support_x is None else tensors.support_x
    example = () if first is None else tuple(first.shape[len(lead) :])
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
        if name in ("params", "lr"):
            continue
        tensor = getattr(tensors, name)
        if tensor is None:
            raise ValueError(f"{argument(who, 'wrt')} has {name!r}, but no {argument(who, name)} was given")
        if not tensor.is_floating_point():
            raise TypeError(f"{argument(who, 'wrt')} has {name!r}, but {tensor.dtype} has no gradient")


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


def _check_sort(what: str, field: str, tensor: object, device: torch.device, dtype: torch.dtype) -> None:
    """Tensor, device and dtype; inputs and targets may hold integers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(tensor).__name__}")
    check_ordinary(what, tensor)
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device}, as the parameters, got {tensor.device}")
    weights = field.endswith("weights")
    if tensor.dtype != dtype and (weights or tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{what} must be {dtype}, as the parameters, got {tensor.dtype}")


def _check_support(options: Options, tensors: Tensors) -> tuple[int, ...]:
    """The leading dimensions of the support set, () if the operator has none."""
    who, x = options.who, tensors.support_x
    if x is None:
        return ()
    what = argument(who, "support_x")
    dims = "[T, K, N, ...]" if options.support_per_step else "[T, N, ...]"
    rank = 3 if options.support_per_step else 2
    if x.dim() < rank:
        raise ValueError(f"{what} must be {dims}, got {tuple(x.shape)}")
    if options.support_per_step and x.shape[1] != options.steps:
        raise ValueError(f"{what} must be {dims} with K = {options.steps} inner steps, got {tuple(x.shape)}")
    lead = tuple(x.shape[:rank])
    _check_not_empty(what, x, lead[:1] + lead[2:] if options.support_per_step else lead)
    _check_lead(who, "support_y", tensors.support_y, dims, lead)
    _check_shape(who, "support_weights", tensors.support_weights, dims.replace(", ...", ""), lead)
    return lead


def _check_query(who: str, tensors: Tensors) -> tuple[int, ...]:
    x = tensors.query_x
    if x is None:
        return ()
    what = argument(who, "query_x")
    support = tensors.support_x
    if x.dim() < 2:
        raise ValueError(f"{what} must be [T, M, ...], got {tuple(x.shape)}")
    if support is not None and x.shape[0] != support.shape[0]:
        raise ValueError(
            f"{what} must be [T, M, ...] with T = {support.shape[0]} tasks, as {argument(who, 'support_x')}, "
            f"got {tuple(x.shape)}"
        )
    lead = tuple(x.shape[:2])
    _check_not_empty(what, x, lead)
    _check_lead(who, "query_y", tensors.query_y, "[T, M, ...]", lead)
    _check_shape(who, "query_weights", tensors.query_weights, "[T, M]", lead)
    return lead


def _check_not_empty(what: str, x: Tensor, lead: tuple[int, ...]) -> None:
    if lead[0] == 0:
        raise ValueError(f"{what} must hold at least one task, got {tuple(x.shape)}")
    if 0 in lead:
        raise ValueError(f"{what} must hold at least one example a task, got {tuple(x.shape)}")


def _check_lead(who: str, field: str, target: Tensor | None, dims: str, lead: tuple[int, ...]) -> None:
    """The leading dimensions of a target; the rest is the loss's to check."""
    if target is not None and target.shape[: len(lead)] != lead:
        raise ValueError(
            f"{argument(who, field)} must be {dims} with {lead} in front, got {tuple(target.shape)}"
        )


def _check_shape(who: str, field: str, weights: Tensor | None, dims: str, shape: tuple[int, ...]) -> None:
    if weights is not None and tuple(weights.shape) != shape:
        raise ValueError(f"{argument(who, field)} must be {dims} = {shape}, got {tuple(weights.shape)}")
