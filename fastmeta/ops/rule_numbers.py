"""The learned numbers of an update rule: from the rule that the user gives to what a `Problem`
holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.ops.options import argument
from fastmeta.ordinary import check_ordinary
from fastmeta.update_rules import CustomRule, UpdateRule

#: The tensors of a rule by name, as `Problem.hyper` has them.
Hyper = dict[str, Tensor]
NONE: Hyper = {}


def hyper_of(rule: UpdateRule) -> Hyper:
    """The tensors of a rule that an operator is given."""
    if rule.tensors:
        return rule.tensors
    return rule.values if isinstance(rule, CustomRule) else NONE


def check_hyper(
    who: str, rule: UpdateRule, hyper: Hyper, steps: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Check the tensors of a rule against the parameters; reads no values.

    Raises:
        TypeError, ValueError: names the number, what was expected and what came.
    """
    what = argument(who, "update_rule")
    for name, value in hyper.items():
        label = f"{what}: {rule.labels.get(name, name)} of {rule.name}"
        check_ordinary(label, value)
        if value.dtype != dtype:
            raise TypeError(f"{label} must be {dtype}, as the parameters, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{label} must be on {device}, as the parameters, got {value.device}")
        if isinstance(rule, CustomRule):
            continue
        if value.shape not in ((), (steps,)) and not (steps == 0 and value.shape == (1,)):
            raise ValueError(f"{label} must be a number, () or [K] = ({steps},), got {tuple(value.shape)}")


def check_rule_wrt(who: str, wrt: frozenset[str], hyper: Hyper) -> None:
    """Check that there is something to differentiate by.

    Raises:
        ValueError: "rule" is wanted, and no number of the rule is learned.
    """
    if "rule" in wrt and not hyper:
        raise ValueError(
            f"{argument(who, 'wrt')} has 'rule', but no number of {argument(who, 'update_rule')} is a tensor"
        )


def repeated_hyper(rule: UpdateRule, hyper: Hyper, steps: int) -> Hyper:
    """The numbers for `steps` inner steps out of those for K: beyond K the last step's repeat.

    Derivatives: those of indexing.
    """
    if isinstance(rule, CustomRule):
        return hyper
    found = {}
    for name, value in hyper.items():
        if value.dim() and value.shape[0] != steps:
            if not value.shape[0]:
                raise ValueError(
                    f"`update_rule`: {name} has a number for each of 0 inner steps, none to repeat"
                )
            at = torch.arange(max(steps, 1), device=value.device).clamp_max(value.shape[0] - 1)
            value = value[at]
        found[name] = value
    return found


def hyper_at(rule: UpdateRule, hyper: Hyper, k: int) -> Hyper:
    """The numbers of inner step k alone, () each.

    Derivatives: those of indexing.
    """
    if isinstance(rule, CustomRule):
        return hyper
    return {n: v if v.dim() == 0 else v[min(k, v.shape[0] - 1)] for n, v in hyper.items()}


def bare(hyper: Mapping[str, Tensor]) -> tuple[object, ...]:
    """What of them a plan is found by."""
    return tuple([(name, v.shape, v.dtype, v.device, v.layout) for name, v in hyper.items()])
