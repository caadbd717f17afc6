"""What capture refuses, with which reason."""

from __future__ import annotations

import collections.abc
import copy
import random

import numpy as np
import pytest
import torch
from capturing import Forward, reason_of
from torch import nn
from torch.nn import functional as F

from fastmeta.capture.capture import captured


class Reverse(torch.autograd.Function):
    """Gradient reversal: its forward looks like nothing at all."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def count(net, x):
    net.count += 1
    return net.fc(x)


def without_gradient(net, x):
    with torch.no_grad():
        return net.fc(x)


def set_data(net, x):
    hidden = net.fc(x)
    hidden.data = 2 * hidden
    return hidden


def caught(net, x):
    try:
        return x if x.sum() > 0 else -x
    except Exception:
        return net.fc(x)


REFUSALS = {
    # operators that no layer stands for
    "cumsum": (
        lambda net, x: torch.cumsum(x, 1),
        "cannot capture `torch.cumsum` (node cumsum, called in net)",
    ),
    "relu6": (lambda net, x: F.relu6(x), "`torch.nn.functional.relu6` (node relu6, called in net)"),
    "method": (lambda net, x: x.clamp(0), "`Tensor.clamp` (node clamp, called in net)"),
    "power": (lambda net, x: x**2, "`operator.pow`"),
    "matmul": (lambda net, x: x @ net.fc.weight.t(), "`Tensor.t`"),
    "product": (lambda net, x: x.unsqueeze(1) * x.unsqueeze(2), "broadcast [N, 1, 6] and [N, 6, 1]"),
    "difference": (lambda net, x: net.fc(x) - x, "`operator.sub`"),
    "alpha": (lambda net, x: torch.add(x, x, alpha=2), "alpha must be 1, got 2"),
    "broadcast": (lambda net, x: x.unsqueeze(1) + x.unsqueeze(2), "broadcast [N, 1, 6] and [N, 6, 1]"),
    "cast": (lambda net, x: x.float(), "`Tensor.float`"),
    "detach": (lambda net, x: net.fc(x).detach(), "`Tensor.detach`"),
    "attribute": (lambda net, x: x.T, "the attribute `T` of a tensor"),
    "index": (lambda net, x: x[:, 0], "`operator.getitem`"),
    "out": (lambda net, x: torch.sin(x, out=x), "unexpected keyword argument 'out'"),
    "memory format": (lambda net, x: x.contiguous(memory_format=torch.channels_last), "memory_format"),
    "dead": (lambda net, x: (net.fc(x).retain_grad(), x)[1], "`Tensor.retain_grad`"),
    "tensor hook": (lambda net, x: (net.fc(x).register_hook(print), x)[1], "cannot trace"),
    # constants that are no finite numbers
    "complex": (lambda net, x: x * 1j, "a Python number was expected, got 1j"),
    "bool": (lambda net, x: x * True, "a Python number was expected, got True"),
    "infinite": (lambda net, x: x + float("inf"), "a finite number was expected, got inf"),
    "by zero": (lambda net, x: x / 0, "divides by 0"),
    "rounding": (lambda net, x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode=floor"),
    "batch size": (lambda net, x: x * x.shape[0], "got the batch size"),
    "batch arithmetic": (lambda net, x: x / (x.size(0) // 7), "arithmetic on the batch size"),
    "approximate": (lambda net, x: F.gelu(x, approximate="other"), "'none' or 'tanh'"),
    # tensors that are no parameters, or not used as ones
    "buffer": (lambda net, x: x + net.table, "it reads the tensor `net.table`, a buffer or constant"),
    "constant": (lambda net, x: x + net.plain, "a buffer or constant"),
    "buffer weight": (lambda net, x: F.linear(x, net.weight, net.table), "`net.table`"),
    "parameter": (lambda net, x: x * net.fc.bias, "got the parameter `fc.bias`"),
    "bias": (lambda net, x: F.linear(x, net.weight, net.weight), "the bias `weight` must be [6], got [6, 6]"),
    "vector weight": (
        lambda net, x: F.linear(x, net.fc.bias),
        "the weight `fc.bias` must be [O, I], got [6]",
    ),
    "value weight": (lambda net, x: F.linear(x, x), "the weight must be a parameter, got a traced tensor"),
    # values that would be baked in
    "item": (lambda net, x: x * net.scale.item(), "`net.scale`"),
    "float": (lambda net, x: x * float(net.plain[0]), "on nothing that is traced"),
    "parameter value": (lambda net, x: x * next(net.parameters()).sum().item(), "on nothing that is traced"),
    "random tensor": (lambda net, x: x * torch.rand(()), "it calls `torch.rand`"),
    "random": (lambda net, x: x * random.random(), "draws random numbers"),
    "numpy random": (lambda net, x: x * np.random.rand(), "draws random numbers"),  # noqa: NPY002
    # control flow and types
    "branch": (
        lambda net, x: x if x.sum() > 0 else net.fc(x),
        "cannot capture `Forward` (in net): its control flow",
    ),
    "rank": (lambda net, x: x if x.dim() == 2 else net.fc(x), "control flow"),
    "loop": (lambda net, x: sum(x), "iterates over a traced value"),
    "length": (lambda net, x: len(x) * x, "takes len() of a traced value"),
    "hidden branch": (caught, "its control flow depends on a traced value"),
    "isinstance": (lambda net, x: net.fc(x) if isinstance(x, torch.Tensor) else x, "tests the type"),
    "is_tensor": (lambda net, x: net.fc(x) if torch.is_tensor(x) else x, "tests the type"),
    "sequence": (
        lambda net, x: x if isinstance(x, collections.abc.Sequence) else net.fc(x),
        "tests the type",
    ),
    # what changes the gradient and not the value
    "no_grad": (without_gradient, "cannot capture `Forward` (in net)"),
    "autocast": (lambda net, x: torch.autocast("cpu")(net.fc)(x), "switches gradients or autocast"),
    "autograd function": (lambda net, x: Reverse.apply(net.fc(x)), "the autograd function `Reverse`"),
    "data": (set_data, "sets the attribute `data`"),
    # side effects, inputs and outputs
    "state": (count, "its forward sets attributes"),
    "tuple": (
        lambda net, x: (x, x),
        "the output of `Forward`: the network must return one traced tensor, got a tuple",
    ),
    "parameter output": (lambda net, x: net.weight, "got the parameter `weight`"),
    "size output": (lambda net, x: x.shape[0], "got the batch size"),
    "dropout": (lambda net, x: F.dropout(x), "dropout is on (training, p=0.5)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_rejects_with_reason(name):
    function, reason = REFUSALS[name]
    net = Forward(function)
    before = {key: copy.copy(value) for key, value in vars(net).items() if key != "function"}
    state = random.getstate(), torch.get_rng_state()
    assert reason in reason_of(net)
    assert net.count == 0
    assert before.keys() == vars(net).keys() - {"function"}
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_rejects_module_with_its_place():
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.ReLU6()))
    assert reason_of(net) == "cannot capture `nn.ReLU6` (net.1.1)"
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Forward(lambda net, x: x.cumsum(1))))
    assert reason_of(net) == "cannot capture `Tensor.cumsum` (node cumsum, called in net.1.0)"
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Forward(lambda net, x: x if x.sum() > 0 else -x)))
    assert "(in net.1.0): its control flow" in reason_of(net)
    assert reason_of(nn.Dropout(0.3)) == "cannot capture `nn.Dropout` (net): dropout is on (training, p=0.3)"


def test_rejects_wrong_input():
    assert reason_of(nn.Linear(5, 2)) == "cannot capture `nn.Linear` (net): it takes [N, ..., 5], got [N, 6]"
    assert reason_of(nn.Linear(1, 2), ()) == "cannot capture `nn.Linear` (net): it takes [N, ..., 1], got [N]"
    assert "not floating-point" in captured(nn.Linear(6, 2), (6,), torch.int64)[1]
    net = nn.Linear(6, 6)
    net.forward = torch.relu
    assert "its forward has been replaced on the instance" in reason_of(net)


def test_rejects_forward_of_two_inputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    assert "missing 1 required positional argument: 'y'" in reason_of(Two())
