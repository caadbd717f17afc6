"""All that can be captured: what the records of the layer kinds say, and what becomes no layer.

Three tables of a record (`fastmeta.layers.kind.LayerKind`), each from what it matches to the rule
that captures it:

    modules     exact module type -> (rule, names of the attributes that the rule takes, by name,
                beside the input)
    functions   torch or operator function -> rule
    methods     name of a Tensor method -> rule

A rule is a function `rule(build, input, ...)` with the parameters and the defaults of what it
captures. It is given traced tensors as `Value`, parameters as `Parameter` and all else as it is; it
adds a layer through `build.layer` and returns its output, returns NotImplemented to leave the call
to another kind, or raises `Refused` with the reason. What does not fit its parameters is refused
before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmeta.capture import identity, sizes
from fastmeta.capture.build import Functions, Methods, Modules, Rule
from fastmeta.layers.registry import KINDS

#: Calls that may be given buffers; no layer reads one otherwise.
READ_BUFFERS = tuple(call for kind in KINDS.values() if kind.buffers for call in kind.functions)

#: Module type -> (rule, attributes).
MODULES: Modules = {}
#: Function, or name of a Tensor method -> the rules to try in turn.
CALLS: dict[Callable[..., Any] | str, tuple[Rule, ...]] = {}


def _add(modules: Modules, functions: Functions, methods: Methods) -> None:
    MODULES.update(modules)
    for target, rule in (functions | methods).items():
        CALLS[target] = (*CALLS.get(target, ()), rule)


for _kind in KINDS.values():
    _add(_kind.modules, _kind.functions, _kind.methods)
for _other in (identity, sizes):
    _add(_other.MODULES, _other.FUNCTIONS, _other.METHODS)
