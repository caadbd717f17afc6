"""What makes capture look at a network again, and refuse what it cannot watch."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from capturing import Forward, check, program_of, reason_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune


def pruned():
    net = nn.Linear(6, 6)
    prune.l1_unstructured(net, "weight", amount=0.5)
    return net


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    net = nn.Linear(6, 6)
    parametrize.register_parametrization(net, "weight", Doubled())
    return net


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "it has parametrizations"),
        (lambda: parametrizations.spectral_norm(nn.Linear(6, 6)), "it has parametrizations"),
        (parametrized, "it has parametrizations"),
        (pruned, "it has hooks"),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(6, 6)), "it has hooks"),
        (
            lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 6),
            "`nn.NonDynamicallyQuantizableLinear`",
        ),
        (lambda: torch.jit.trace(nn.Linear(6, 6), torch.ones(2, 6)), "it is a TorchScript module"),
    ],
)
def test_rejects_changed_linear(make, reason):
    assert reason in reason_of(nn.Sequential(make(), nn.Tanh()))
    assert reason in reason_of(make())


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(lambda *args: None),
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_full_backward_hook(lambda *args: None),
        lambda module: module.register_full_backward_pre_hook(lambda *args: None),
    ],
)
def test_rejects_hooks_while_they_are_there(register):
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    program = program_of(net)
    handle = register(net[1])
    assert reason_of(net) == "cannot capture `nn.Tanh` (net.1): it has hooks"
    handle.remove()
    assert program_of(net) is program


def test_rejects_global_hooks_while_they_are_there():
    net = nn.Linear(6, 6)
    program = program_of(net)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "global module hooks" in reason_of(net)
    finally:
        handle.remove()
    assert program_of(net) is program


def test_rejects_attributes_that_cannot_be_watched():
    net = Forward(lambda net, x: x * float(net.slopes[0]))
    net.slopes = np.ones(3)
    assert reason_of(net) == "cannot watch net.slopes (numpy.ndarray) for changes"


def test_same_program_while_nothing_changes():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    program = program_of(net)
    for parameter in net.parameters():
        parameter.data.add_(1)
        parameter.grad = torch.ones_like(parameter)
    assert program_of(net) is program
    net[0].weight = nn.Parameter(torch.zeros(6, 6))
    assert program_of(net) is program
    assert program_of(net.double()) is program
    assert program_of(net, (2, 6)) is not program
    assert program_of(net) is program
    assert program_of(net.eval()) is program
    assert program_of(copy.deepcopy(net)) == program


class Scaled(nn.Module):
    """Reads its attributes in every way that a guard follows."""

    base = 2.0
    options = SimpleNamespace(sign=1.0)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.act = nn.LeakyReLU(0.1)
        self.w0 = 3.0
        self.factors = [1.0, {"a": 2.0}]
        self.config = SimpleNamespace(shift=0.5)
        self.function = functools.partial(F.leaky_relu, negative_slope=0.3)
        self.method = self.twice
        self.register_buffer("mask", None)
        self.register_parameter("extra", None)
        self.again = 0

    def twice(self, x):
        return 2 * x

    def forward(self, x):
        x = (
            self.act(self.fc(x)) * self.w0 * self.factors[1]["a"] * self.base
            + self.config.shift * self.options.sign
        )
        x = self.method(self.function(x)) + self.factors[0]
        x = x if self.mask is None else x * self.mask
        x = x if self.extra is None else F.linear(x, self.extra)
        x = x if not self.training else -x
        for _ in range(self.again):
            x = self.fc(x)
        return x


def swap_class(net):
    class Other(Scaled):
        def twice(self, x):
            return 3 * x

    net.__class__ = Other
    net.method = net.twice


CHANGES = {
    "training": lambda net: net.eval(),
    "training of a child, then own": lambda net: (net.fc.eval(), setattr(net, "training", False)),
    "module attribute": lambda net: setattr(net.act, "negative_slope", 0.2),
    "attribute": lambda net: setattr(net, "w0", 4.0),
    "int attribute": lambda net: setattr(net, "again", 1),
    "list": lambda net: net.factors.__setitem__(0, 7.0),
    "nested": lambda net: net.factors[1].update(a=7.0),
    "object": lambda net: setattr(net.config, "shift", 7.0),
    "new object": lambda net: setattr(net, "config", SimpleNamespace(shift=7.0)),
    "partial": lambda net: net.function.keywords.update(negative_slope=0.7),
    "method": lambda net: setattr(net, "method", net.fc),
    "submodule": lambda net: setattr(net, "act", nn.Tanh()),
    "same submodule, other values": lambda net: setattr(net, "act", nn.LeakyReLU(0.2)),
    "parameter": lambda net: setattr(net, "extra", nn.Parameter(torch.randn(6, 6, dtype=torch.float64))),
    "new parameter": lambda net: setattr(net.act, "new", nn.Parameter(torch.randn(2))),
    "bias": lambda net: setattr(net.fc, "bias", None),
    "structure": lambda net: setattr(net, "fc", nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))),
    "class": swap_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_recaptures_on_change_of(name):
    net = Scaled()
    program = check(net)
    assert program_of(net) is program
    CHANGES[name](net)
    changed = check(net)
    assert changed != program
    assert program_of(net) is changed


def test_recaptures_on_change_of_the_class(monkeypatch):
    net = Scaled()
    program = check(net)
    monkeypatch.setattr(Scaled.options, "sign", -1.0)
    assert check(net) != program
    monkeypatch.setattr(Scaled, "options", SimpleNamespace(sign=1.0))
    assert check(net) is program
    monkeypatch.setattr(Scaled, "base", 5.0)
    assert check(net) != program
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.fc(x))
    assert len(check(net).layers) == 1


SCALE, TABLE = 1.0, {"scale": [1.0]}


class Settings:
    scale = 1.0


def doubled(x):
    return x * Settings.scale


def scaled_by(cell):
    return lambda x: x * cell[0]


class Outside(nn.Module):
    """Reads numbers from everywhere but itself."""

    def __init__(self):
        super().__init__()
        self.fc, self.cell = nn.Linear(6, 3), [1.0]
        self.closure = scaled_by(self.cell)
        self.itself = lambda x: x + self.fc.out_features

    @property
    def offset(self):
        return SCALE - 1.0

    def forward(self, x):
        return self.itself(self.closure(doubled(self.fc(x)))) * TABLE["scale"][0] + self.offset


CHANGES_OUTSIDE = {
    "global": lambda monkeypatch, net: monkeypatch.setitem(globals(), "SCALE", 2.0),
    "table": lambda monkeypatch, net: monkeypatch.setitem(TABLE, "scale", [2.0]),
    "class": lambda monkeypatch, net: monkeypatch.setattr(Settings, "scale", 2.0),
    "closure": lambda monkeypatch, net: net.cell.__setitem__(0, 2.0),
    "function": lambda monkeypatch, net: monkeypatch.setitem(globals(), "doubled", lambda x: 2 * x),
}


@pytest.mark.parametrize("name", CHANGES_OUTSIDE)
def test_recaptures_on_change_outside_of(name, monkeypatch):
    net = Outside()
    before = check(net)
    assert program_of(net) is before
    CHANGES_OUTSIDE[name](monkeypatch, net)
    assert check(net) is not before


def test_a_function_that_holds_the_network_does_not_keep_it_alive():
    net = Outside()
    program_of(net)
    dead = weakref.ref(net)
    del net
    gc.collect()
    assert dead() is None


def test_rejects_what_cannot_be_watched_outside(monkeypatch):
    monkeypatch.setitem(globals(), "TABLE", {"scale": np.ones(1)})
    assert "global `TABLE`" in reason_of(Outside())


def test_recaptures_on_change_of_buffer_presence():
    net = Scaled()
    program = check(net)
    net.mask = torch.zeros(6)
    assert "`net.mask`" in reason_of(net)
    net.mask = None
    assert program_of(net) is program


def test_recaptures_on_change_of_ties():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert [layer.params for layer in check(net).layers] == [("0.weight", "0.bias"), ("1.weight", "1.bias")]
    net[1].weight = net[0].weight
    assert [layer.params for layer in check(net).layers] == [("0.weight", "0.bias"), ("0.weight", "1.bias")]
    net[1].weight = nn.Parameter(net[0].weight.detach().clone())
    assert check(net).layers[1].params == ("1.weight", "1.bias")


def test_recaptures_on_change_of_ties_between_equal_scalars():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for parameter in net.parameters():
        parameter.data.zero_()
    assert program_of(net, (1,)).layers[1].params == ("1.weight", "1.bias")
    net[1].bias = net[0].bias
    assert program_of(net, (1,)).layers[1].params == ("1.weight", "0.bias")


def test_recaptures_on_change_of_shape_within_a_parameter():
    net = nn.Linear(6, 3)
    program = check(net)
    net.weight.data, net.bias.data = torch.randn(2, 6).double(), torch.randn(2).double()
    assert check(net).output_shape == (2,)
    assert program.output_shape == (3,)


def test_recaptures_when_parametrized():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    program_of(net)
    parametrizations.weight_norm(net[0])
    assert "it has parametrizations" in reason_of(net)


def test_dropout_is_captured_in_eval_mode_only():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    assert "dropout is on" in reason_of(net)
    check(net.eval())
    assert "dropout is on" in reason_of(net.train())
    net[1].p = 0.0
    assert len(check(net).layers) == 1


def test_capture_keeps_no_network_alive():
    net = Scaled()
    program_of(net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
