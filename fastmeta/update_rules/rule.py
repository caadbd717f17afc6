"""What an update rule is: how one inner step of one task makes theta' of theta and its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastmeta.models.check import is_finite
from fastmeta.ordinary import check_ordinary

#: A number of a rule: plain, or learned: a tensor () or [K], one for each inner step.
Number = float | Tensor
#: Tensors by the names of parameters.
Named = dict[str, Tensor]
#: What a rule keeps from step to step; of a rule with a name: state name -> parameter -> tensor.
State = Any


class Range(NamedTuple):
    """What a number may be: `least` to `below`, without that."""

    least: float = 0.0
    below: float = inf

    def __str__(self) -> str:
        parts = ["finite"]
        parts += [f"at least {self.least:g}"] if self.least > -inf else []
        parts += [f"less than {self.below:g}"] if self.below < inf else []
        return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


#: Numbers in [0, 1), such as the decay of a running mean.
SHARE = Range(0.0, 1.0)
#: Any finite number.
ANY = Range(-inf, inf)


class UpdateRule(ABC):
    """One inner step, and what it carries to the next; immutable.

    A rule with a name says what it does to one parameter (`move`); this class takes care of all of
    them, and of clipping, which comes first. Numbers are plain ones or tensors, () or [K], one for
    each inner step; those given as tensors are *learned*: they get gradients.

    Two rules are equal if they are of one class with the same numbers, and the same tensors where
    they have learned ones.

    Attributes:
        kind: the name that engines know the rule by: "sgd", "adam", ...; "custom".
        numbers: its plain numbers by name.
        learned: the names of its learned ones.
        learns: whether there are any, or a module with parameters.
        tensors: the learned ones by name; {} in a `form`.
        options: what else tells two rules of one class apart, by name.
        form: the same rule without its tensors: what plans are found by. In a `Problem` the rule is
            such a form, and `Problem.hyper` has the tensors.
    """

    kind: ClassVar[str] = ""
    #: Names of numbers that are part of an argument -> how messages name them.
    labels: ClassVar[dict[str, str]] = {"beta1": "betas[0]", "beta2": "betas[1]"}
    #: Names of numbers -> what they may be; others are at least 0.
    ranges: ClassVar[dict[str, Range]] = {"beta1": SHARE, "beta2": SHARE}

    __slots__ = ("_given", "_hash", "_key", "form", "learned", "learns", "numbers", "options", "tensors")

    _given: dict[str, Any]
    _hash: int
    _key: tuple[Any, ...]
    numbers: dict[str, float]
    learned: tuple[str, ...]
    learns: bool
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    form: UpdateRule

    def _set(self, given: dict[str, Any], numbers: Mapping[str, object], **options: Any) -> None:
        """Check the numbers and become a rule of them; for `__init__`.

        Args:
            given: the arguments, as `repr` shows them and a copy is made of.
            numbers: by name; one that is None is not there.
            options: everything else.
        """
        plain: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in numbers.items():
            label = f"{self.name}: `{self.labels.get(name, name)}`"
            if isinstance(value, Tensor):
                tensors[name] = _learned(label, value)
            elif value is not None:
                plain[name] = _plain(label, value, self.ranges.get(name, Range()))
        self._fill(given, plain, tuple(tensors), tensors, options)

    def _fill(
        self,
        given: dict[str, Any],
        numbers: dict[str, float],
        learned: tuple[str, ...],
        tensors: dict[str, Tensor],
        options: dict[str, Any],
    ) -> None:
        key = (type(self), *numbers.items(), learned, *options.items())
        values = {
            "_given": given,
            "_key": key,
            "_hash": hash(key),
            "numbers": numbers,
            "learned": learned,
            "learns": bool(learned),
            "tensors": tensors,
            "options": options,
            "form": self,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if tensors:
            form = object.__new__(type(self))
            form._fill(given, numbers, learned, {}, options)
            object.__setattr__(self, "form", form)
            object.__setattr__(form, "_given", {})  # which holds the tensors

    @property
    def name(self) -> str:
        """As the user writes it: the name of its class."""
        return type(self).__name__

    @property
    def written(self) -> bool:
        """Whether the class has the adjoint of this very rule written out: SGD with momentum and
        weight decay, both plain numbers, and nothing else."""
        return False

    @property
    def momentum(self) -> float:
        """The plain number, zero where there is none."""
        return self.numbers.get("momentum", 0.0)

    @property
    def weight_decay(self) -> float:
        """The plain number, zero where there is none."""
        return self.numbers.get("weight_decay", 0.0)

    @property
    @abstractmethod
    def state(self) -> tuple[str, ...]:
        """Names of the tensors, each like theta, that pass from step to step."""

    @property
    def has_state(self) -> bool:
        """Whether anything passes from step to step."""
        return bool(self.state)

    @property
    def elementwise(self) -> bool:
        """Whether `step` may be given all tasks at once, [T, *shape], rates as [T or 1, ...]: no
        number of a task depends on more than its own place."""
        return not self.has("clip_norm")

    def has(self, name: str) -> bool:
        """Whether a number is there and not zero: a learned one counts, whatever it is."""
        if name in self.learned or self.numbers.get(name, 0.0) != 0:
            return True
        return name in _NEVER_OFF and name in self.numbers

    def init(self, theta: Named) -> State:
        """The state before the first step.

        Args:
            theta: the adapted parameters of one task, name -> [*shape].
        """
        return {name: {p: torch.zeros_like(value) for p, value in theta.items()} for name in self.state}

    def at_step(self, hyper: Mapping[str, Tensor], k: int) -> dict[str, Number]:
        """All numbers of inner step k by name, learned ones as ().

        Args:
            hyper: the learned ones, () or [K].
            k: the step, from 0; beyond the last row that repeats.
        """
        now = {n: h if h.dim() == 0 else h[min(k, h.shape[0] - 1)] for n, h in hyper.items()}
        return {**self.numbers, **now}

    def step(
        self, theta: Named, gradient: Named, state: State, rates: Named, hyper: Mapping[str, Number], k: int
    ) -> tuple[Named, State]:
        """One inner step of one task, in differentiable PyTorch that works under vmap.

        Args:
            theta: the adapted parameters, name -> [*shape].
            gradient: that of the support loss at theta, of the same names.
            state: what `init` or the step before returned.
            rates: the learning rates, name -> [*(S or 1s)].
            hyper: what `at_step` returns.
            k: the step, from 0.

        Returns:
            (theta', state'): new tensors; nothing given is modified.
        """
        gradient = clipped(gradient, hyper)
        moved: Named = {}
        after: dict[str, Named] = {name: {} for name in self.state}
        for name, value in theta.items():
            own = {part: state[part][name] for part in self.state}
            moved[name], new = self.move(value, gradient[name], own, rates[name], hyper, k)
            for part in self.state:
                after[part][name] = new[part]
        return moved, after

    @abstractmethod
    def move(
        self, theta: Tensor, g: Tensor, state: Named, rate: Tensor, hyper: Mapping[str, Number], k: int
    ) -> tuple[Tensor, Named]:
        """`step` of one parameter, whose gradient is clipped already.

        Args:
            theta, g: [*shape].
            state: its part of the state, by the names in `self.state`.
            rate: broadcasts to theta.
            hyper, k: as of `step`.

        Returns:
            (theta', state').
        """

    def __repr__(self) -> str:
        if self.form is self and self.learned and not self._given:
            return f"{self.name}({', '.join((*_named(self.numbers), *self.learned))})"
        return f"{self.name}({', '.join(_named(self._given))})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, UpdateRule) or self._hash != other._hash or self._key != other._key:
            return False
        if len(self.tensors) != len(other.tensors):
            return False
        return all(other.tensors[name] is tensor for name, tensor in self.tensors.items())

    def __hash__(self) -> int:
        return self._hash

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{self.name}: `{name}` cannot be set, make a new rule")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.form is self and self.learned and not self._given:
            return _form_again, (type(self), self.numbers, self.learned, self.options)
        return _again, (type(self), self._given)


#: The numbers of all rules: where compiled code has them in a row, they stand in this order, which
#: is that of `FM_RULE_NUMBERS` in C++.
NUMBERS = (
    "momentum",
    "dampening",
    "weight_decay",
    "beta1",
    "beta2",
    "alpha",
    "eps",
    "eps_root",
    "lr_decay",
    "initial_accumulator_value",
    "clip_value",
    "clip_norm",
)

#: Numbers that have an effect where they are zero, too.
_NEVER_OFF = frozenset({"clip_value", "clip_norm"})


def _again(kind: type[UpdateRule], given: dict[str, Any]) -> UpdateRule:
    return kind(**given)


def _form_again(
    kind: type[UpdateRule], numbers: dict[str, float], learned: tuple[str, ...], options: dict[str, Any]
) -> UpdateRule:
    form = object.__new__(kind)
    form._fill({}, numbers, learned, {}, options)
    return form


def _named(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in values.items() if value is not None]


def pair(rule: str, argument: str, value: object) -> tuple[object, object]:
    """Two numbers, such as betas.

    Raises:
        TypeError: `value` is no pair.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{rule}: `{argument}` must be a pair of numbers or tensors, got {value!r}")
    return value[0], value[1]


def on(number: Number) -> bool:
    """Whether a number does anything: a tensor counts, whatever it holds."""
    return isinstance(number, Tensor) or number != 0


def clipped(gradient: Named, hyper: Mapping[str, Number]) -> Named:
    """The gradient of one task, clipped by value and then by its norm over all parameters.

    g = clamp(g, -clip_value, clip_value)                      as clip_grad_value_
    g = g * min(1, clip_norm / (|g| + 1e-6))                   as clip_grad_norm_
    """
    value, norm = hyper.get("clip_value"), hyper.get("clip_norm")
    if value is not None:
        gradient = {name: g.clamp(-value, value) for name, g in gradient.items()}  # type: ignore[arg-type]
    if norm is not None and gradient:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()])
        factor = (norm / (torch.linalg.vector_norm(norms) + 1e-6)).clamp(max=1.0)
        gradient = {name: g * factor for name, g in gradient.items()}
    return gradient


def _learned(label: str, value: Tensor) -> Tensor:
    check_ordinary(label, value)
    if not value.is_floating_point():
        raise TypeError(f"{label} must be a number or a floating-point tensor, got {value.dtype}")
    if value.dim() > 1:
        raise ValueError(f"{label} must be a number or a tensor () or [K], got {tuple(value.shape)}")
    return value


def _plain(label: str, value: object, allowed: Range) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{label} must be a number or a tensor, got {type(value).__name__}")
    if not (is_finite(value) and allowed.least <= value < allowed.below):  # type: ignore[arg-type, operator]
        raise ValueError(f"{label} must be {allowed}, got {value}")
    # equal rules have equal numbers: 1 and 1.0 are one cache key
    return float(value)
