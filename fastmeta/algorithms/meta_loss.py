"""The autograd of an algorithm: gradients are computed together with the loss, and backward only
scales them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from fastmeta.algorithms.flat_parameters import FlatParameters, views
from fastmeta.algorithms.learner import Learner
from fastmeta.algorithms.rule_tensors import PREFIX, with_prefix
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._random_state import RandomState
from fastmeta.backends.torch.replay import Replay
from fastmeta.inputs import NotATreeError, Tree
from fastmeta.losses import Loss
from fastmeta.ops import again
from fastmeta.ops.checks import Tensors
from fastmeta.ops.divergence import Settled, settled
from fastmeta.ops.once import refused
from fastmeta.ops.options import Options
from fastmeta.ops.places import Places, placed
from fastmeta.ops.plan import Call, mean_loss, prepare
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import Hyper
from fastmeta.ordinary import savable
from fastmeta.problem import Captures, Result

_WRT = {
    (params, rates): frozenset(["params"] * params + ["lr"] * rates)
    for params in (False, True)
    for rates in (False, True)
}
_BY_KEY = frozenset({"lr", "rule"})


class Leaves(NamedTuple):
    """The meta-parameters that a loss is differentiated by."""

    # parameters, then learned rates and tensors of the rule; or the vector of a flattened module
    tensors: list[Tensor]
    wrt: frozenset[str]  # "params", "lr", "rule"


def meta_loss(learner: Learner, tensors: Tensors, support_per_step: bool) -> tuple[Tensor, Tensor, Tree]:
    """(loss (), task_losses [T], output [T, M, *out]); loss has a graph where gradients are on and
    wanted."""
    params, rates = learner.meta_parameters()
    module = learner.module
    if not torch.is_grad_enabled():
        call = learner.prepare(params, rates, tensors, support_per_step)
        return found_in(settled(learner.who, module.on_divergence, call, call.solve()))
    leaves, wrt = leaves_of(learner, params, rates)
    inputs = inputs_of(tensors)
    if inputs:
        wrt = wrt.union(inputs) - {"task_weights"}
    flat = learner.flat
    aliases = None if flat is None else learner.aliases()
    call = learner.prepare(params, rates, tensors, support_per_step, wrt, again.captures_of(True, aliases))
    run = None if call.plan.program is not None else again_of(call)
    found = settled(learner.who, module.on_divergence, call, call.solve())
    loss, task_losses, output = found_in(found)
    result = found.result
    captured = again.reads(result.grads.captured, aliases) if result.grads.captured else []
    if leaves or inputs or captured:
        gradients = [flat_gradient(learner, call, result)] if leaves else []
        given, places = placed(tensors)
        at = tuple([i for i, x in enumerate(given) if x.requires_grad]) if inputs else ()
        if at:
            by = places.gradients(result.grads, found.by_task_weights() if "task_weights" in inputs else None)
            gradients += [by[i] for i in at]
        recipe = Recipe(
            options=call.options,
            net=learner.net,
            loss=module.loss,
            query_loss=module.query_loss,
            lr_of=learner.lr_of,
            hyper_of=learner.hyper_of,
            wrt=wrt,
            rerun=run,
            flat=flat,
            names=tuple(params),
            keys=tuple(rates),
            places=places,
            inputs=at,
            parts=tuple([read.part for read in captured]) if captured else (),
            own=None if flat is None else (params, rates),
            whole=found.rest is None,
        )
        loss = recipe.attach(loss, gradients, leaves, params, rates, given, captured)
    return loss, task_losses, output


def again_of(call: Call) -> tuple[Replay, torch.dtype | None] | None:
    """The random state and autocast, where the call may depend on them: only a module that is run
    as it is does."""
    if call.plan.program is not None:
        return None
    return Replay(RandomState.of(call.problem)), autocast_dtype(call.plan.shapes.device)


def leaves_of(learner: Learner, params: dict[str, Tensor], rates: dict[str, Tensor]) -> Leaves:
    """What a backward pass fills the gradients of.

    Args:
        learner: the algorithm.
        params, rates: its `meta_parameters`.
    """
    flat = learner.flat
    if flat is not None:
        return Leaves([flat.vector], _wrt(bool(flat.names), flat.keys))
    leaves = [*params.values()]
    has_params = True in [value.requires_grad for value in leaves]
    if not rates:
        return Leaves(leaves if has_params else [], _WRT[has_params, False])
    has_rates = True in [value.requires_grad for value in rates.values()]
    wrt = _wrt(has_params, rates if has_rates else ())
    return Leaves((leaves if has_params else []) + [*rates.values()] * has_rates, wrt)


def _wrt(params: bool, keys: Iterable[str]) -> frozenset[str]:
    """What gradients are asked for: by the parameters, and by learned rates and the tensors of the
    rule with these keys."""
    of_rule = [key.startswith(PREFIX) for key in keys]
    found = _WRT[params, False in of_rule]
    return found | {"rule"} if True in of_rule else found


def flat_gradient(learner: Learner, call: Call, result: Result) -> Tensor:
    """The gradients of all leaves in one vector, in their order."""
    grads, flat = result.grads, learner.flat
    whole = grads.flat_params if call.problem.prefer_flat else None
    if grads.lr is None and grads.rule is None and whole is not None:
        return whole
    params = grads.params or {}
    rates = {} if grads.lr is None else learner.inner_lrs.by_key(call.plan.rates.fold(grads.lr, call.lr))
    if grads.rule is not None:
        rates |= with_prefix(grads.rule)
    parts = [params[name] for name in (params if flat is None else flat.names)] if whole is None else [whole]
    parts += [rates[key] for key in (rates if flat is None else flat.keys)]
    return torch.cat([part.reshape(-1) for part in parts])


def found_in(found: Settled) -> tuple[Tensor, Tensor, Tree]:
    """(loss, task_losses, output)."""
    result = found.result
    return found.loss, cast(Tensor, result.task_losses), result.output


def answer(call: Call, result: Result) -> tuple[Tensor, Tensor, Tree]:
    """(loss, task_losses, output)."""
    return mean_loss(result, call.problem.task_weights), cast(Tensor, result.task_losses), result.output


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
    known = [torch.cat([gradients[name].reshape(-1) for name in params])] + [
        read.gradient for read in captured
    ]
    inputs = [*leaves, *[read.tensor for read in captured]]
    return cast(Tensor, _Attach.apply((loss, known, None, ()), len(leaves), *inputs))


def attached_to(loss: Tensor, gradients: list[Tensor], leaves: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """A loss as a function of leaves and inputs that its gradients are known for, in their
    order."""
    if not gradients:
        return loss
    at = len(leaves)
    flat = [torch.cat([gradient.reshape(-1) for gradient in gradients[:at]])] if leaves else []
    return cast(Tensor, _Attach.apply((loss, flat + gradients[at:], None, ()), at, *leaves, *inputs))


def inputs_of(tensors: Tensors) -> list[str]:
    """The inputs that require grad, or hold a tensor that does."""
    try:
        if True not in [x is not None and x.requires_grad for x in tensors]:
            return []
    except AttributeError:  # not all of them are single tensors
        pass
    try:
        given, places = placed(tensors)
        fields = [field for field, x in zip(places.fields, given, strict=True) if x.requires_grad]
    except (NotATreeError, AttributeError):  # the checks will name it
        return []
    return list(dict.fromkeys(fields))


class Recipe(NamedTuple):
    """How a loss was computed, so that its gradients can be computed with a graph.

    It holds no tensors but the module's own: the others go through `save_for_backward`, which frees
    them in time and notices when one of them was modified.
    """

    options: Options
    net: nn.Module
    loss: Loss | None
    query_loss: Loss | None
    # from learned rates, and tensors of the rule, by their keys
    lr_of: Callable[[dict[str, Tensor]], Rates]
    hyper_of: Callable[[dict[str, Tensor]], Hyper]
    wrt: frozenset[str]
    rerun: (
        tuple[Replay, torch.dtype | None] | None
    )  # of the random state before the call; the dtype of autocast
    flat: FlatParameters | None
    names: tuple[str, ...]  # of the parameters
    keys: tuple[str, ...]  # of the learned rates and the tensors of the rule
    places: Places  # of the inputs
    inputs: tuple[int, ...]  # the numbers of those that a gradient is wanted of
    parts: tuple[Tensor | None, ...]  # of what was captured, see `again.Read`
    own: (
        tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None
    )  # parameters and rates of a flattened module
    whole: bool = (
        True  # no task was left out: else the gradients are those of others, and refuse to be differentiated
    )

    def attach(
        self,
        loss: Tensor,
        gradients: list[Tensor],
        leaves: list[Tensor],
        params: Mapping[str, Tensor],
        rates: Mapping[str, Tensor],
        tensors: Sequence[Tensor],
        captured: Sequence[again.Read],
    ) -> Tensor:
        """`loss` as a function of what its gradients are known for.

        Args:
            loss: ().
            gradients: of all leaves in one vector, where there are any, then of `inputs`.
            leaves: the parameters if "params" is in `wrt`, then the rates and what else has keys if
                "lr" or "rule" is; or the vector of a flat module.
            params, rates, tensors: everything that the loss was computed from, inputs in the order
                of `places`.
            captured: what was read besides.
        """
        given, rest = leaves, [*tensors]
        if self.inputs:
            given = given + [tensors[at] for at in self.inputs]
        if captured:
            gradients = gradients + [read.gradient for read in captured]
            given = given + [read.tensor for read in captured]
        if self.flat is None:
            if "params" not in self.wrt:
                rest += params.values()
            if self.wrt.isdisjoint(_BY_KEY):
                rest += rates.values()
        return cast(Tensor, _Attach.apply((loss, gradients, self, rest), len(leaves), *given))

    def gradients(
        self, given: Sequence[Tensor], rest: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
    ) -> list[Tensor | None]:
        """The gradients by what was given, times `grad`, with their graph: by one loop of autograd
        over everything.

        Args:
            given, rest: as `attach` saved them.
            needs: which gradients are wanted, all of those that were captured included.
            grad: ().
        """
        count = len(given) - len(self.parts)
        here = [again.local(tensor) for tensor in given[:count]]
        by: dict[str, dict[Any, Tensor]] = {"tensors": {}, "params": {}, "lr": {}, "flat": {}}
        first, then = self._slots()
        for (group, name), tensor in [*zip(then, rest, strict=True), *zip(first, here, strict=True)]:
            by[group][name] = tensor
        params, rates = by["params"], by["lr"]
        if self.flat is not None and self.own is not None:
            params, rates = {**self.own[0]}, {**self.own[1]}
            pieces = iter(views(by["flat"][""], self.flat.parts(params, rates)))
            params.update({name: next(pieces) for name in self.flat.names})
            rates.update({key: next(pieces) for key in self.flat.keys})
        inputs = by["tensors"]
        tensors, lr = self.places.tensors([inputs[at] for at in range(len(inputs))]), self.lr_of(rates)
        parts = tuple(part for part in self.parts if part is not None)
        losses = self.loss, self.query_loss
        captured = again.read_again(given[count:], self.parts)
        captures = Captures(True, lambda: parts, tuple(captured))
        how = self.options, self.net, params, tensors, *losses, lr, self.wrt
        call = prepare(*how, captures=captures, hyper=self.hyper_of(rates))
        wanted = [tensor for tensor, need in zip(here, needs, strict=False) if need]
        replay, dtype = self.rerun or (None, None)
        found = iter(again.gradients(call, lr, wanted, captured, replay, dtype, grad))
        return [next(found) if need else None for need in needs]

    def _slots(self) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """(group, name) of what `attach` was given, but for what was captured, and of the rest."""
        first: list[tuple[str, Any]] = [] if self.flat is None else [("flat", "")]
        then: list[tuple[str, Any]] = [("tensors", at) for at in range(len(self.places.fields))]
        for group, names in (("params", self.names), ("lr", self.keys)):
            if self.flat is None:
                wanted = group in self.wrt or (group == "lr" and "rule" in self.wrt)
                (first if wanted else then).extend([(group, name) for name in names])
        return first + [("tensors", at) for at in self.inputs], then


class _Attach(torch.autograd.Function):
    """Makes a loss a function of the tensors that its gradients are known for."""

    @staticmethod
    def forward(
        ctx: Any,
        known: tuple[Tensor, list[Tensor], Recipe | None, Sequence[Tensor | None]],
        leaves: int,
        *given: Tensor,
    ) -> Tensor:
        loss, gradients, ctx.recipe, rest = known
        # not kept on ctx: saved tensors are freed by backward, and a second one gets PyTorch's own
        # error; it also notices when what the loss was computed from was modified
        ctx.save_for_backward(*gradients, *savable(given), *savable(rest))
        ctx.counts = len(gradients), len(given), leaves
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        known, given, leaves = ctx.counts
        if torch.is_grad_enabled():  # create_graph=True
            by, rest = saved[known : known + given], saved[known + given :]
            if ctx.recipe is not None and ctx.recipe.whole:
                return (None, None, *ctx.recipe.gradients(by, rest, ctx.needs_input_grad[2:], grad))
            return (None, None, *refused(_scaled(saved[:known], grad.detach(), by[:leaves]), by))
        return (None, None, *_scaled(saved[:known], grad, saved[known : known + leaves]))


def _scaled(gradients: Sequence[Tensor], grad: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`gradients` times `grad`, the first of them in the shapes of `leaves`."""
    # fresh memory on every call: autograd may make these the .grad of the leaves, unlike what was
    # saved
    scaled = [gradient * grad for gradient in gradients]
    return [*_unflatten_dense_tensors(scaled[0], leaves), *scaled[1:]] if leaves else scaled
