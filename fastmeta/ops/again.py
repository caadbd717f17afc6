"""Gradients that can be differentiated again: the whole call once more by plain autograd, with its
graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.backends import _inputs, get
from fastmeta.backends._autocast import autocast
from fastmeta.backends._captured import key_of
from fastmeta.backends.torch.replay import Replay
from fastmeta.ops.plan import Call
from fastmeta.ops.rates import Rates
from fastmeta.problem import Captures

_FIND, _GRADIENTS = Captures(False), Captures(True)


def local(tensor: Tensor) -> Tensor:
    """`tensor` again, so that gradients by it run nothing of the graph that made it."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


def gradients(
    call: Call,
    lr: Rates,
    by: Sequence[Tensor],
    captured: Sequence[Tensor],
    replay: Replay | None,
    dtype: torch.dtype | None,
    scale: Tensor | None = None,
) -> list[Tensor]:
    """dJ/d `by` and dJ/d `captured`, times `scale`, with their graph.

    Args:
        call: its tensors have their graphs; its `captures` ask for gradients.
        lr: its learning rates, with theirs.
        by: some of them, made by `local`.
        captured: what the network and the losses read besides.
        replay: of the random state that the call began with; None: it draws nothing.
        dtype: of the autocast that the call was made under.
        scale: (); None: one.
    """
    problem = replace(call.problem, rates=call.plan.rates.spread(lr, graph=True), hyper=call.hyper)
    backend: Any = call.plan.backend
    with autocast(call.plan.shapes.device, dtype), nullcontext() if replay is None else replay.again():
        objective, found = (backend if hasattr(backend, "objective") else get("torch")).objective(problem)
    if scale is not None:
        objective = objective * scale
    grads = _inputs.gradients([objective], [*by, *found.inputs], create_graph=True)
    found.add_kept(grads[len(by) :])
    return [*grads[: len(by)], *matched(captured, found.pairs() or ())]


def matched(tensors: Iterable[Tensor], pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The gradients of `tensors` out of (tensor, gradient).

    Raises:
        RuntimeError: the network or a loss, which was evaluated again for this, no longer read one
            of them.
    """
    found = {key_of(tensor): gradient for tensor, gradient in pairs}
    tensors = list(tensors)
    for tensor in tensors:
        if key_of(tensor) not in found:
            raise RuntimeError(
                f"fastmeta: the backward pass evaluates the network and the losses again, and they did not "
                f"read the tensor {tuple(tensor.shape)} that requires grad and that they read in the forward "
                "pass; bind such a tensor in a default argument or in functools.partial, not in a variable "
                "that changes in between"
            )
    return [found[key_of(tensor)] for tensor in tensors]


@dataclass(frozen=True, slots=True)
class Aliases:
    """Tensors that require no grad and that autograd knows as others: parameters of a flattened
    module.

    Args:
        parts: gives the tensors.
        pieces: gives those that autograd knows, in the same order.
    """

    parts: Callable[[], Sequence[Tensor]]
    pieces: Callable[[], Sequence[Tensor]]


class Read(NamedTuple):
    """A tensor that the network or a loss read past its arguments."""

    tensor: Tensor  # as autograd knows it
    part: Tensor | None  # of which it is the alias
    gradient: Tensor


def captures_of(gradients: bool, aliases: Aliases | None) -> Captures:
    """What a problem is asked for."""
    if aliases is not None:
        return Captures(gradients, aliases.parts)
    return _GRADIENTS if gradients else _FIND


def reads(pairs: list[tuple[Tensor, Tensor]] | None, aliases: Aliases | None) -> list[Read]:
    """What a problem has found, but for what a forward pass made for itself. Empties `pairs`,
    (tensor, gradient)."""
    if not pairs:
        return []
    kept = [(weakref.ref(tensor), gradient) for tensor, gradient in pairs]
    pairs.clear()  # now only what somebody else holds is left
    living = [(tensor, gradient) for reference, gradient in kept if (tensor := reference()) is not None]
    if aliases is None or not living:
        return [Read(tensor, None, gradient) for tensor, gradient in living]
    pieces = {id(part): piece for part, piece in zip(aliases.parts(), aliases.pieces(), strict=True)}
    return [
        Read(pieces.get(id(tensor), tensor), tensor if id(tensor) in pieces else None, gradient)
        for tensor, gradient in living
    ]


def read_again(tensors: Iterable[Tensor], parts: Iterable[Tensor | None]) -> list[Tensor]:
    """What a second evaluation should find, from the tensors and the parts of `Read`."""
    return [tensor if part is None else part for tensor, part in zip(tensors, parts, strict=True)]
