"""What backends refuse of update rules, and of what else inner loops can be asked for."""

from __future__ import annotations

from collections.abc import Collection

from fastmeta.problem import Problem
from fastmeta.update_rules import UpdateRule

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


def described(rule: UpdateRule) -> str:
    """A rule in a few words, such as "SGD with clip_norm, learned momentum"."""
    words = ["clip_value", "clip_norm"]
    if rule.kind == "sgd":
        words.append("dampening")
    parts = [name for name in words if rule.has(name) and name not in rule.learned]
    parts += [name for name, value in rule.options.items() if value is True]
    parts += [f"learned {name}" for name in rule.learned]
    return f"{rule.name} with {', '.join(parts)}" if parts else rule.name
