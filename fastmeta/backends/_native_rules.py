"""Update rules as the C++ engines run them, and their learned numbers in one tensor a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.backends._inputs import check_numbers
from fastmeta.backends._rules import NAMED, NUMBERS, plain_numbers, refuses_rule
from fastmeta.backends._rules import gradients_of_numbers as gradients_of_numbers
from fastmeta.problem import Problem
from fastmeta.update_rules import SGD, UpdateRule


def refuses_native_rule(problem: Problem, own: bool = False) -> str:
    """Why the C++ engines cannot run the inner loop of a problem, "" if they can; `own`: rules of
    the user's own are programs."""
    return refuses_rule(problem, (*NAMED, *(["custom"] if own else [])), objectives=True)


def described_rule(rule: UpdateRule | None) -> dict[str, Any]:
    """What `_C.Plan` and `_C.Machine` read of a rule."""
    rule = SGD() if rule is None or rule.kind == "custom" else rule
    return {
        "kind": rule.kind,
        "nesterov": bool(rule.options.get("nesterov")),
        "centered": bool(rule.options.get("centered")),
        "numbers": plain_numbers(rule),
        "on": [rule.has(name) for name in NUMBERS],
        "learned": [name in rule.learned for name in NUMBERS],
    }


def states_of(problem: Problem) -> int:
    """How many tensors like theta the state of the rule is."""
    return 0 if problem.rule is None else len(problem.rule.state)


def given_numbers(problem: Problem) -> Tensor | None:
    """[K, all numbers]: the learned ones of each step; None where there are none.

    Raises:
        ValueError: one is not finite.
    """
    if not problem.hyper or not problem.steps or (problem.rule is not None and problem.rule.kind == "custom"):
        return None
    check_numbers(problem)
    first = next(iter(problem.params.values()))
    rows = torch.zeros(problem.steps, len(NUMBERS), dtype=first.dtype, device="cpu")
    for name, value in problem.hyper.items():
        rows[:, NUMBERS.index(name)] = value.detach()
    return rows
