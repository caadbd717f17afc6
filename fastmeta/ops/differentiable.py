"""Autograd for `task_forward` and `inner_sgd`: the backward pass is one more problem, solved from
the inputs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastmeta.backends._autocast import autocast, autocast_dtype
from fastmeta.backends._random_state import RandomState
from fastmeta.backends.torch.replay import NotReplayedError, Replay, marks_of
from fastmeta.inputs import Form, Tree, flatten, leaves_of
from fastmeta.losses import Loss
from fastmeta.ops.again import Aliases, captures_of, gradients, local, matched, read_again, reads
from fastmeta.ops.checks import Tensors
from fastmeta.ops.options import Options
from fastmeta.ops.places import Places, placed
from fastmeta.ops.plan import NOTHING, Call, prepare
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import Hyper
from fastmeta.ordinary import savable
from fastmeta.problem import Captures, Result

_FIRST = 6  # arguments of `_Solve` before the tensors


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator that answers with `output` or with `adapted` parameters."""

    options: Options
    net: nn.Module
    params: Mapping[str, Tensor]
    tensors: Tensors
    lr: Rates = 0.0
    loss: Loss | None = None
    hyper: Hyper = field(default_factory=dict)
    aliases: Aliases | None = None

    def call(
        self,
        wrt: frozenset[str] = NOTHING,
        adapted_grad: dict[str, Tensor] | None = None,
        output_grad: Tree = None,
        captures: Captures | None = None,
    ) -> Call:
        """This operation, checked; with cotangents its derivative."""
        given = self.options, self.net, self.params, self.tensors, self.loss, None, self.lr, wrt
        return prepare(*given, adapted_grad, output_grad, captures=captures, hyper=self.hyper)

    def answer(self, call: Call) -> tuple[Tree, list[tuple[Tensor, Tensor]] | None]:
        """(the output, or else the adapted parameters in the order of `self.params`; what else was
        read)."""
        result = call.solve(adapted=self.tensors.query_x is None)
        return self.of(result), result.grads.captured

    def of(self, result: Result) -> Tree:
        """The answer out of a backend's."""
        if self.tensors.query_x is not None:
            return result.output
        adapted = cast("dict[str, Tensor]", result.adapted)
        return {name: adapted[name] for name in self.params}

    def leaves(self) -> tuple[_Slots, list[Tensor]]:
        """All tensors, and where they belong."""
        pairs = [(("params", name), value) for name, value in self.params.items()]
        if isinstance(self.lr, Mapping):
            pairs += [(("lr", name), rate) for name, rate in self.lr.items() if isinstance(rate, Tensor)]
        elif isinstance(self.lr, Tensor):
            pairs.append((("lr", ""), self.lr))
        pairs += [(("rule", name), value) for name, value in self.hyper.items()]
        given, places = placed(self.tensors)
        return _Slots([slot for slot, _ in pairs], places), [*[tensor for _, tensor in pairs], *given]

    def with_leaves(self, slots: _Slots, leaves: Sequence[Tensor]) -> Operation:
        """The same operation on other tensors."""
        fields: dict[str, dict[str, Tensor]] = {"params": {}, "lr": {}, "rule": {}}
        count = len(slots.own)
        for (group, name), leaf in zip(slots.own, leaves[:count], strict=True):
            fields[group][name] = leaf
        params, rates = fields["params"], fields["lr"]
        lr: Rates = {**self.lr, **rates} if isinstance(self.lr, Mapping) else rates.get("", self.lr)
        tensors = slots.places.tensors(leaves[count:])
        return replace(self, params=params, tensors=tensors, lr=lr, hyper=fields["rule"])


class _Slots(NamedTuple):
    """Where the tensors of an operation belong."""

    own: list[tuple[str, str]]  # ("params", "lr" or "rule", the name in it) of the first ones
    places: Places  # of the others

    @property
    def fields(self) -> list[str]:
        """What a gradient by each of them is asked for as."""
        return [*[field for field, _ in self.own], *self.places.fields]


def run(operation: Operation) -> Tree:
    """The answer, differentiable in every tensor that requires grad where gradients are on: the
    output, or name -> adapted parameter."""
    return run_and_read(operation)[0]


def run_and_read(operation: Operation) -> tuple[Tree, list[Tensor]]:
    """(the answer, the tensors among what it depends on that the network or the loss reads past its
    arguments)."""
    if not torch.is_grad_enabled():
        return operation.answer(operation.call())[0], []
    call = operation.call(captures=captures_of(False, operation.aliases))
    # only a module that is run as it is may draw random numbers; the backward pass has to draw the
    # same ones
    replay = Replay(RandomState.of(call.problem)) if call.plan.program is None else None
    answer, found = operation.answer(call)
    adapts = operation.tensors.query_x is None
    values, form = ([*answer.values()], None) if adapts else flatten(answer)
    if replay is not None:
        replay.keep(marks_of(values))
    captured = reads(found, operation.aliases)
    slots, leaves = operation.leaves()
    if not captured and not any(leaf.requires_grad for leaf in leaves):
        return answer, []
    # the tensors go through save_for_backward alone: it notices when one of them was modified
    bare = replace(operation, params={}, tensors=Tensors(), lr=_numbers(operation.lr), hyper={}, aliases=None)
    tensors, parts = [read.tensor for read in captured], [read.part for read in captured]
    values = _Solve.apply(values, form, bare, replay, slots, parts, *leaves, *tensors)
    return dict(zip(answer, values, strict=True)) if form is None else form.build(values), tensors


class _Solve(torch.autograd.Function):
    """Makes an answer a function of the tensors that it was computed from."""

    @staticmethod
    def forward(
        ctx: Any,
        answer: list[Tensor],
        form: Form | None,  # of the output; None: these are adapted parameters
        operation: Operation,
        replay: Replay | None,
        slots: _Slots,
        parts: list[Tensor | None],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*savable(tensors))
        ctx.set_materialize_grads(False)
        # backward passes run outside of the caller's autocast block
        ctx.frame = form, operation, replay, slots, parts, autocast_dtype(answer[0].device)
        return tuple(answer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[_FIRST:]
        if all(grad is None for grad in grads):
            return (None,) * (_FIRST + len(needs))
        form, operation, replay, slots, parts, dtype = ctx.frame
        fields = slots.fields
        again = torch.is_grad_enabled()  # create_graph=True
        saved, count = ctx.saved_tensors, len(fields)
        leaves, captured = saved[:count], read_again(saved[count:], parts)
        leaves = [local(leaf) if again else leaf for leaf in leaves]
        operation = operation.with_leaves(slots, leaves)
        wanted = needs[:count]
        wrt = frozenset(field for field, need in zip(fields, wanted, strict=True) if need)
        captures = Captures(True, lambda: [part for part in parts if part is not None], tuple(captured))
        call = operation.call(wrt, captures=captures, **_cotangents(operation, form, grads))
        if again:
            by = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
            found = iter(gradients(call, operation.lr, by, captured, replay, dtype))
            results = [next(found) if need else None for need in wanted]
            return (*[None] * _FIRST, *results, *found)
        with autocast(call.plan.shapes.device, dtype):
            grad = (call.solve() if replay is None else _solved_again(replay, operation, call)).grads
        rates = None if grad.lr is None else call.plan.rates.fold(grad.lr, operation.lr)
        own: dict[str, Any] = {"params": grad.params, "lr": rates, "rule": grad.rule}
        entries = [
            (own[field][name] if name else own[field]) if need else None
            for (field, name), need in zip(slots.own, wanted, strict=False)
        ]
        entries += slots.places.gradients(grad)
        entries = [entry if need else None for entry, need in zip(entries, wanted, strict=True)]
        return (*[None] * _FIRST, *entries, *matched(captured, grad.captured or ()))


def _solved_again(replay: Replay, operation: Operation, call: Call) -> Result:
    """The derivative of what the forward pass answered, and not of another draw.

    Raises:
        RuntimeError: the network or the loss cannot be run again with the same result.
    """
    with replay.again():
        result = call.solve(adapted=operation.tensors.query_x is None)
    try:
        replay.check(marks_of(leaves_of(operation.of(result))))
    except NotReplayedError as error:
        raise NotReplayedError(
            f"{operation.options.who}: {error}; `meta_gradient` runs every forward once"
        ) from None
    return result


def _numbers(lr: Rates) -> Rates:
    """`lr` without its tensors."""
    if isinstance(lr, Mapping):
        return {name: 0.0 if isinstance(rate, Tensor) else rate for name, rate in lr.items()}
    return 0.0 if isinstance(lr, Tensor) else lr


def _cotangents(operation: Operation, form: Form | None, grads: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """The cotangent of the output, or those of all adapted parameters, zeros where nothing came."""
    if form is not None:
        return {"output_grad": form.build(grads)}
    some = next(grad for grad in grads if grad is not None)
    own = dict(operation.net.named_parameters())
    found = {
        name: some.new_zeros(some.shape[0], *own[name].shape) if grad is None else grad
        for name, grad in zip(operation.params, grads, strict=True)
    }
    return {"adapted_grad": found}
