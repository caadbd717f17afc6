"""Capture in tests: a network's program, the reason why it has none, and the program against the
network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmeta.capture.capture import captured
from fastmeta.graph.program import Program
from fastmeta.verify.plain import run


def program_of(net: nn.Module, shape: tuple[int, ...] = (6,)) -> Program:
    program, reason = captured(net, shape, torch.float64)
    assert program is not None, reason
    assert not reason
    return program


def reason_of(net: nn.Module, shape: tuple[int, ...] = (6,)) -> str:
    program, reason = captured(net, shape, torch.float64)
    assert program is None
    assert reason
    return reason


def check(net: nn.Module, shape: tuple[int, ...] = (6,)) -> Program:
    """Capture `net` and compare the program with it on seven random examples."""
    program = program_of(net.double(), shape)
    x = 2 * torch.randn(7, *shape, dtype=torch.float64)
    ours, reference = run(program, dict(net.named_parameters()), x), net(x.clone())
    assert program.output_shape == tuple(reference.shape[1:])
    assert all(type(c) is float for layer in program.layers for c in layer.constants)
    assert not (ours - reference).norm() > 1e-12 * reference.norm()
    assert torch.isfinite(ours).all()
    return program


class Forward(nn.Module):
    """A network whose forward is given: `function(net, x)`; it has a few things to use."""

    def __init__(self, function: Callable[[Forward, Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.listed = nn.ParameterList([self.weight])
        self.register_buffer("table", torch.ones(6))
        self.register_buffer("scale", torch.tensor(2.0))
        self.plain = torch.ones(6)
        self.count = 0

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)
