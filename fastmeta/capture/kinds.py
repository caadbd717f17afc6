"""The registry of what can be captured: one file a layer kind, one entry here.

A kind's file declares three tables, each from what it matches to the rule that captures it:

    MODULES     exact module type -> (rule, names of the attributes that the rule takes, by name,
                beside the input)
    FUNCTIONS   torch or operator function -> rule
    METHODS     name of a Tensor method -> rule

A rule is a function `rule(build, input, ...)` with the parameters and the defaults of what it
captures. It is given traced tensors as `Value`, parameters as `Parameter` and all else as it is; it
adds a layer through `build.layer` and returns its output, returns NotImplemented to leave the call
to another kind, or raises `Refused` with the reason. What does not fit its parameters is refused
before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from fastmeta.capture import identity, sizes
from fastmeta.capture.build import Modules, Rule
from fastmeta.layers import (
    add,
    avg_pool2d,
    batch_norm,
    concat,
    conv2d,
    elementwise,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    max_pool2d,
    reshape,
)

KINDS: tuple[Any, ...] = (
    linear,
    conv2d,
    batch_norm,
    layer_norm,
    group_norm,
    instance_norm,
    max_pool2d,
    avg_pool2d,
    elementwise,
    add,
    concat,
    reshape,
    identity,
    sizes,
)
#: Calls that may be given buffers; no layer reads one otherwise.
READ_BUFFERS = (F.batch_norm,)

#: Module type -> (rule, attributes).
MODULES: Modules = {}
#: Function, or name of a Tensor method -> the rules to try in turn.
CALLS: dict[Callable[..., Any] | str, tuple[Rule, ...]] = {}

for _kind in KINDS:
    MODULES |= _kind.MODULES
    for _target, _rule in (_kind.FUNCTIONS | _kind.METHODS).items():
        CALLS[_target] = (*CALLS.get(_target, ()), _rule)
