"""Convolutions, norms, pools and concats: the forms that are captured, and those that are refused
with a reason."""

from __future__ import annotations

import pytest
import torch
from capturing import check, program_of, reason_of
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.capture import captured

IMAGE, SIGNAL = (4, 8, 6), (4, 9)

MODULES = [
    (nn.Conv2d(4, 5, 3), IMAGE, "conv2d"),
    (nn.Conv2d(4, 5, (3, 1), stride=(2, 1), padding=(0, 2), bias=False), IMAGE, "conv2d"),
    (nn.Conv2d(4, 5, 5, padding="same"), IMAGE, "conv2d"),
    (nn.Conv2d(4, 5, 2, padding="valid"), IMAGE, "conv2d"),
    (nn.Conv1d(4, 3, 3, stride=2, padding=1), SIGNAL, "conv2d"),
    (nn.BatchNorm2d(4), IMAGE, "batch_norm"),
    (nn.BatchNorm2d(4, affine=False, track_running_stats=False, eps=0.1), IMAGE, "batch_norm"),
    (nn.BatchNorm1d(4), SIGNAL, "batch_norm"),
    (nn.BatchNorm1d(4), (4,), "batch_norm"),
    (nn.LayerNorm((8, 6)), IMAGE, "layer_norm"),
    (nn.LayerNorm(9, elementwise_affine=False, eps=0.1), SIGNAL, "layer_norm"),
    (nn.LayerNorm(9, bias=False), SIGNAL, "layer_norm"),
    (nn.GroupNorm(2, 4), IMAGE, "group_norm"),
    (nn.GroupNorm(4, 4, affine=False), SIGNAL, "group_norm"),
    (nn.InstanceNorm2d(4), IMAGE, "group_norm"),
    (nn.InstanceNorm1d(4, affine=True), SIGNAL, "group_norm"),
    (nn.MaxPool2d(2), IMAGE, "max_pool2d"),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE, "max_pool2d"),
    (nn.MaxPool1d(3, 2), SIGNAL, "max_pool2d"),
    (nn.AvgPool2d((2, 3), 1), IMAGE, "avg_pool2d"),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE, "avg_pool2d"),
    (nn.AvgPool2d(3, divisor_override=5), IMAGE, "avg_pool2d"),
    (nn.AvgPool1d(4, 3, 2), SIGNAL, "avg_pool2d"),
    (nn.AdaptiveAvgPool2d((3, None)), IMAGE, "avg_pool2d"),
    (nn.AdaptiveAvgPool1d(2), SIGNAL, "avg_pool2d"),
]


@pytest.mark.parametrize(("module", "shape", "kind"), MODULES, ids=str)
def test_module_matches_reference(module: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    (layer,) = check(nn.Sequential(module), shape).layers
    assert layer.kind == kind


class Calls(nn.Module):
    """A network whose forward is given, with parameters to call functions with."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(3, 4, 3, 3))
        self.line = nn.Parameter(torch.randn(3, 4, 3))
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.last = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.plain = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUNCTIONS = {
    "conv2d": (lambda net, x: F.conv2d(x, net.weight, stride=2), IMAGE),
    "torch.conv2d": (lambda net, x: torch.conv2d(x, net.weight, padding=1), IMAGE),
    "conv1d": (lambda net, x: F.conv1d(x, net.line), SIGNAL),
    "batch_norm": (lambda net, x: F.batch_norm(x, None, None, net.scale, net.shift, training=True), IMAGE),
    "batch_norm buffers": (
        lambda net, x: F.batch_norm(x, net.mean, net.var, net.scale, training=True),
        IMAGE,
    ),
    "layer_norm": (lambda net, x: F.layer_norm(x, (6,), net.last), IMAGE),
    "group_norm": (lambda net, x: F.group_norm(x, 2, net.scale, net.shift), IMAGE),
    "instance_norm": (lambda net, x: F.instance_norm(x, weight=net.scale), IMAGE),
    "max_pool2d": (lambda net, x: F.max_pool2d(x, 2, stride=1), IMAGE),
    "max_pool1d": (lambda net, x: F.max_pool1d(x, 2), SIGNAL),
    "avg_pool2d": (lambda net, x: F.avg_pool2d(x, 2), IMAGE),
    "adaptive": (lambda net, x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE),
    "mean": (lambda net, x: x.mean((2, 3)), IMAGE),
    "mean keepdim": (lambda net, x: torch.mean(x, dim=(-2, -1), keepdim=True), IMAGE),
    "mean of a signal": (lambda net, x: x.mean(-1), SIGNAL),
    "flatten": (lambda net, x: torch.flatten(F.max_pool2d(x, 2), 1), IMAGE),
    "cat": (lambda net, x: torch.cat([x, torch.tanh(x), x], dim=1), IMAGE),
    "concat along the width": (lambda net, x: torch.concat((x, torch.tanh(x)), -1), IMAGE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_matches_reference(name: str) -> None:
    function, shape = FUNCTIONS[name]
    check(Calls(function), shape)


def test_running_statistics_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    program, _ = captured(net, IMAGE, torch.float32, "running")
    assert program is not None
    assert program.buffers == (("1.running_mean", (4,)), ("1.running_var", (4,)))
    assert program_of(net, IMAGE).buffers == ()
    assert program_of(nn.Sequential(nn.Conv2d(4, 4, 1)), IMAGE).buffers == ()


REFUSED = {
    "dilation": (nn.Conv2d(4, 5, 3, dilation=2), IMAGE, "its dilation is"),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), IMAGE, "it has 2 groups"),
    "reflect": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "it pads by 'reflect'"),
    "even same": (nn.Conv2d(4, 4, 2, padding="same"), IMAGE, "not symmetric"),
    "channels": (nn.Conv2d(3, 4, 2), IMAGE, "it takes 3 channels, got 4"),
    "too large": (nn.Conv2d(4, 4, 9), IMAGE, "does not fit"),
    "signal": (nn.Conv2d(4, 4, 2), SIGNAL, "it takes [N, C, H, W], got [N, 4, 9]"),
    "tracked": (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE, "tracks running statistics"),
    "norm shape": (nn.LayerNorm(7), IMAGE, "it takes [N, ..., 7], got [N, 4, 8, 6]"),
    "norm rank": (nn.BatchNorm2d(4), SIGNAL, "it does not take [N, 4, 9]"),
    "indices": (nn.MaxPool2d(2, return_indices=True), IMAGE, "returns indices"),
    "pool dilation": (nn.MaxPool2d(2, dilation=2), IMAGE, "its dilation is"),
    "one value": (nn.GroupNorm(4, 4), (4, 1, 1), "a group is one value"),
    "plain tensor": (Calls(lambda net, x: F.batch_norm(x, net.plain, net.plain)), IMAGE, "must be a buffer"),
    "mean of channels": (Calls(lambda net, x: x.mean(1)), IMAGE, "only means over height and width"),
    "mean of all": (Calls(lambda net, x: x.mean()), IMAGE, "only means over height and width"),
    "cat of batches": (Calls(lambda net, x: torch.cat([x, x])), IMAGE, "along the batch dimension"),
    "cat of shapes": (
        Calls(lambda net, x: torch.cat([x, F.max_pool2d(x, 2)], 1)),
        IMAGE,
        "differ outside of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rejects_with_reason(name: str) -> None:
    net, shape, reason = REFUSED[name]
    assert reason in reason_of(nn.Sequential(net), shape)
