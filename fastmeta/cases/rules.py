"""The update rules of cases, by name: most of their numbers are learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmeta.update_rules import SGD, Adagrad, Adam, AdamW, Lion, RMSProp, UpdateRule

#: name -> the rule, from what makes a learned number of a plain one.
RULES: dict[str, Callable[[Callable[[float], Tensor]], UpdateRule]] = {
    "nesterov": lambda n: SGD(n(0.8), n(0.1), nesterov=True, clip_value=n(0.3)),
    "clipped": lambda n: SGD(n(0.5), dampening=n(0.2), clip_norm=n(0.7)),
    "adam": lambda n: Adam((n(0.9), n(0.99)), n(1e-3), weight_decay=n(0.1)),
    "adamw": lambda n: AdamW((0.9, 0.99), eps_root=n(1e-4), weight_decay=n(0.3), clip_norm=n(0.5)),
    "adam_plain": lambda n: Adam((0.9, 0.99), 1e-3),
    "adam_root": lambda n: Adam(eps_root=1e-8),
    "rmsprop": lambda n: RMSProp(n(0.9), n(1e-2), n(1e-4), momentum=n(0.5), centered=True),
    "adagrad": lambda n: Adagrad(n(0.1), n(0.1), 0.01, n(1e-3)),
    "lion": lambda n: Lion((n(0.9), n(0.99)), n(0.3)),
}


def rule_of_case(name: str, dtype: torch.dtype, device: torch.device, steps: int) -> UpdateRule:
    """The rule of that name.

    Args:
        name: a key of `RULES`.
        dtype, device: of its tensors.
        steps: K: every other learned number differs from step to step.
    """
    made: list[Tensor] = []

    def learned(value: float) -> Tensor:
        shape = (steps,) if len(made) % 2 and steps else ()
        fall = 1 - 0.02 * torch.arange(max(steps, 1), dtype=torch.float32)
        made.append((value * (fall if shape else fall[0])).to(device, dtype))
        return made[-1]

    return RULES[name](learned)
