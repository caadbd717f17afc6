"""Attributes of any type on a network: the call is right, on the backend that it allows."""

import collections
import datetime
import functools
import io
import itertools
import os
import random
import time
import types
import uuid
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fastmeta as fm


class _Slots:
    __slots__ = ("a", "b")


class _Hostile:
    """Raises wherever an object can be asked something."""

    __hash__ = None

    def __eq__(self, other):
        raise RuntimeError("compared")

    def __bool__(self):
        raise RuntimeError("tested")

    def __len__(self):
        raise RuntimeError("counted")

    def __repr__(self):
        raise RuntimeError("printed")


class _Masked(_Hostile):
    @property
    def __class__(self):
        raise RuntimeError("asked for its class")

    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name}")


class _Pretender:
    __class__ = torch.Tensor


class _AlwaysEqual:
    def __eq__(self, other):
        return True

    __hash__ = object.__hash__


class _Frame:
    """As pandas: == gives an array."""

    def __init__(self):
        self.values = np.arange(3.0)

    def __eq__(self, other):
        return self.values == other.values

    __hash__ = None


def _cyclic():
    items = [1]
    items.append({"self": items})
    return items


def _deep():
    nested = []
    for _ in range(3000):
        nested = [nested]
    return nested


ATTRIBUTES = {
    "numpy-method": lambda: np.random.random,
    "generator-method": lambda: np.random.default_rng(0).normal,
    "random-method": lambda: random.Random(0).random,
    "dict-method": lambda: {"a": 1}.get,
    "list-method": lambda: [].append,
    "slots": _Slots,
    "slots-method": lambda: types.MethodType(lambda self: 1, _Slots()),
    "hostile": _Hostile,
    "hostile-in-list": lambda: [1, _Hostile()],
    "hostile-in-dict": lambda: {"a": (_Hostile(),)},
    "masked": _Masked,
    "masked-in-list": lambda: [_Masked()],
    "pretender": _Pretender,
    "always-equal": _AlwaysEqual,
    "array": lambda: np.arange(6.0),
    "arrays": lambda: {"a": [np.arange(6.0), np.nan]},
    "array-of-objects": lambda: np.array([None, "a"], dtype=object),
    "frame": _Frame,
    "nan": lambda: float("nan"),
    "nans": lambda: [float("nan"), {"a": float("nan")}],
    "cyclic": _cyclic,
    "deep": _deep,
    "huge": lambda: list(range(300_000)),
    "partial": lambda: functools.partial(np.add, np.ones(2)),
    "partialmethod": lambda: functools.partialmethod(max, 1),
    "lru-cache": lambda: functools.lru_cache(lambda: 1),
    "singledispatch": lambda: functools.singledispatch(lambda a: a),
    "deque": lambda: collections.deque([1, 2], 5),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "counter": lambda: collections.Counter("aab"),
    "mapping-proxy": lambda: types.MappingProxyType({"a": 1}),
    "dict-keys": lambda: {"a": 1}.keys(),
    "memoryview": lambda: memoryview(b"abc"),
    "bytearray": lambda: bytearray(b"abc"),
    "iterator": lambda: iter([1, 2]),
    "python-generator": lambda: (i for i in range(3)),
    "cycle-next": lambda: itertools.cycle([1]).__next__,
    "generator": lambda: torch.Generator(),
    "proxy": lambda: weakref.proxy(_AlwaysEqual()),  # dead at once
    "weak-set": lambda: weakref.WeakSet(),
    "ufunc": lambda: np.add,
    "class-method": lambda: collections.OrderedDict.fromkeys,
    "bound-class-method": lambda: datetime.datetime.now,
    "complex": lambda: complex("nan"),
    "lock": lambda: __import__("threading").Lock(),
    "file": lambda: io.StringIO("abc"),
    "tensor-method": lambda: torch.ones(2).add,
    "size": lambda: torch.Size([1, 2]),
    "stream-of-uuids": lambda: uuid.uuid4,
    "clock": lambda: time.time,
}


def _problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 2, 4, 1, dtype=torch.float64, generator=generator)
    return x[0], y[0], x[1], y[1]


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _gradient(net, backend="auto"):
    net.zero_grad()
    out = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)(*_problem())
    out.loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("place", ["network", "layer", "class"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_network_with_odd_attribute_matches_reference(name, place):
    expected = _gradient(_net(), "reference")
    net, value = _net(), ATTRIBUTES[name]()
    if place == "class":
        net.__class__ = type("Odd", (nn.Sequential,), {"odd": value})
    else:
        object.__setattr__(net if place == "network" else net[1], "odd", value)
    for _ in range(2):
        torch.testing.assert_close(_gradient(net), expected, rtol=1e-9, atol=1e-12)
    if name in ("numpy-method", "slots", "array", "huge"):
        said = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2).explain(*_problem())
        assert "cannot watch" in str(said)


@pytest.mark.parametrize("name", ["array", "hostile", "nan", "frame", "always-equal"])
def test_replaced_odd_attribute_is_noticed(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.odd, self.scale = nn.Linear(3, 1).double(), ATTRIBUTES[name](), 1.0

        def forward(self, x):
            return self.linear(x) * self.scale

    net = Scaled()
    first = _gradient(net)
    net.odd, net.scale = ATTRIBUTES[name](), 3.0
    torch.testing.assert_close(_gradient(net), _gradient(net, "reference"), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(_gradient(net), first)


@pytest.mark.parametrize(
    "draw",
    [time.time, os.urandom, uuid.uuid4, random.SystemRandom(1).random],
    ids=["time", "urandom", "uuid4", "random"],
)
def test_forward_that_reads_entropy_is_not_captured(draw):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.held = nn.Linear(3, 1).double(), [draw]

        def forward(self, x):
            return self.linear(x) * (1.0 + 0 * len(str(draw)))

    class Holds(Reads):
        def forward(self, x):
            return super().forward(x)

    for kind in (Reads, Holds):
        said = fm.MAML(kind(), loss="mse", inner_lr=0.1, inner_steps=1).explain(*_problem())
        assert said.backend == "torch"
        assert "clock or entropy" in str(said)
