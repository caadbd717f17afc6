"""Captured programs, run by a tiny interpreter, against the modules they were captured from."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from capturing import Forward, check, reason_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

MODULES = [
    (nn.ReLU(), "relu", ()),
    (nn.LeakyReLU(), "leaky_relu", (0.01,)),
    (nn.LeakyReLU(0.3), "leaky_relu", (0.3,)),
    (nn.ELU(), "elu", (1.0,)),
    (nn.ELU(alpha=2), "elu", (2.0,)),
    (nn.GELU(), "gelu", ()),
    (nn.GELU("tanh"), "gelu_tanh", ()),
    (nn.SiLU(), "silu", ()),
    (nn.Tanh(), "tanh", ()),
    (nn.Sigmoid(), "sigmoid", ()),
    (nn.Softplus(), "softplus", (1.0, 20.0)),
    (nn.Softplus(3, 2), "softplus", (3.0, 2.0)),
]


@pytest.mark.parametrize(("module", "function", "constants"), MODULES, ids=str)
def test_elementwise_module_matches_reference(module, function, constants):
    (layer,) = check(nn.Sequential(module)).layers
    assert (layer.kind, layer.function, layer.constants) == ("elementwise", function, constants)


ELEMENTWISE_CALLS = {
    "torch.relu": (torch.relu, "relu", ()),
    "relu keyword": (lambda x: torch.relu(input=x), "relu", ()),
    "F.relu": (F.relu, "relu", ()),
    "x.relu": (lambda x: x.relu(), "relu", ()),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu", (0.01,)),
    "F.leaky_relu positional": (lambda x: F.leaky_relu(x, 0.2), "leaky_relu", (0.2,)),
    "F.leaky_relu keyword": (lambda x: F.leaky_relu(x, negative_slope=0.2), "leaky_relu", (0.2,)),
    "F.elu": (F.elu, "elu", (1.0,)),
    "F.elu alpha": (lambda x: F.elu(x, alpha=0.5), "elu", (0.5,)),
    "F.gelu": (F.gelu, "gelu", ()),
    "F.gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", ()),
    "F.silu": (F.silu, "silu", ()),
    "torch.tanh": (torch.tanh, "tanh", ()),
    "F.tanh": (F.tanh, "tanh", ()),
    "x.tanh": (lambda x: x.tanh(), "tanh", ()),
    "torch.sigmoid": (torch.sigmoid, "sigmoid", ()),
    "x.sigmoid": (lambda x: x.sigmoid(), "sigmoid", ()),
    "F.softplus": (F.softplus, "softplus", (1.0, 20.0)),
    "F.softplus keyword": (lambda x: F.softplus(x, threshold=2, beta=3), "softplus", (3.0, 2.0)),
    "torch.sin": (torch.sin, "sin", ()),
    "x.sin": (lambda x: x.sin(), "sin", ()),
    "30 * x": (lambda x: 30.0 * x, "affine", (30.0, 0.0)),
    "x * 2": (lambda x: x * 2, "affine", (2.0, 0.0)),
    "x.mul": (lambda x: x.mul(2), "affine", (2.0, 0.0)),
    "torch.mul": (lambda x: torch.mul(x, other=2), "affine", (2.0, 0.0)),
    "x / 4": (lambda x: x / 4, "affine", (0.25, 0.0)),
    "x.div": (lambda x: x.div(8), "affine", (0.125, 0.0)),
    "torch.div": (lambda x: torch.div(x, 3.0), "affine", (1 / 3, 0.0)),
    "x + 1": (lambda x: x + 1, "affine", (1.0, 1.0)),
    "1 + x": (lambda x: 1 + x, "affine", (1.0, 1.0)),
    "x.add": (lambda x: x.add(1.5), "affine", (1.0, 1.5)),
    "torch.add": (lambda x: torch.add(x, 1.5), "affine", (1.0, 1.5)),
    "x - 2": (lambda x: x - 2, "affine", (1.0, -2.0)),
    "2 - x": (lambda x: 2 - x, "affine", (-1.0, 2.0)),
    "torch.sub": (lambda x: torch.sub(x, 2), "affine", (1.0, -2.0)),
    "torch.rsub": (lambda x: torch.rsub(x, 2), "affine", (-1.0, 2.0)),
    "-x": (lambda x: -x, "affine", (-1.0, 0.0)),
    "torch.neg": (torch.neg, "affine", (-1.0, 0.0)),
    "x * sqrt(width)": (lambda x: x * math.sqrt(x.shape[1]), "affine", (math.sqrt(6), 0.0)),
    "x / width": (lambda x: x / x.size(-1), "affine", (1 / 6, 0.0)),
}


@pytest.mark.parametrize("name", ELEMENTWISE_CALLS)
def test_elementwise_call_matches_reference(name):
    call, function, constants = ELEMENTWISE_CALLS[name]
    (layer,) = check(Forward(lambda net, x: call(x))).layers
    assert (layer.kind, layer.function, layer.constants) == ("elementwise", function, constants)


INPLACE = {
    "nn.ReLU": nn.ReLU(inplace=True),
    "nn.ELU": nn.ELU(inplace=True),
    "nn.SiLU": nn.SiLU(inplace=True),
    "F.relu_": F.relu_,
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "F.elu_": F.elu_,
    "torch.sin_": torch.sin_,
    "x.tanh_": lambda x: x.tanh_(),
    "x.mul_": lambda x: x.mul_(2),
    "x.neg_": lambda x: x.neg_(),
    "x.sub_": lambda x: x.sub_(2),
    "x.add_": lambda x: x.add_(torch.relu(x)),
}


def plus_one(x: Tensor) -> Tensor:
    x += 1
    return x


def halved(x: Tensor) -> Tensor:
    x -= 1
    x *= 3
    x /= 2
    return x


INPLACE |= {"x += 1": plus_one, "x -= 1, *= 3, /= 2": halved}


@pytest.mark.parametrize("name", INPLACE)
def test_inplace_matches_reference(name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(6, 6), INPLACE[name]

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.act(self.fc(x)))

    check(Net())


@pytest.mark.parametrize("name", INPLACE)
def test_rejects_inplace_on_what_is_read_later(name):
    def forward(net: Forward, x: Tensor) -> Tensor:
        hidden = net.fc(x)
        view = hidden.view(-1, 2, 3)
        return net.act(hidden) + view.view(-1, 6)

    net = Forward(forward)
    net.act = INPLACE[name]
    assert "an in-place operator has overwritten" in reason_of(net)
    net.function = lambda net, x: net.act(x.contiguous())
    assert "modifies the network's own input" in reason_of(net)


def test_inplace_on_a_fresh_value_keeps_what_it_came_from():
    def forward(net: Forward, x: Tensor) -> Tensor:
        hidden = net.fc(x)
        out = torch.sin(hidden)
        out += hidden
        return F.relu_(out) + hidden

    check(Forward(forward))


RESHAPES = {
    "nn.Flatten": (nn.Flatten(), (24,)),
    "nn.Flatten(2)": (nn.Flatten(2), (2, 12)),
    "nn.Flatten(1, -2)": (nn.Flatten(1, -2), (6, 4)),
    "nn.Unflatten": (nn.Unflatten(2, (3, 1)), (2, 3, 1, 4)),
    "nn.Unflatten -1": (nn.Unflatten(-1, (-1, 2)), (2, 3, 2, 2)),
    "torch.flatten": (lambda x: torch.flatten(x, 1), (24,)),
    "x.flatten": (lambda x: x.flatten(start_dim=-2), (2, 12)),
    "view size": (lambda x: x.view(x.size(0), -1), (24,)),
    "view shape": (lambda x: x.view(x.shape[0], 4, 6), (4, 6)),
    "view -1 first": (lambda x: x.view(-1, 24), (24,)),
    "view tuple": (lambda x: x.view((-1, 12, 2)), (12, 2)),
    "view arithmetic": (lambda x: x.view(-1, x.shape[1] * x.shape[2], x.size(3)), (6, 4)),
    "view Size": (lambda x: x.view(operator.add(x.shape[:2], (12,))), (2, 12)),
    "reshape": (lambda x: x.reshape(x.size()[0], 3, 8), (3, 8)),
    "torch.reshape": (lambda x: torch.reshape(x, (x.shape[0], 24)), (24,)),
    "math.prod": (lambda x: x.view(-1, math.prod(x.shape[1:])), (24,)),
    "unflatten": (lambda x: x.unflatten(3, (2, 2)), (2, 3, 2, 2)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (1, 2, 3, 4)),
    "unsqueeze -1": (lambda x: x.unsqueeze(-1).squeeze(2), (2, 3, 4, 1)),
    "squeeze": (lambda x: x.view(-1, 24, 1).squeeze(-1), (24,)),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshape_matches_reference(name):
    call, shape = RESHAPES[name]
    net = call if isinstance(call, nn.Module) else Forward(lambda net, x: call(x))
    program = check(net, (2, 3, 4))
    assert program.output_shape == shape
    assert {layer.kind for layer in program.layers} == {"reshape"}


BATCH_LOST = {
    "flatten": lambda x: x.flatten(),
    "flatten(0, 1)": lambda x: torch.flatten(x, 0, 1),
    "view fixed": lambda x: x.view(7, 24),
    "view merged": lambda x: x.view(-1, 4),
    "view split": lambda x: x.view(x.size(0), 2, -1, 5),
    "view batch arithmetic": lambda x: x.view(x.size(0) * 2, -1),
    "view two unknown": lambda x: x.view(-1, 2, -1),
    "squeeze all": lambda x: x.squeeze(),
    "squeeze batch": lambda x: x.squeeze(0),
    "unsqueeze batch": lambda x: x.unsqueeze(0),
    "unflatten batch": lambda x: x.unflatten(0, (-1, 1)),
}


@pytest.mark.parametrize("name", BATCH_LOST)
def test_rejects_reshape_that_moves_the_batch(name):
    assert "cannot capture `" in reason_of(Forward(lambda net, x: BATCH_LOST[name](x)), (2, 3, 4))


def test_linear_matches_reference():
    assert check(nn.Linear(6, 3)).layers[0].params == ("weight", "bias")
    assert check(nn.Linear(6, 3, bias=False)).layers[0].params == ("weight", None)
    assert check(nn.Linear(6, 3), (2, 5, 6)).output_shape == (2, 5, 3)
    program = check(Forward(lambda net, x: F.linear(x, net.fc.weight, net.fc.bias)))
    assert program.layers[0].params == ("fc.weight", "fc.bias")
    assert check(Forward(lambda net, x: F.linear(x, net.listed[0]))).layers[0].params == ("weight", None)
    program = check(Forward(lambda net, x: F.linear(x, bias=net.fc.bias, weight=net.weight)))
    assert program.layers[0].params == ("weight", "fc.bias")


def test_nothing_is_emitted_for_identities():
    assert check(nn.Identity()).layers == ()
    assert check(nn.Identity()).output_shape == (6,)
    assert check(nn.Sequential(nn.Dropout(0.5), nn.Identity()).eval()).layers == ()
    assert check(nn.Dropout(0.0)).layers == ()
    assert check(Forward(lambda net, x: F.dropout(x.contiguous(), training=False))).layers == ()
    assert check(Forward(lambda net, x: x)).output == 0


def test_tied_parameters_have_one_name():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    net[3] = net[0]
    program = check(net)
    assert [layer.params for layer in program.layers if layer.kind == "linear"] == [
        ("0.weight", "0.bias"),
        ("0.weight", "2.bias"),
        ("0.weight", "0.bias"),
    ]
    assert [name for name, _ in program.params] == ["0.weight", "0.bias", "2.bias"]


def test_residual_network_matches_reference():
    def forward(net: Forward, x: Tensor) -> Tensor:
        hidden = torch.add(x, net.fc(x))
        hidden = hidden.add(F.relu(net.fc(hidden))) + hidden
        return hidden + hidden

    program = check(Forward(forward))
    assert program.layers[-1].inputs == (len(program.layers) - 1,) * 2
    assert check(Forward(lambda net, x: sum([net.fc(x), x]))).layers[-1].kind == "add"


def test_dead_layers_are_removed_and_unused_parameters_kept():
    program = check(Forward(lambda net, x: (torch.tanh(x), torch.sin(net.fc(x)))[0]))
    assert [layer.function for layer in program.layers] == ["tanh"]
    assert program.params == (("weight", (6, 6)), ("fc.weight", (6, 6)), ("fc.bias", (6,)))


def test_forward_defaults_and_nested_calls_are_followed():
    class Inner(nn.Linear):
        def forward(self, x: Tensor, scale: float = 2.0, *, extra: Tensor | None = None) -> Tensor:
            return super().forward(x) * scale if extra is None else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner(6, 6)

        def forward(self, *args: Tensor, power: int = 1) -> Tensor:
            return self.inner(args[0], scale=3.0**self.inner.in_features) / power

    program = check(Outer())
    assert program.layers[0].params == ("inner.weight", "inner.bias")
    assert program.layers[1].constants == (729.0, 0.0)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return out


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Random Sequential networks with residual blocks."""
    shape, parts = (3, 4), []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(("linear", "elementwise", "residual", "flatten", "unflatten", "dropout")))
        if kind == "linear":
            width = draw(st.integers(1, 7))
            parts.append(nn.Linear(shape[-1], width, bias=draw(st.booleans())))
            shape = (*shape[:-1], width)
        elif kind == "elementwise":
            parts.append(draw(st.sampled_from(MODULES))[0])
        elif kind == "residual":
            body = nn.Sequential(nn.Linear(shape[-1], 5), nn.Tanh(), nn.Linear(5, shape[-1]))
            parts.append(Residual(body))
        elif kind == "flatten":
            parts.append(nn.Flatten())
            shape = (math.prod(shape),)
        elif kind == "unflatten":
            parts.append(nn.Unflatten(1, (1, shape[0])))
            shape = (1, *shape)
        else:
            parts.append(nn.Dropout(0.0))
    return nn.Sequential(*parts)


@settings(max_examples=60, deadline=None)
@given(net=networks(), seed=st.integers(0, 1000))
def test_random_network_matches_reference(net, seed):
    torch.manual_seed(seed)
    check(net, (3, 4))
