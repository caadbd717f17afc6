"""An algorithm under torch.compile: one custom operator that the compiler does not look into.

It costs several times what the autograd Function of `meta_loss` does, so it is used while compiling
only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastmeta.algorithms.flat_parameters import views
from fastmeta.algorithms.learner import Learner
from fastmeta.algorithms.meta_loss import flat_gradient, found_in, leaves_of
from fastmeta.backends._random_state import preserved
from fastmeta.capture.capture import captured
from fastmeta.network.functional import call
from fastmeta.ops.again import captures_of, reads
from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import settled
from fastmeta.ops.plan import NOTHING

_T = TypeVar("_T")

# A compiled graph holds a number in place of the module.
_learners: WeakValueDictionary[int, Learner] = WeakValueDictionary()
_handles = count(1)
_sites = count(1)


def register(learner: Learner) -> int:
    """The number under which compiled code finds a module, as long as that lives."""
    handle = next(_handles)
    _learners[handle] = learner
    return handle


def takes(tensors: Tensors) -> bool:
    """Whether a custom operator can have these inputs: tensors, and no trees of them."""
    return all(x is None or isinstance(x, Tensor) for x in tensors)


def meta_loss(learner: Learner, tensors: Tensors, support_per_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `fastmeta.algorithms.meta_loss.meta_loss` does, as torch.compile traces it.

    Raises:
        ValueError: an input requires grad.
    """
    for field, x in zip(tensors._fields, tensors, strict=True):
        if x is not None and x.requires_grad:
            raise ValueError(f"MAML: `{field}` requires grad, which is not supported under torch.compile")
    leaves = leaves_of(
        learner, learner.traced_parameters(), dict(learner.inner_lrs.named_parameters())
    ).tensors
    with_gradients = torch.is_grad_enabled()
    answered = torch.ops.fastmeta.meta_loss(
        leaves, *tensors, support_per_step, with_gradients, learner.handle, _next_site()
    )
    loss, task_losses, output, _ = answered
    return loss, task_losses.detach(), output.detach()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _next_site() -> int:
    """A number for every call in a graph: a network with dropout draws anew, and of two calls that
    are alike the compiler would make one, whatever their tag says."""
    return next(_sites)


def _operator(
    leaves: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    support_weights: Tensor | None,
    query_x: Tensor,
    query_y: Tensor,
    query_weights: Tensor | None,
    task_weights: Tensor | None,
    support_per_step: bool,
    with_gradients: bool,
    handle: int,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, task_losses, output, the gradients of all leaves in one vector; empty without
    gradients)."""
    learner = _learners.get(handle)
    if learner is None:
        raise RuntimeError("MAML: compiled code was called after the module it was compiled for is gone")
    if learner.modules_replaced():
        learner.meta_parameters()  # which the next call will find
        raise RuntimeError(
            "MAML: modules of `net` were replaced after it was compiled; nothing was done, call again"
        )
    tensors = Tensors(support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights)
    params, rates = learner.meta_parameters()
    wrt = leaves_of(learner, params, rates).wrt if with_gradients else NOTHING
    params, rates = _in_place_of(learner, params, rates, wrt, leaves)
    captures = captures_of(True, learner.aliases()) if with_gradients else None
    checked = learner.prepare(params, rates, tensors, support_per_step, wrt, captures)
    run = _just_so if checked.plan.program is not None else _outside
    result = run(checked.solve)
    for read in reads(result.grads.captured, None):
        raise ValueError(
            f"MAML: the network or a loss reads a tensor {tuple(read.tensor.shape)} that requires grad and "
            "is none of its arguments; under torch.compile it would get no gradient: leave the call out of "
            "what is compiled"
        )
    found = settled(learner.who, learner.module.on_divergence, checked, result, run)
    loss, task_losses, output = found_in(found)
    gradient = (
        flat_gradient(learner, checked, found.result) if with_gradients and leaves else loss.new_empty(0)
    )
    # some backends sum both up in one vector, and the outputs of an operator may not share memory
    return loss.clone(), task_losses, output, gradient


def _just_so(function: Callable[[], _T]) -> _T:
    """`function()`."""
    return function()


def _outside(function: Callable[[], _T]) -> _T:
    """`function()` on a thread of its own: inside an operator PyTorch has vmap and autograd
    switched off for this one, and while it traces tensors have no values."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def _in_place_of(
    learner: Learner,
    params: dict[str, Tensor],
    rates: dict[str, Tensor],
    wrt: frozenset[str],
    leaves: list[Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The meta-parameters with the values of `leaves`: compiled code may not have written them back
    yet."""
    flat = learner.flat
    if flat is not None:
        names, keys = flat.names, flat.keys
        leaves = list(views(leaves[0], flat.parts(params, rates))) if leaves else []
    else:
        names = tuple(params) if "params" in wrt else ()
        keys = tuple(rates) if "lr" in wrt else ()
    at = len(names)
    return (
        {**params, **dict(zip(names, leaves[:at], strict=False))},
        {**rates, **dict(zip(keys, leaves[at:], strict=False))},
    )


def _fake(
    leaves: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    support_weights: Tensor | None,
    query_x: Tensor,
    query_y: Tensor,
    query_weights: Tensor | None,
    task_weights: Tensor | None,
    support_per_step: bool,
    with_gradients: bool,
    handle: int,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes of what `_operator` returns."""
    learner = _learners[handle]
    tasks, examples, *input_shape = query_x.shape
    sort = tuple(int(size) for size in input_shape), query_x.dtype, query_x.device
    output_shape = _outside(lambda: _output_shape(learner, examples, *sort))
    dtype = next(learner.net.parameters()).dtype
    size = sum(leaf.numel() for leaf in leaves) if with_gradients else 0
    return (
        query_x.new_empty((), dtype=dtype),
        query_x.new_empty(tasks, dtype=dtype),
        query_x.new_empty(tasks, examples, *output_shape, dtype=dtype),
        query_x.new_empty(size, dtype=dtype),
    )


def _output_shape(
    learner: Learner, examples: int, input_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[int, ...]:
    """The shape of the network's output for one example: of its layer program, or else of one run
    on zeros."""
    if dtype.is_floating_point:
        program, _ = captured(learner.net, input_shape, dtype)
        if program is not None:
            return program.output_shape
    # some networks look at the values or the number of examples: nothing but a real run will do
    x = torch.zeros(int(examples), *input_shape, dtype=dtype, device=device)
    params, _ = learner.meta_parameters()
    with torch.no_grad(), preserved(device, learner.net):
        output = call(learner.net, params, x, batch_stats=learner.module.batch_stats)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{learner.who}: under torch.compile `net` must return one tensor, {type(learner.net).__name__} "
            f"returned {type(output).__name__}: leave the call out of what is compiled"
        )
    return tuple(output.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.shapes = [leaf.shape for leaf in inputs[0]]


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    pieces = (gradient * grad).split([shape.numel() for shape in ctx.shapes])
    leaves = [piece.view(shape) for piece, shape in zip(pieces, ctx.shapes, strict=True)]
    return leaves, *(None,) * 11


torch.library.define(
    "fastmeta::meta_loss",
    torch.library.infer_schema(_operator, mutates_args=()),
    tags=torch.Tag.nondeterministic_seeded,
)
torch.library.impl("fastmeta::meta_loss", "default", _operator)
torch.library.register_fake("fastmeta::meta_loss", _fake)
torch.library.register_autograd("fastmeta::meta_loss", _backward, setup_context=_keep)
