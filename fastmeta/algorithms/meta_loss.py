"""The autograd of an algorithm: gradients are computed together with the loss, and backward only scales them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import Settled, settled
from fastmeta.ops.once import once_differentiable
from fastmeta.ops.plan import Call, mean_loss
from fastmeta.problem import Result

if TYPE_CHECKING:
    from fastmeta.algorithms.maml import MAML

_WRT = {
    (params, rates): frozenset(["params"] * params + ["lr"] * rates)
    for params in (False, True)
    for rates in (False, True)
}


class Leaves(NamedTuple):
    """The meta-parameters that a loss is differentiated by."""

    tensors: list[Tensor]  # parameters, then learned rates; or the one vector of a flattened module
    wrt: frozenset[str]  # "params", "lr"


def meta_loss(maml: MAML, tensors: Tensors, support_per_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), task_losses [T], output [T, M, *out]); loss has a graph where gradients are on and wanted."""
    params, rates = maml.meta_parameters()
    if not torch.is_grad_enabled():
        call = maml.prepare(params, rates, tensors, support_per_step)
        return found_in(settled(maml.who, maml.on_divergence, call, call.solve()))
    leaves, wrt = leaves_of(maml, params, rates)
    inputs = inputs_of(tensors)
    if inputs:
        wrt = wrt.union(inputs) - {"task_weights"}
    call = maml.prepare(params, rates, tensors, support_per_step, wrt)
    found = settled(maml.who, maml.on_divergence, call, call.solve())
    loss, task_losses, output = found_in(found)
    if leaves or inputs:
        gradients = [flat_gradient(maml, call, found.result)] if leaves else []
        gradients += [
            found.by_task_weights() if field == "task_weights" else input_gradient(field, found.result)
            for field in inputs
        ]
        given = [getattr(tensors, field) for field in inputs]
        loss = _Attach.apply((loss, gradients), leaves, *leaves, *given)
    return loss, task_losses, output


def leaves_of(maml: MAML, params: dict[str, Tensor], rates: dict[str, Tensor]) -> Leaves:
    """What a backward pass fills the gradients of.

    Args:
        maml: the module.
        params, rates: its `meta_parameters`.
    """
    flat = maml.flat
    if flat is not None:
        return Leaves([flat.vector], _WRT[bool(flat.names), bool(flat.keys)])
    leaves = [*params.values()]
    has_params = True in [value.requires_grad for value in leaves]
    if not rates:
        return Leaves(leaves if has_params else [], _WRT[has_params, False])
    has_rates = True in [value.requires_grad for value in rates.values()]
    return Leaves((leaves if has_params else []) + [*rates.values()] * has_rates, _WRT[has_params, has_rates])


def flat_gradient(maml: MAML, call: Call, result: Result) -> Tensor:
    """The gradients of all leaves in one vector, in their order."""
    grads, flat = result.grads, maml.flat
    whole = grads.flat_params if call.problem.prefer_flat else None
    if grads.lr is None and whole is not None:
        return whole
    params = grads.params or {}
    rates = {} if grads.lr is None else maml.inner_lrs.by_key(call.plan.rates.fold(grads.lr, call.lr))
    parts = [params[name] for name in (params if flat is None else flat.names)] if whole is None else [whole]
    parts += [rates[key] for key in (rates if flat is None else flat.keys)]
    return torch.cat([part.reshape(-1) for part in parts])


def found_in(found: Settled) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, task_losses, output)."""
    result = found.result
    return found.loss, cast(Tensor, result.task_losses), cast(Tensor, result.output)


def answer(call: Call, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, task_losses, output)."""
    task_losses, output = cast(Tensor, result.task_losses), cast(Tensor, result.output)
    return mean_loss(result, call.problem.task_weights), task_losses, output


def attached(loss: Tensor, gradients: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """A loss as a function of parameters that its gradients are known for, those of the same names."""
    leaves = [*params.values()]
    gradient = torch.cat([gradients[name].reshape(-1) for name in params])
    return cast(Tensor, _Attach.apply((loss, [gradient]), leaves, *leaves))


def attached_to(loss: Tensor, gradients: list[Tensor], leaves: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """A loss as a function of leaves and inputs that its gradients are known for, in their order."""
    if not gradients:
        return loss
    at = len(leaves)
    flat = [torch.cat([gradient.reshape(-1) for gradient in gradients[:at]])] if leaves else []
    return cast(Tensor, _Attach.apply((loss, flat + gradients[at:]), leaves, *leaves, *inputs))


def inputs_of(tensors: Tensors) -> list[str]:
    """The inputs that require grad."""
    try:
        if True not in [x is not None and x.requires_grad for x in tensors]:
            return []
    except AttributeError:  # not a tensor: the checks will name it
        return []
    return [field for field, x in tensors._asdict().items() if x is not None and x.requires_grad]


def input_gradient(field: str, result: Result) -> Tensor:
    """The gradient of the mean loss by an input."""
    if field == "task_weights":
        task_losses = cast(Tensor, result.task_losses)
        return task_losses / task_losses.shape[0]
    return cast(Tensor, getattr(result.grads, field))


class _Attach(torch.autograd.Function):
    """Makes a loss a function of the tensors that its gradients are known for."""

    @staticmethod
    def forward(ctx: Any, known: tuple[Tensor, list[Tensor]], leaves: list[Tensor], *inputs: Tensor) -> Tensor:
        loss, gradients = known
        # not kept on ctx: saved tensors are freed by backward, and a second one gets PyTorch's own error
        ctx.save_for_backward(*gradients)
        ctx.leaves = leaves
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # fresh memory on every call: autograd may make these the .grad of the leaves, unlike what was saved
        scaled = [saved * grad for saved in ctx.saved_tensors]
        if not ctx.leaves:
            return (None, None, *scaled)
        return (None, None, *_unflatten_dense_tensors(scaled[0], ctx.leaves), *scaled[1:])
