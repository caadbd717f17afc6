"""The registry of what can be captured: one file a layer kind, one entry here.

A kind's file declares three tables, each from what it matches to the rule that captures it:

    MODULES     exact module type -> (rule, names of the attributes that the rule takes, by name, beside the input)
    FUNCTIONS   torch or operator function -> rule
    METHODS     name of a Tensor method -> rule

A rule is a function `rule(build, input, ...)` with the parameters and the defaults of what it captures. It is
given traced tensors as `Value`, parameters as `Parameter` and all else as it is; it adds a layer through
`build.layer` and returns its output, returns NotImplemented to leave the call to another kind, or raises
`Refused` with the reason. What does not fit its parameters is refused before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmeta.network import add, elementwise, identity, linear, reshape, sizes
from fastmeta.network.build import Modules, Rule

KINDS: tuple[Any, ...] = (linear, elementwise, add, reshape, identity, sizes)

#: Module type -> (rule, attributes).
MODULES: Modules = {}
#: Function, or name of a Tensor method -> the rules to try in turn.
CALLS: dict[Callable[..., Any] | str, tuple[Rule, ...]] = {}

for _kind in KINDS:
    MODULES |= _kind.MODULES
    for _target, _rule in (_kind.FUNCTIONS | _kind.METHODS).items():
        CALLS[_target] = (*CALLS.get(_target, ()), _rule)
