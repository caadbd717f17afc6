"""Operators that change nothing and become no layer: identity, dropout when off, contiguous."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Value, described


def identity(build: Builder, input: Value) -> Value:
    """[N, ...] -> the same value."""
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")
    return input


def dropout(
    build: Builder, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    """[N, ...] -> the same value; refused while it drops anything."""
    if training and p != 0:
        raise Refused(f"dropout is on (training, p={p})")
    return identity(build, input)


def _dropout(build: Builder, input: Value, p: float, train: bool) -> Value:
    return dropout(build, input, p, train)


MODULES: Modules = {nn.Identity: (identity, ()), nn.Dropout: (dropout, ("p", "training", "inplace"))}
FUNCTIONS: Functions = {F.dropout: dropout, torch.dropout: _dropout}
METHODS: Methods = {"contiguous": identity}
