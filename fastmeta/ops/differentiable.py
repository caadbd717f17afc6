"""Autograd for `task_forward` and `inner_sgd`: the backward pass is one more problem, solved from the inputs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmeta.backends._autocast import autocast, autocast_dtype
from fastmeta.backends._random_state import RandomState
from fastmeta.backends.torch.replay import NotReplayedError, Replay, marks_of
from fastmeta.losses import Loss
from fastmeta.ops.checks import Tensors
from fastmeta.ops.once import once_differentiable
from fastmeta.ops.options import Options
from fastmeta.ops.plan import NOTHING, Call, prepare
from fastmeta.ops.rates import Rates
from fastmeta.problem import Result


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator that answers with `output` or with `adapted` parameters."""

    options: Options
    net: nn.Module
    params: Mapping[str, Tensor]
    tensors: Tensors
    lr: Rates = 0.0
    loss: Loss | None = None

    def call(
        self,
        wrt: frozenset[str] = NOTHING,
        adapted_grad: dict[str, Tensor] | None = None,
        output_grad: Tensor | None = None,
    ) -> Call:
        """This operation, checked; with cotangents its derivative."""
        return prepare(
            self.options, self.net, self.params, self.tensors, self.loss, None, self.lr, wrt, adapted_grad, output_grad
        )

    def answer(self, call: Call) -> tuple[Tensor, ...]:
        """The output, or else the adapted parameters in the order of `self.params`."""
        if self.tensors.query_x is not None:
            return (cast(Tensor, call.solve().output),)
        adapted = cast("dict[str, Tensor]", call.solve(adapted=True).adapted)
        return tuple(adapted[name] for name in self.params)

    def leaves(self) -> tuple[list[tuple[str, str]], list[Tensor]]:
        """All tensors, and beside each its field and its name within that."""
        pairs = [(("params", name), value) for name, value in self.params.items()]
        if isinstance(self.lr, Mapping):
            pairs += [(("lr", name), rate) for name, rate in self.lr.items() if isinstance(rate, Tensor)]
        elif isinstance(self.lr, Tensor):
            pairs.append((("lr", ""), self.lr))
        pairs += [((field, ""), x) for field, x in self.tensors._asdict().items() if x is not None]
        return [slot for slot, _ in pairs], [tensor for _, tensor in pairs]

    def with_leaves(self, slots: list[tuple[str, str]], leaves: tuple[Tensor, ...]) -> Operation:
        """The same operation on other tensors."""
        fields: dict[str, dict[str, Tensor]] = {}
        for (field, name), leaf in zip(slots, leaves, strict=True):
            fields.setdefault(field, {})[name] = leaf
        params, rates = fields.pop("params"), fields.pop("lr", {})
        lr: Rates = {**self.lr, **rates} if isinstance(self.lr, Mapping) else rates.get("", self.lr)
        tensors = Tensors(**{field: entry[""] for field, entry in fields.items()})
        return Operation(self.options, self.net, params, tensors, lr, self.loss)


def run(operation: Operation) -> tuple[Tensor, ...]:
    """The answer, differentiable in every tensor that requires grad where gradients are on."""
    if torch.is_grad_enabled() and isinstance(operation.params, Mapping):
        slots, leaves = operation.leaves()
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return cast("tuple[Tensor, ...]", _Solve.apply(operation, slots, *leaves))
    return operation.answer(operation.call())


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Operation, slots: list[tuple[str, str]], *leaves: Tensor) -> tuple[Tensor, ...]:
        call = operation.call()
        ctx.save_for_backward(*leaves)
        ctx.set_materialize_grads(False)
        ctx.slots = slots
        # the tensors go through save_for_backward alone: it notices when one of them was modified
        ctx.frame = (operation.options, operation.net, _numbers(operation.lr), operation.loss)
        # only a module that is run as it is may draw random numbers; the backward pass has to draw the same ones
        ctx.replay = Replay(RandomState.of(call.problem)) if call.plan.program is None else None
        ctx.autocast = autocast_dtype(call.plan.shapes.device)  # backward passes run outside of the caller's block
        answer = operation.answer(call)
        if ctx.replay is not None:
            ctx.replay.keep(marks_of(answer))
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slots, needs = ctx.slots, ctx.needs_input_grad[2:]
        nothing = (None,) * (2 + len(slots))
        if all(grad is None for grad in grads):
            return nothing
        options, net, lr, loss = ctx.frame
        operation = Operation(options, net, {}, Tensors(), lr, loss).with_leaves(slots, ctx.saved_tensors)
        wrt = frozenset(field for (field, _), need in zip(slots, needs, strict=True) if need)
        if operation.tensors.query_x is not None:
            call = operation.call(wrt, output_grad=grads[0])
        else:
            call = operation.call(wrt, adapted_grad=_cotangents(operation, grads))
        with autocast(call.plan.shapes.device, ctx.autocast):
            found = (call.solve() if ctx.replay is None else _solved_again(ctx.replay, operation, call)).grads
        rates = None if found.lr is None else call.plan.rates.fold(found.lr, operation.lr)
        result: list[Tensor | None] = []
        for (field, name), need in zip(slots, needs, strict=True):
            if not need:
                result.append(None)
                continue
            entry: Any = rates if field == "lr" else getattr(found, field)
            result.append(entry[name] if name else entry)
        return (None, None, *result)


def _solved_again(replay: Replay, operation: Operation, call: Call) -> Result:
    """The derivative of what the forward pass answered, and not of another draw.

    Raises:
        RuntimeError: the network or the loss cannot be run again with the same result.
    """
    adapts = operation.tensors.query_x is None
    with replay.again():
        result = call.solve(adapted=adapts)
    if adapts:
        answer = [cast("dict[str, Tensor]", result.adapted)[name] for name in operation.params]
    else:
        answer = [cast(Tensor, result.output)]
    try:
        replay.check(marks_of(answer))
    except NotReplayedError as error:
        raise NotReplayedError(f"{operation.options.who}: {error}; `meta_gradient` runs every forward once") from None
    return result


def _numbers(lr: Rates) -> Rates:
    """`lr` without its tensors."""
    if isinstance(lr, Mapping):
        return {name: 0.0 if isinstance(rate, Tensor) else rate for name, rate in lr.items()}
    return 0.0 if isinstance(lr, Tensor) else lr


def _cotangents(operation: Operation, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The cotangents of all adapted parameters, zeros where nothing came."""
    some = next(grad for grad in grads if grad is not None)
    own = dict(operation.net.named_parameters())
    return {
        name: some.new_zeros(some.shape[0], *own[name].shape) if grad is None else grad
        for name, grad in zip(operation.params, grads, strict=True)
    }
