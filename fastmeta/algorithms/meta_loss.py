"""The autograd of an algorithm: gradients are computed together with the loss, and backward only scales them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from fastmeta.algorithms.flat_parameters import FlatParameters, views
from fastmeta.backends._random_state import RandomState
from fastmeta.losses import Loss
from fastmeta.ops import again
from fastmeta.ops.checks import Tensors
from fastmeta.ops.meta_gradient import mean_loss
from fastmeta.ops.once import refused
from fastmeta.ops.options import Options
from fastmeta.ops.plan import Call, prepare
from fastmeta.ops.rates import Rates
from fastmeta.problem import Captures, Result

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
        return answer(call, call.solve())
    leaves, wrt = leaves_of(maml, params, rates)
    inputs = inputs_of(tensors)
    if inputs:
        wrt = wrt.union(inputs) - {"task_weights"}
    aliases = maml.aliases()
    captures = again.captures_of(True, aliases)
    call = maml.prepare(params, rates, tensors, support_per_step, wrt, captures)
    state = state_before(call)
    result = call.solve()
    loss, task_losses, output = answer(call, result)
    captured = again.reads(result.grads.captured, aliases)
    if leaves or inputs or captured:
        gradients = [flat_gradient(maml, call, result)] if leaves else []
        gradients += [input_gradient(field, result) for field in inputs]
        losses = maml.loss, maml.query_loss
        recipe = Recipe(call.options, maml.net, *losses, wrt, state, maml.lr_of, maml.flat)
        loss = recipe.attach(loss, gradients, leaves, inputs, captured, params, rates, tensors)
    return loss, task_losses, output


def state_before(call: Call) -> RandomState | None:
    """The random state, where the call may draw from it: only a module that is run as it is does."""
    return RandomState.now(call.plan.shapes.device) if call.plan.program is None else None


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


def answer(call: Call, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, task_losses, output)."""
    task_losses, output = cast(Tensor, result.task_losses), cast(Tensor, result.output)
    return mean_loss(result, call.problem.task_weights), task_losses, output


def attached(
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    captured: Sequence[again.Read] = (),
) -> Tensor:
    """A loss as a function of parameters that its gradients are known for, those of the same names.

    Args:
        loss, gradients, params: as above; `gradients` may hold more.
        captured: what else it is a function of, and the gradients by that.

    Derivatives: once; differentiating again raises.
    """
    leaves = [*params.values()]
    known = [torch.cat([gradients[name].reshape(-1) for name in params])] + [read.gradient for read in captured]
    inputs = [*leaves, *[read.tensor for read in captured]]
    return cast(Tensor, _Attach.apply((loss, known, None, ()), len(leaves), *inputs))


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


@dataclass(slots=True)
class Recipe:
    """How a loss was computed, so that its gradients can be computed with a graph.

    It holds no tensors but the module's own: the others go through `save_for_backward`, which frees them in time and
    notices when one of them was modified.
    """

    options: Options
    net: nn.Module
    loss: Loss | None
    query_loss: Loss | None
    wrt: frozenset[str]
    state: RandomState | None  # before the call
    lr_of: Callable[[dict[str, Tensor]], Rates]  # from learned rates by their keys
    flat: FlatParameters | None = None
    # filled in by `attach`
    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()  # the inputs, those first that a gradient is wanted of
    parts: tuple[Tensor | None, ...] = ()  # what was captured, where it is a part of a flattened module

    def attach(
        self,
        loss: Tensor,
        gradients: list[Tensor],
        leaves: list[Tensor],
        inputs: list[str],
        captured: Sequence[again.Read],
        params: Mapping[str, Tensor],
        rates: Mapping[str, Tensor],
        tensors: Tensors,
    ) -> Tensor:
        """`loss` as a function of what its gradients are known for.

        Args:
            loss: ().
            gradients: of all leaves in one vector, where there are any, then of `inputs`.
            leaves: the parameters if "params" is in `wrt`, then the rates if "lr" is; or the vector of a flat module.
            inputs: fields of `tensors`.
            captured: what was read besides.
            params, rates, tensors: everything that the loss was computed from.
        """
        self.names, self.keys = tuple(params), tuple(rates)
        others = [f for f, x in zip(tensors._fields, tensors, strict=True) if x is not None and f not in inputs]
        self.fields = (*inputs, *others)
        given = leaves + [getattr(tensors, field) for field in inputs]
        rest = [getattr(tensors, field) for field in others]
        if not self._leads("params"):
            rest += params.values()
        if not self._leads("lr"):
            rest += rates.values()
        if captured:
            self.parts = tuple(read.part for read in captured)
            gradients = gradients + [read.gradient for read in captured]
            given = given + [read.tensor for read in captured]
        return cast(Tensor, _Attach.apply((loss, gradients, self, rest), len(leaves), *given))

    def gradients(
        self, given: Sequence[Tensor], rest: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
    ) -> list[Tensor | None]:
        """The gradients by what was given, times `grad`, with their graph: by one loop of autograd over everything.

        Args:
            given, rest: as `attach` saved them.
            needs: which gradients are wanted, all of those that were captured included.
            grad: ().
        """
        count = len(given) - len(self.parts)
        here = [again.local(tensor) for tensor in given[:count]]
        by: dict[str, dict[str, Tensor]] = {"params": {}, "lr": {}, "tensors": {}, "flat": {}}
        for (group, name), tensor in zip(self._slots(), [*here, *rest], strict=True):
            by[group][name] = tensor
        params, rates = by["params"], by["lr"]
        if self.flat is not None:
            pieces = iter(views(by["flat"][""], self.flat.parts(params, rates)))
            params.update({name: next(pieces) for name in self.flat.names})
            rates.update({key: next(pieces) for key in self.flat.keys})
        tensors, lr = Tensors(**by["tensors"]), self.lr_of(rates)
        captures = Captures(True, tuple(part for part in self.parts if part is not None))
        losses = self.loss, self.query_loss
        call = prepare(self.options, self.net, params, tensors, *losses, lr, self.wrt, captures=captures)
        captured = again.read_again(given[count:], self.parts)
        wanted = [tensor for tensor, need in zip(here, needs, strict=False) if need]
        found = iter(again.gradients(call, lr, wanted, captured, self.state, grad))
        return [next(found) if need else None for need in needs]

    def _leads(self, group: str) -> bool:
        """Whether parameters or rates are leaves themselves."""
        return self.flat is None and group in self.wrt

    def _slots(self) -> list[tuple[str, str]]:
        """What `attach` saved, in that order, but for what was captured."""
        params, rates = [("params", name) for name in self.names], [("lr", key) for key in self.keys]
        fields = [("tensors", field) for field in self.fields]
        slots = [("flat", "")] if self.flat is not None else []
        for group, members in (("params", params), ("lr", rates)):
            slots += members if self._leads(group) else []
        slots += fields
        for group, members in (("params", params), ("lr", rates)):
            slots += [] if self._leads(group) else members
        return slots


class _Attach(torch.autograd.Function):
    """Makes a loss a function of the tensors that its gradients are known for."""

    @staticmethod
    def forward(
        ctx: Any, known: tuple[Tensor, list[Tensor], Recipe | None, Sequence[Tensor]], leaves: int, *given: Tensor
    ) -> Tensor:
        loss, gradients, ctx.recipe, rest = known
        # not kept on ctx: saved tensors are freed by backward, and a second one gets PyTorch's own error
        ctx.save_for_backward(*gradients, *given, *rest)
        ctx.counts = len(gradients), len(given), leaves
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        known, given, leaves = ctx.counts
        if torch.is_grad_enabled() and ctx.recipe is not None:  # create_graph=True
            by, rest = saved[known : known + given], saved[known + given :]
            return (None, None, *ctx.recipe.gradients(by, rest, ctx.needs_input_grad[2:], grad))
        # fresh memory on every call: autograd may make these the .grad of the leaves, unlike what was saved
        with torch.no_grad():
            results = [gradient * grad for gradient in saved[:known]]
            if leaves:
                results[:1] = _unflatten_dense_tensors(results[0], saved[known : known + leaves])
        if torch.is_grad_enabled():
            results = refused(results, saved[known : known + given])
        return (None, None, *results)
