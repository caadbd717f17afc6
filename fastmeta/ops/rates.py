"""Inner learning rates: from what the user writes to one tensor a parameter, and the gradients
back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from fastmeta.backends._rates import RateForm, form_of
from fastmeta.models.check import is_finite
from fastmeta.ops.options import argument
from fastmeta.ops.patterns import keys_by_name
from fastmeta.ordinary import check_ordinary

Rate = float | Tensor
Rates = Rate | Mapping[str, Rate]

_ONE = RateForm(element=False, per_task=False, per_step=False)


def rates_key(lr: Rates) -> object:
    """All of `lr` that a plan depends on: the value of a number, but only the kind of a tensor."""
    if isinstance(lr, Tensor):
        return lr.shape, lr.dtype, lr.device, lr.layout
    if isinstance(lr, Mapping):
        return tuple((name, rates_key(rate)) for name, rate in lr.items())
    return lr, lr.__class__


@dataclass(frozen=True, slots=True)
class RatePlan:
    """How the learning rates of one call are laid out.

    Args:
        shapes: adapted parameter -> the shape of its rate in a `Problem`: [K or 1, T or 1, *S], or
            *1s in place of *S.
        constants: the rates given as numbers; they cost nothing per call.
        keys: adapted parameter -> the key of its rate, where the rates are a dict; those of
            parameters that would be adapted if they required grad are there too.
        device, dtype: of the parameters.
    """

    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, Tensor]
    keys: dict[str, str]
    device: torch.device
    dtype: torch.dtype

    def spread(self, lr: Rates, graph: bool = False) -> dict[str, Tensor]:
        """`lr` as a `Problem` holds it: one tensor for each adapted parameter; numbers and views,
        no copies.

        What is given for the rows of a parameter, or for its columns, becomes a view with a number
        for each element.

        Args:
            lr: as given.
            graph: whether they keep the graph of `lr`.
        """
        if len(self.constants) == len(self.shapes):
            return self.constants
        if isinstance(lr, Mapping):
            return {
                name: self.constants[name]
                if name in self.constants
                else _laid_out(_value(lr[self.keys[name]], graph), shape)
                for name, shape in self.shapes.items()
            }
        rate = _value(lr, graph)
        if rate.numel() == 0:  # no steps, and one rate for each of them
            rate = rate.new_zeros(1)
        views = {shape: rate.reshape(shape) for shape in set(self.shapes.values())}
        return {name: views[shape] for name, shape in self.shapes.items()}

    def fold(self, grads: dict[str, Tensor], lr: Rates) -> Tensor | dict[str, Tensor]:
        """The gradient in the structure of `lr`: a number gets a tensor of shape (), an unused rate
        zeros."""
        if isinstance(lr, Mapping):
            totals: dict[str, Tensor] = {}
            for name, grad in grads.items():
                key = self.keys[name]
                grad = _summed(grad, _shape(lr[key]))
                totals[key] = totals[key] + grad if key in totals else grad
            return {
                key: totals[key] if key in totals else self._zeros(_shape(rate)) for key, rate in lr.items()
            }
        steps = lr.numel() if isinstance(lr, Tensor) and lr.dim() else 1
        if steps == 0:
            return self._zeros((0,))
        total = torch.stack([grad.reshape(steps, -1).sum(1) for grad in grads.values()]).sum(0)  # [K]
        return total.reshape(_shape(lr))

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def plan_rates(
    who: str,
    lr: Rates,
    *,
    names: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
    steps: int,
    tasks: int,
    device: torch.device,
    dtype: torch.dtype,
    unused: tuple[str, ...] = (),
) -> RatePlan:
    """Check the learning rates and lay them out.

    Args:
        who: the operator, for messages.
        lr: a finite number, a tensor () or [K], or a dict by parameter name or glob pattern of
            numbers, tensors () and tensors [K or 1, T or 1, ...] that end in any shape that
            broadcasts to S. Values of tensors are not read.
        names: the adapted parameters.
        shapes: name -> S, the shape of one task's parameter.
        steps, tasks: K and T.
        device, dtype: of the parameters.
        unused: parameters that a dict may have rates for, and that are not adapted.

    Raises:
        TypeError, ValueError: names the rate, what was expected and what came.
    """
    what = argument(who, "lr")
    layout: dict[str, tuple[int, ...]] = {}
    constants: dict[str, Tensor] = {}
    if isinstance(lr, Mapping):
        keys = keys_by_name(what, lr, names, unused)
        for name in names:
            rate, label = lr[keys[name]], f"{what}[{keys[name]!r}]"
            layout[name] = _form_of_entry(label, rate, shapes[name], steps, tasks).shape(
                steps, tasks, shapes[name]
            )
            if isinstance(rate, Tensor):
                _check_sort(label, rate, device, dtype)
            else:
                constants[name] = torch.full(
                    layout[name], _number(label, rate, dtype), dtype=dtype, device=device
                )
        return RatePlan(layout, constants, keys, device, dtype)
    if isinstance(lr, Tensor):
        _check_sort(what, lr, device, dtype)
        if lr.shape not in ((), (steps,)) and not (steps == 0 and lr.shape == (1,)):
            raise ValueError(f"{what} must be a number, () or [K] = ({steps},), got {tuple(lr.shape)}")
        form = RateForm(element=False, per_task=False, per_step=lr.numel() > 1)
        layout = {name: form.shape(steps, tasks, shapes[name]) for name in names}
        return RatePlan(layout, {}, {}, device, dtype)
    value = torch.full((), _number(what, lr, dtype), dtype=dtype, device=device)
    layout = {name: _ONE.shape(steps, tasks, shapes[name]) for name in names}
    return RatePlan(layout, {name: value.view(shape) for name, shape in layout.items()}, {}, device, dtype)


def repeated(lr: Rates, steps: int) -> Rates:
    """Rates for `steps` inner steps out of rates for K: beyond K the last step's repeat.

    Derivatives: those of indexing.
    """
    if isinstance(lr, Mapping):
        return {
            name: _rows(rate, steps) if isinstance(rate, Tensor) and rate.dim() > 1 else rate
            for name, rate in lr.items()
        }
    return _rows(lr, steps) if isinstance(lr, Tensor) and lr.dim() == 1 else lr


def at_step(lr: Rates, k: int) -> Rates:
    """The rates of inner step k alone: beyond the last one its rates repeat.

    Derivatives: those of indexing.
    """
    if isinstance(lr, Mapping):
        return {
            name: _row(rate, k).unsqueeze(0) if isinstance(rate, Tensor) and rate.dim() > 1 else rate
            for name, rate in lr.items()
        }
    return _row(lr, k) if isinstance(lr, Tensor) and lr.dim() == 1 else lr


def of_tasks(lr: Rates, tasks: Tensor) -> Rates:
    """The rates of the tasks numbered `tasks`.

    Derivatives: those of indexing.
    """
    if not isinstance(lr, Mapping):
        return lr
    own = {
        name for name, rate in lr.items() if isinstance(rate, Tensor) and rate.dim() > 1 and rate.shape[1] > 1
    }
    return {
        name: cast(Tensor, rate).index_select(1, tasks) if name in own else rate for name, rate in lr.items()
    }


def check_ordinary_rates(who: str, lr: Rates) -> None:
    """Check that rates that are tensors have memory.

    Raises:
        TypeError, ValueError: names the rate.
    """
    for label, rate in _tensors(who, lr):
        check_ordinary(label, rate)


def check_finite(who: str, lr: Rates) -> None:
    """Check the values of tensors; `plan_rates` has checked those of numbers.

    Raises:
        ValueError: names the rate.
    """
    for label, rate in _tensors(who, lr):
        if not rate.isfinite().all():
            raise ValueError(f"{label} must hold finite numbers, got {rate[~rate.isfinite()][0].item()}")


def _tensors(who: str, lr: Rates) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `lr`, as messages name them."""
    what = argument(who, "lr")
    named = {f"{what}[{key!r}]": rate for key, rate in lr.items()} if isinstance(lr, Mapping) else {what: lr}
    for label, rate in named.items():
        if isinstance(rate, Tensor):
            yield label, rate


def _form_of_entry(label: str, rate: Rate, shape: tuple[int, ...], steps: int, tasks: int) -> RateForm:
    """The form of an entry of a dict, which may broadcast to the parameter in any way: rates for
    rows or columns become rates for elements."""
    if not isinstance(rate, Tensor) or rate.dim() == 0:
        return _ONE
    full = (steps, tasks, *shape)
    if rate.dim() != len(full) or any(
        have not in (1, want) for have, want in zip(rate.shape, full, strict=True)
    ):
        raise ValueError(
            f"{label} must be a number, () or [K or 1, T or 1, *(S or 1s)] with K, T, *S = {full}, "
            f"got {tuple(rate.shape)}"
        )
    return form_of(tuple(rate.shape))


def _laid_out(rate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An entry of a dict in the shape of its form."""
    if rate.dim() == 0:
        return rate.reshape(shape)
    if rate.shape[0] == 0:  # no steps, and one rate for each of them
        return rate.new_zeros(shape)
    return rate.expand(shape)


def _summed(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of what `_laid_out` was given."""
    if shape and shape[0] == 0:
        return grad.new_zeros(shape)
    return grad.sum_to_size(shape)


def _check_sort(label: str, rate: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    check_ordinary(label, rate)
    if rate.dtype != dtype:
        raise TypeError(f"{label} must be {dtype}, as the parameters, got {rate.dtype}")
    if rate.device != device:
        raise ValueError(f"{label} must be on {device}, as the parameters, got {rate.device}")


def _number(label: str, rate: Rate, dtype: torch.dtype) -> float:
    if not isinstance(rate, Real) or isinstance(rate, bool):
        raise TypeError(f"{label} must be a number or a tensor, got {type(rate).__name__}")
    if not is_finite(rate):
        raise ValueError(f"{label} must be finite, got {rate}")
    if abs(rate) > torch.finfo(dtype).max:
        raise ValueError(f"{label} must be finite in {dtype}, as the parameters, got {rate}")
    return float(rate)


def _value(rate: Rate | Rates, graph: bool) -> Tensor:
    return cast(Tensor, rate) if graph else cast(Tensor, rate).detach()


def _shape(lr: object) -> tuple[int, ...]:
    return tuple(lr.shape) if isinstance(lr, Tensor) else ()


def _row(rate: Tensor, k: int) -> Tensor:
    return _not_empty(rate)[min(k, rate.shape[0] - 1)]


def _rows(rate: Tensor, steps: int) -> Tensor:
    """`steps` rows of [K, ...]; of one full-rank row there is no need for more."""
    have = rate.shape[0]
    if have == steps or (have == 1 and rate.dim() > 1):
        return rate
    return _not_empty(rate)[torch.arange(max(steps, 1), device=rate.device).clamp_max(have - 1)]


def _not_empty(rate: Tensor) -> Tensor:
    if rate.shape[0] == 0:
        raise ValueError(
            f"`inner_lr` has a rate for each of 0 inner steps, got {tuple(rate.shape)}: none to repeat"
        )
    return rate
