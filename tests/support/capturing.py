"""Capture in tests: a network's program, the reason why it has none, and a plain interpreter of
programs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.capture import captured
from fastmeta.graph.program import Layer, Program

ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "sin": torch.sin,
    "affine": lambda x, scale, shift: scale * x + shift,
}


def _image(x: Tensor) -> Tensor:
    """Signals [N, C, L] are images of height 1."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _conv(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    weight, bias = (params[name] if name else None for name in layer.params)
    return F.conv2d(_image(x), weight.reshape(*weight.shape[:2], kh, kw), bias, (sh, sw), (ph, pw))


def _max_pool(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    for ceil in (False, True):
        out = F.max_pool2d(_image(x), (kh, kw), (sh, sw), (ph, pw), ceil_mode=ceil)
        if out[0].numel() == math.prod(layer.shape):
            return out
    raise AssertionError(layer)


def _avg_pool(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    if layer.function == "adaptive":
        return F.adaptive_avg_pool2d(_image(x), (1, *layer.shape[1:])[-2:])
    kh, kw, sh, sw, ph, pw, padded, divisor = map(int, layer.constants)
    for ceil in (False, True):
        out = F.avg_pool2d(_image(x), (kh, kw), (sh, sw), (ph, pw), ceil, bool(padded), divisor or None)
        if out[0].numel() == math.prod(layer.shape):
            return out
    raise AssertionError(layer)


def _batch_norm(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    weight, bias = (params[name] if name else None for name in layer.params[:2])
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.constants[0])


def _layer_norm(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    size, eps = layer.constants
    weight, bias = (params[name].reshape(-1) if name else None for name in layer.params)
    return F.layer_norm(x.reshape(-1, int(size)), (int(size),), weight, bias, eps)


def _group_norm(layer: Layer, params: dict[str, Tensor], x: Tensor) -> Tensor:
    groups, eps = layer.constants
    return F.group_norm(x, int(groups), *(params[name] if name else None for name in layer.params), eps)


IMAGES: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "concat": lambda layer, params, a, b: torch.cat([a, b], int(layer.constants[0]) + 1),
}


def run(program: Program, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a program computes, in plain PyTorch."""
    values = [x]
    for layer in program.layers:
        inputs = [values[i] for i in layer.inputs]
        if layer.kind == "linear":
            out = F.linear(inputs[0], *(params[name] if name else None for name in layer.params))
        elif layer.kind == "elementwise":
            out = ELEMENTWISE[layer.function](inputs[0], *layer.constants)
        elif layer.kind == "add":
            out = inputs[0] + inputs[1]
        elif layer.kind in IMAGES:
            out = IMAGES[layer.kind](layer, params, *inputs).reshape(len(x), *layer.shape)
        elif layer.kind == "reshape":
            out = inputs[0].reshape(len(x), *layer.shape)
        else:
            raise AssertionError(f"`run` has no branch for the layer kind {layer.kind!r}")
        assert tuple(out.shape[1:]) == layer.shape
        values.append(out)
    return values[program.output]


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
