"""The inner learning rates of an algorithm: where they are kept, learned or not, and how learned
ones start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from fastmeta.ops.options import argument, check_flag
from fastmeta.ops.rates import Rates, plan_rates

_SORTS = ("scalar", "tensor", "element")


class InnerRates(nn.ParameterDict):
    """Learning rates as a module: learned ones are parameters, given tensors buffers that no
    checkpoint holds.

    Args:
        who: the algorithm, for messages.
        lr: the rates, or the start of learned ones, in any form that an operator takes.
        learn_lr: None; "scalar": one rate for everything, under the key "all", () or [K]; "tensor":
            one for each parameter, "element": one for each scalar weight, both [K or 1, 1, *(S or
            1s)] under the parameter's name with `.` replaced by `__` (`nn.ParameterDict` refuses
            dots).
        per_step: each inner step has learned rates of its own.
        steps: K.
        names: the adapted parameters, as they are now: those unfrozen later have no learned rate.
        params: all parameters.
        frozen: parameters that would be adapted if they required grad: a dict may have rates for
            them.

    Raises:
        TypeError, ValueError: an unknown `learn_lr`, rates that do not fit it, or two names that
            become one.
    """

    def __init__(
        self,
        who: str,
        lr: Rates,
        *,
        learn_lr: str | None = None,
        per_step: bool = False,
        steps: int,
        names: tuple[str, ...],
        params: Mapping[str, Tensor],
        frozen: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        check_flag(who, "lr_per_step", per_step)
        if learn_lr is not None and (not isinstance(learn_lr, str) or learn_lr not in _SORTS):
            raise ValueError(
                f"{who}: `learn_lr` must be None, {', '.join(map(repr, _SORTS))}, got {learn_lr!r}"
            )
        if learn_lr is None and per_step:
            raise ValueError(f"{who}: `lr_per_step` is for learned rates, but `learn_lr` is None")
        self.learned = learn_lr
        shapes = {name: tuple(params[name].shape) for name in names}
        first = params[names[0]]
        tasks = 1 if learn_lr else _tasks(lr)
        plan = plan_rates(
            who,
            lr,
            names=names,
            shapes=shapes,
            steps=steps,
            tasks=tasks,
            device=first.device,
            dtype=first.dtype,
            unused=frozen,
        )
        start, kept = plan.spread(lr), names
        if isinstance(lr, Mapping):
            if learn_lr is None:  # also those of parameters that are frozen now
                kept = tuple(name for name in params if name in plan.keys)
            lr = {name: lr[plan.keys[name]] for name in kept}
        #: the rate, where it is one number for everything
        self.number = float(lr) if learn_lr is None and not isinstance(lr, (Tensor, Mapping)) else None
        self._numbers: dict[str, float] | None = None  # those in a dict
        self._keys_of = {name: name.replace(".", "__") for name in kept}
        if len(set(self._keys_of.values())) != len(kept):
            raise ValueError(f"{who}: two parameters have the same name once `.` is `__`: {', '.join(kept)}")
        if learn_lr is None:
            self._keep(argument(who, "lr"), lr)
        elif learn_lr == "scalar":
            self._learn_one(argument(who, "lr"), lr, start, max(steps, 1), per_step)
        else:
            rows = max(steps, 1) if per_step else 1
            for name, shape in shapes.items():
                wanted = (rows, 1, *(shape if learn_lr == "element" else (1,) * len(shape)))
                label, rate = f"{argument(who, 'lr')}[{name!r}]", lr[name] if isinstance(lr, Mapping) else lr
                self[self._keys_of[name]] = _expanded(label, start[name], wanted, rate)

    def as_given(self, learned: Mapping[str, Tensor]) -> Rates:
        """The rates as an operator takes them.

        Args:
            learned: key -> learned rate: the parameters of this module, or something in their
                place.
        """
        if self.learned is not None:
            if self.learned == "scalar":
                return learned["all"]
            return {name: learned[key] for name, key in self._keys_of.items()}
        if self.number is not None:
            return self.number
        if self._numbers is None:
            return cast(Tensor, self._buffers["all"])
        given = {name: self._buffers.get(key) for name, key in self._keys_of.items()}
        return {name: self._numbers[name] if rate is None else rate for name, rate in given.items()}

    def by_key(self, grads: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the rates, in the structure that `as_given` returns, by the keys of this
        module."""
        if isinstance(grads, Tensor):
            return {"all": grads}
        return {key: grads[name] for name, key in self._keys_of.items()}

    def _keep(self, what: str, lr: Rates) -> None:
        entries = dict(lr) if isinstance(lr, Mapping) else {"all": lr}
        for name, rate in entries.items():
            if not isinstance(rate, Tensor):
                continue
            if rate.requires_grad:
                raise ValueError(
                    f"{what} requires grad, but MAML learns rates of its own only: use `learn_lr`"
                )
            self.register_buffer(self._keys_of.get(name, name), rate.detach().clone(), persistent=False)
        if isinstance(lr, Mapping):
            self._numbers = {name: float(rate) for name, rate in lr.items() if not isinstance(rate, Tensor)}

    def _learn_one(self, what: str, lr: Rates, start: dict[str, Tensor], steps: int, per_step: bool) -> None:
        if isinstance(lr, Mapping):
            raise ValueError(f"{what} must be one number or tensor for learn_lr='scalar', got a dict")
        rate = next(iter(start.values())).reshape(-1)  # [1] or [K]
        rate = _expanded(what, rate, (steps if per_step else 1,), lr)
        self["all"] = rate if per_step else rate.reshape(())


def _tasks(lr: Rates) -> int:
    """T, as far as rates of their own for every task tell it."""
    if not isinstance(lr, Mapping):
        return 1
    return max(
        (rate.shape[1] for rate in lr.values() if isinstance(rate, Tensor) and rate.dim() > 1), default=1
    )


def _expanded(what: str, start: Tensor, shape: tuple[int, ...], given: object) -> Tensor:
    try:
        return start.detach().expand(shape).clone()
    except RuntimeError:
        raise ValueError(
            f"{what} must broadcast to {shape}, the shape of the learned rate, "
            f"got {tuple(given.shape if isinstance(given, Tensor) else start.shape)}"
        ) from None
