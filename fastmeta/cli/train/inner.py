"""`--inner-rule`: the update rule of the inner loop, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

import fastmeta as fm
from fastmeta.update_rules import UpdateRule

#: Rules that divide by a root have `eps_root`, without which a unit whose gradient was zero at
#: every step gives NaN: see `fastmeta.Adam`.
RULES: dict[str, Callable[[], UpdateRule]] = {
    "sgd": fm.SGD,
    "momentum": lambda: fm.SGD(0.9),
    "nesterov": lambda: fm.SGD(0.9, nesterov=True),
    "adam": lambda: fm.Adam(eps_root=1e-8),
    "adamw": lambda: fm.AdamW(eps_root=1e-8),
    "rmsprop": lambda: fm.RMSProp(eps_root=1e-8),
    "adagrad": lambda: fm.Adagrad(eps_root=1e-8),
    "lion": fm.Lion,
}


def rule_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the option; the command gets the name as `inner_rule`."""
    return click.option(
        "--inner-rule",
        type=click.Choice([*RULES]),
        default="sgd",
        help="Update rule of the inner steps; it usually wants an --inner-lr of its own.",
    )(command)
