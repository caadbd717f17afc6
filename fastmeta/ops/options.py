"""The options of an operator: everything it takes that is neither the network nor a tensor nor a
loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import isfinite
from numbers import Real
from typing import NamedTuple

from torch import Tensor, nn

from fastmeta import backends
from fastmeta.models.check import check_count
from fastmeta.update_rules import SGD, UpdateRule

#: `adapt=` as a user gives it.
Adapt = str | Iterable[str] | Callable[[str, nn.Parameter], bool]

_PLAIN_SGD = SGD()
# No loop takes so many steps; an endless iterator ends here.
_MOST_NUMBERS = 1 << 20

# What an operator calls a field of `Problem`, where that is not its own name.
_ONE_SET = {"support_x": "x", "support_y": "y", "support_weights": "weights"}
_INNER_LOOP = {"lr": "inner_lr", "steps": "inner_steps"}
_ARGUMENTS: dict[str, dict[str, str]] = {
    "task_forward": {"query_x": "x"},
    "inner_sgd": _ONE_SET,
    "task_gradient": _ONE_SET,
}
for _algorithm in (
    "MAML",
    "FOMAML",
    "ANIL",
    "BOIL",
    "MetaSGD",
    "MAMLPlusPlus",
    "MetaCurvature",
    "CAVIA",
    "IMAML",
    "Reptile",
):
    _ARGUMENTS[_algorithm] = _INNER_LOOP
    _ARGUMENTS[f"{_algorithm}.adapt"] = {**_ONE_SET, "lr": "inner_lr"}
    _ARGUMENTS[f"{_algorithm}.predict"] = {"query_x": "x", "params": "adapted"}
_ARGUMENTS["CAVIA"] = {**_INNER_LOOP, "adapt": "context"}

_CHOICES = {
    "order": ("second", "first"),
    "memory": ("auto", "store", "recompute", "checkpoint"),
    "batch_stats": ("task", "running", "module"),
    "backend": ("auto", *backends.NAMES),
}


class Options(NamedTuple):
    """The options of one call; hashable, so that it can be part of a plan's key."""

    who: str  # the operator, as messages name it
    steps: int = 0
    order: str = "second"
    adapt: str | tuple[str, ...] = "all"
    step_weights: tuple[float, ...] | None = None
    support_per_step: bool = False
    rule: UpdateRule = _PLAIN_SGD  # its `form`
    memory: str = "auto"
    batch_stats: str = "task"
    backend: str = "auto"
    task_chunk: int | None = None
    support_step_weights: tuple[float, ...] | None = None
    memory_limit: int | None = None


def argument(who: str, field: str, leaf: str = "") -> str:
    """The name of an argument in a message: "inner_sgd: `x`"; with what names a leaf in it,
    "inner_sgd: `x['ids']`"."""
    return f"{who}: `{_ARGUMENTS.get(who, {}).get(field, field)}{leaf}`"


def check_options(options: Options) -> None:
    """Check every option by itself.

    Raises:
        TypeError, ValueError: names the option, what was expected and what came.
    """
    who = options.who
    steps = options.steps
    check_count(argument(who, "steps"), steps, 0)
    for name, allowed in _CHOICES.items():
        value = getattr(options, name)
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(
                f"{argument(who, name)} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
            )
    chunk = options.task_chunk
    if chunk is not None:
        check_count(argument(who, "task_chunk"), chunk, 1, "an int or None")
    check_flag(who, "support_per_step", options.support_per_step)
    check_rule(who, options.rule)
    limit = options.memory_limit
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"{argument(who, 'memory_limit')} must be an int or None, got {limit!r}")
        if limit < 1:
            raise ValueError(f"{argument(who, 'memory_limit')} must be at least 1 byte, got {limit}")
        if options.memory != "checkpoint":
            raise ValueError(
                f"{argument(who, 'memory_limit')} goes with memory='checkpoint' alone, got {limit} and "
                f"memory={options.memory!r}"
            )
    if options.step_weights is not None and len(options.step_weights) != steps + 1:
        raise ValueError(
            f"{argument(who, 'step_weights')} must hold steps + 1 = {steps + 1} numbers, "
            f"got {len(options.step_weights)}"
        )
    support = options.support_step_weights
    if support is not None and len(support) != steps:
        raise ValueError(
            f"{argument(who, 'support_step_weights')} must hold steps = {steps} numbers, got {len(support)}"
        )


def rule_of(who: str, update_rule: UpdateRule | None) -> UpdateRule:
    """The update rule meant by `update_rule=`.

    Raises:
        TypeError: it is none.
    """
    return _PLAIN_SGD if update_rule is None else check_rule(who, update_rule)


def check_rule(who: str, rule: object) -> UpdateRule:
    """`rule`, if it is an update rule.

    Raises:
        TypeError: it is none; says what to do with a function.
    """
    if not isinstance(rule, UpdateRule):
        way = ": wrap it, fastmeta.CustomRule(...)" if callable(rule) and not isinstance(rule, type) else ""
        raise TypeError(
            f"{argument(who, 'update_rule')} must be an update rule, such as fastmeta.SGD, or None, got "
            f"{rule!r}{way}"
        )
    return rule


def names_of(who: str, net: nn.Module, adapt: Adapt) -> str | tuple[str, ...]:
    """`adapt=` in a form that can be a key; a predicate is asked here, about every parameter of
    `net`.

    Raises:
        TypeError: neither a string nor names nor a function.
    """
    if isinstance(adapt, str):
        return adapt
    if callable(adapt):
        own = net.named_parameters() if isinstance(net, nn.Module) else ()
        try:
            return tuple(name for name, value in own if adapt(name, value))
        except Exception as error:
            raise TypeError(
                f"{argument(who, 'adapt')} must be a predicate (name, parameter) -> bool where it is a "
                f"function, {adapt!r} raised {type(error).__name__}: {error}"
            ) from error
    names = _strings(adapt)
    if names is None:
        raise TypeError(
            f"{argument(who, 'adapt')} must be 'all', 'head', 'body', names or glob patterns of parameters "
            f"or a predicate (name, parameter) -> bool, got {adapt!r}"
        )
    return names


def _strings(given: object) -> tuple[str, ...] | None:
    """`given` as a tuple, None if it holds anything but strings; stops at the first that is
    none."""
    names: list[str] = []
    if not isinstance(given, Iterable) or isinstance(given, (bytes, Tensor)):
        return None
    for name in _members(given):
        if not isinstance(name, str):
            return None
        names.append(name)
    return tuple(names)


def _members(given: Iterable[object]) -> Iterable[object]:
    """An iterator over `given`; over None where it has a way to iterate that does not work, as
    script modules do."""
    try:
        return iter(given)
    except Exception:
        return iter((None,))


def check_flag(who: str, name: str, value: object) -> None:
    """Check that an option is True or False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{argument(who, name)} must be True or False, got {value!r}")


def numbers_of(
    who: str, step_weights: Sequence[float] | None, field: str = "step_weights"
) -> tuple[float, ...] | None:
    """`step_weights=` or another such argument in a form that can be a key.

    Raises:
        TypeError: not a sequence of numbers.
        ValueError: one of them is not finite.
    """
    if step_weights is None:
        return None
    what = argument(who, field)
    numbers = isinstance(step_weights, Iterable) and not isinstance(step_weights, (str, Tensor))
    given = [*islice(_members(step_weights), _MOST_NUMBERS)] if numbers else [None]
    if not all(isinstance(weight, Real) for weight in given):
        raise TypeError(f"{what} must be a sequence of numbers, got {step_weights!r}")
    try:
        weights = tuple(map(float, given))  # type: ignore[arg-type]
    except OverflowError as error:  # an int beyond all floats
        raise ValueError(f"{what} must be finite: {error}") from error
    if not all(map(isfinite, weights)):
        raise ValueError(f"{what} must be finite, got {weights}")
    return weights


def wrt_of(who: str, wrt: Iterable[str]) -> frozenset[str]:
    """`wrt=` in a form that can be a key; whether there are such names is `check_wrt`'s to say.

    Raises:
        TypeError: neither a name nor names.
    """
    names = (wrt,) if isinstance(wrt, str) else _strings(wrt)
    if names is None:
        raise TypeError(f"{argument(who, 'wrt')} must hold names of what to differentiate by, got {wrt!r}")
    return frozenset(names)
