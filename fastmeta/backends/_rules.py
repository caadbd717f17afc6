"""What backends refuse of update rules, and of what else inner loops can be asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from fastmeta.problem import Problem
from fastmeta.update_rules import UpdateRule
from fastmeta.update_rules.rule import NUMBERS as NUMBERS

#: All kinds of rules but those of the user's own.
NAMED = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion")


def refuses_rule(problem: Problem, kinds: Collection[str] = (), objectives: bool = False) -> str:
    """Why a backend cannot run the inner loop of a problem, "" if it can.

    Args:
        problem: the problem.
        kinds: of the rules that the backend runs, plain numbers or learned ones, besides SGD with
            momentum and weight decay as plain numbers.
        objectives: it has checkpoints, and support losses in the objective.
    """
    rule = problem.rule
    if problem.memory == "checkpoint" and not objectives:
        return "memory='checkpoint'"
    if problem.support_step_weights is not None and not objectives:
        return "support losses are in the objective (`support_step_weights`)"
    if rule is None or rule.written or rule.kind in kinds:
        return ""
    return f"the update rule is {described(rule)}"


def refuses_unread(problem: Problem, read: Collection[str]) -> str:
    """Why a backend that leaves alone what no layer reads cannot run the inner loop of a problem,
    "" if it can.

    Args:
        problem: the problem.
        read: the parameters that some layer reads.
    """
    rule = problem.rule
    if rule is None or not problem.steps or not rule.has("weight_decay"):
        return ""
    unread = [name for name in problem.rates if name not in read]
    return f"weight decay moves `{unread[0]}`, which no layer reads" if unread else ""


def unread_gradient(problem: Problem, name: str) -> Tensor:
    """The gradient of a parameter that nothing reads and no step moves: what was given of its last
    value."""
    if problem.adapted_grad is None:
        return torch.zeros_like(problem.params[name], memory_format=torch.contiguous_format)
    given = problem.adapted_grad[name]
    return given.clone() if name in problem.per_task else given.sum(0)


def plain_numbers(rule: UpdateRule) -> list[float]:
    """The numbers of a rule in the order of `NUMBERS`, zero where it has none."""
    return [rule.numbers.get(name, 0.0) for name in NUMBERS]


def bits(names: Iterable[str]) -> int:
    """A set of numbers: bit i stands for the i-th of `NUMBERS`."""
    return sum(1 << NUMBERS.index(name) for name in names)


def gradients_of_numbers(
    problem: Problem, rows: Tensor | None, names: Sequence[str] = NUMBERS
) -> dict[str, Tensor]:
    """From [K, names], None where there are no steps, to what each learned number is: (), or
    [K]."""
    if rows is None:
        return {name: torch.zeros_like(value) for name, value in problem.hyper.items()}
    found = {}
    for name, value in problem.hyper.items():
        of_steps = rows[:, names.index(name)]
        found[name] = of_steps.clone() if value.dim() else of_steps.sum()
    return found


def described(rule: UpdateRule) -> str:
    """A rule in a few words, such as "SGD with clip_norm, learned momentum"."""
    words = ["clip_value", "clip_norm"]
    if rule.kind == "sgd":
        words.append("dampening")
    parts = [name for name in words if rule.has(name) and name not in rule.learned]
    parts += [name for name, value in rule.options.items() if value is True]
    parts += [f"learned {name}" for name in rule.learned]
    return f"{rule.name} with {', '.join(parts)}" if parts else rule.name
