"""What a case costs on paper: multiply-adds, and the bytes of weights that its inner steps
stream."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmeta.capture.capture import captured
from fastmeta.cases import Case
from fastmeta.graph.cost import multiply_adds

#: Sets of parameters that one inner step of second order reads or writes when nothing stays in
#: registers. Gradient
#: step: forward and backward read theta, the update reads it and writes the next (4).
#: Hessian-vector product: tangent forward and tangent backward each read theta and the direction,
#: the update of lambda reads and writes (6).
STREAMED = 10


def flops(case: Case) -> float:
    """Floating-point operations, two a multiply-add, of one meta-gradient with stored activations.

    nan for a network without a layer program.

    Source: docs/architecture.md, "Cost"; first order drops the Hessian-vector products.
    """
    program = (
        None if case.ids or case.more_inputs else captured(case.make(), case.input_shape, torch.float32)[0]
    )
    if program is None:
        return math.nan
    f, f1 = multiply_adds(program)
    step = 9 * f - 5 * f1 if case.order == "second" else 3 * f - f1
    return 2.0 * case.tasks * (case.shots * case.steps * step + case.queries * (3 * f - f1))


def parameter_bytes(net: nn.Module) -> int:
    """One set of parameters in float32."""
    return 4 * sum(parameter.numel() for parameter in net.parameters())


def streamed_bytes(case: Case) -> float:
    """Bytes of parameters that one inner step of all tasks streams; nan for networks other than
    MLPs.

    The first layer's weights are left out: the engine keeps how a wide one changes as factors, and
    small ones do not count.
    """
    layers = [
        layer for layer in case.make().modules() if next(layer.parameters(recurse=False), None) is not None
    ]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return float("nan")
    return case.tasks * STREAMED * float(sum(map(parameter_bytes, layers[1:])))


def working_set(case: Case) -> int:
    """Bytes of parameters that one worker goes through: theta_0 .. theta_K and lambda."""
    return (case.steps + 2) * parameter_bytes(case.make())
