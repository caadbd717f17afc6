"""Operators without a second derivative, said in one sentence with the way out.

Most raise when the second derivative is taken. A `torch.autograd.Function` that is marked
`once_differentiable` does
not: its gradient ends in a node that nothing leads on from, and what it should have passed on would
be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmeta.problem import Problem

_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented")
_ONCE = re.compile(r"once_differentiable|differentiat\w+ twice|double.?backward|second.order", re.IGNORECASE)
#: What PyTorch calls the node that refuses to be differentiated.
_DEAD_ENDS = ("torch::autograd::Error", "Error", "DelayedError", "torch::autograd::DelayedError")
_MARKED = once_differentiable(lambda ctx: None).__code__


class NotTwiceDifferentiableError(NotImplementedError):
    """A network or a loss uses an operator without a second derivative."""

    def __init__(self, operator: str) -> None:
        super().__init__(
            f"{operator} has no second derivative in PyTorch, and exact second order needs one: use "
            "order='first', or another operator"
        )


@contextmanager
def named_in(problem: Problem) -> Iterator[None]:
    """Names the operator where second order fails because PyTorch has no second derivative of it.

    Raises:
        NotImplementedError: in the place of PyTorch's error.
    """
    try:
        yield
    except NotTwiceDifferentiableError:
        raise
    except RuntimeError as error:
        if problem.order != "second" or not problem.steps:
            raise
        found = _NO_DERIVATIVE.search(str(error))
        if found and found[1].endswith("_backward"):
            raise NotTwiceDifferentiableError(
                f"`{found[1].removesuffix('_backward').lstrip('_')}`"
            ) from error
        if not found and _ONCE.search(str(error)):
            operator = f"an operator of the network or the loss ({str(error).splitlines()[0]})"
            raise NotTwiceDifferentiableError(operator) from error
        raise


def check_twice(losses: Tensor, gradients: Iterable[Tensor]) -> None:
    """Check that gradients can be differentiated: walks their graph once.

    Args:
        losses: what was differentiated.
        gradients: with a graph.

    Raises:
        NotImplementedError: a `torch.autograd.Function` was marked `once_differentiable`.
    """
    if not any(node.name() in _DEAD_ENDS for node in _nodes(gradients)):
        return
    for node in _nodes([losses]):
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _MARKED:
            raise NotTwiceDifferentiableError(f"`{function.__qualname__}`, marked once_differentiable,")  # type: ignore[union-attr]
    raise NotTwiceDifferentiableError("an autograd function that is marked once_differentiable")


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the graphs behind tensors, each once."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
