"""An algorithm under torch.compile: one custom operator that the compiler does not look into.

It costs several times what the autograd Function of `meta_loss` does, so it is used while compiling only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastmeta.algorithms.flat_parameters import views
from fastmeta.algorithms.meta_loss import answer, flat_gradient, leaves_of
from fastmeta.ops.checks import Tensors
from fastmeta.ops.plan import NOTHING
from fastmeta.problem import Result

if TYPE_CHECKING:
    from fastmeta.algorithms.maml import MAML

# A compiled graph holds a number in place of the module.
_modules: WeakValueDictionary[int, MAML] = WeakValueDictionary()
_handles = count(1)


def register(maml: MAML) -> int:
    """The number under which compiled code finds a module, as long as that lives."""
    handle = next(_handles)
    _modules[handle] = maml
    return handle


def meta_loss(maml: MAML, tensors: Tensors, support_per_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `fastmeta.algorithms.meta_loss.meta_loss` does, as torch.compile traces it.

    Raises:
        ValueError: an input requires grad.
    """
    for field, x in zip(tensors._fields, tensors, strict=True):
        if x is not None and x.requires_grad:
            raise ValueError(f"MAML: `{field}` requires grad, which is not supported under torch.compile")
    leaves = leaves_of(maml, dict(maml.net.named_parameters()), dict(maml.inner_lrs.named_parameters())).tensors
    with_gradients = torch.is_grad_enabled() and len(leaves) > 0
    loss, task_losses, output, _ = _operator(leaves, *tensors, support_per_step, with_gradients, maml.handle)
    return loss, task_losses.detach(), output.detach()


@torch.library.custom_op("fastmeta::meta_loss", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, task_losses, output, the gradients of all leaves in one vector; empty without gradients)."""
    maml = _modules.get(handle)
    if maml is None:
        raise RuntimeError("MAML: compiled code was called after the module it was compiled for is gone")
    tensors = Tensors(support_x, support_y, support_weights, query_x, query_y, query_weights, task_weights)
    params, rates = maml.meta_parameters()
    wrt = leaves_of(maml, params, rates).wrt if with_gradients else NOTHING
    params, rates = _in_place_of(maml, params, rates, wrt, leaves)
    call = maml.prepare(params, rates, tensors, support_per_step, wrt)
    result = call.solve() if call.plan.program is not None else _outside(call.solve)
    gradient = flat_gradient(maml, call, result) if with_gradients else support_x.new_empty(0)
    return *answer(call, result), gradient


def _outside(solve: Callable[[], Result]) -> Result:
    """`solve()` on a thread of its own: inside an operator PyTorch has vmap and autograd switched off for this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(solve).result()


def _in_place_of(
    maml: MAML, params: dict[str, Tensor], rates: dict[str, Tensor], wrt: frozenset[str], leaves: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The meta-parameters with the values of `leaves`: compiled code may not have written them back yet."""
    flat = maml.flat
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


@_operator.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maml = _modules[handle]
    # the network once, on tensors without values, for the shape of its output
    params = {name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in maml.net.named_parameters()}
    buffers = {name: torch.empty(b.shape, dtype=b.dtype, device=b.device) for name, b in maml.net.named_buffers()}
    example = torch.func.functional_call(maml.net, {**params, **buffers}, (query_x[0],))  # [M, *out]
    task_losses = example.new_empty(query_x.shape[0])
    size = sum(leaf.numel() for leaf in leaves) if with_gradients else 0
    return (
        task_losses.new_empty(()),
        task_losses,
        example.new_empty(query_x.shape[0], *example.shape),
        example.new_empty(size),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])
    ctx.shapes = [leaf.shape for leaf in inputs[0]]


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    pieces = (gradient * grad).split([shape.numel() for shape in ctx.shapes])
    leaves = [piece.view(shape) for piece, shape in zip(pieces, ctx.shapes, strict=True)]
    return leaves, *(None,) * 10


_operator.register_autograd(_backward, setup_context=_keep)
