"""No cache grows with the number of calls, and none keeps a network alive."""

import gc
import random
import tracemalloc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.bounded import Bounded, Known
from fastmeta.capture import capture
from fastmeta.network.generators import generators_of
from fastmeta.problem import Scratch


def test_least_recently_used_goes_first():
    gone = []
    kept = Bounded(3, 10, lambda value: value, gone.append)
    for value in (1, 2, 3):
        kept.put(str(value), value)
    kept.used("1")
    kept.used("never there")
    kept.put("4", 4)
    assert gone == [2]
    assert kept.get("2") is None
    assert len(kept) == 3
    kept.put("9", 9)  # 3 and 1 and 4 would make 17
    assert gone == [2, 3, 1, 4]
    assert len(kept) == 1
    kept.put("20", 20)  # more than all may weigh, and the newest stays
    assert kept.get("20") == 20
    assert len(kept) == 1
    kept.put("20", 1)
    kept.put("5", 5)
    assert len(kept) == 2
    kept.drop("5")
    kept.drop("never there")
    assert len(kept) == 1


def test_what_is_known_goes_with_the_network():
    known, net = Known(2), nn.Linear(1, 1)
    for key in range(5):
        known.put(net, key, key)
    assert [known.get(net, 4), known.get(net, 0), known.get(nn.Linear(1, 1), 4)] == [4, None, None]
    del net
    assert len(known) == 0


def test_captures_of_3000_shapes_stay_small(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    traced = capture.traced(net)
    monkeypatch.setattr(
        capture, "traced", lambda _: traced
    )  # three milliseconds each, and the same for all shapes
    tracemalloc.start()
    try:
        for height in range(3000):
            program, reason = capture.captured(net, (1, height % 50 + 10, height // 50 + 10), torch.float32)
            assert program is not None, reason
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 << 20
    last = capture.captured(net, (1, 2999 % 50 + 10, 2999 // 50 + 10), torch.float32)[0]
    assert last is program


def test_calls_of_many_shapes_stay_right(monkeypatch):
    monkeypatch.setattr("fastmeta.ops.plan._MOST_PLANS", 3)
    monkeypatch.setattr(capture, "_MOST_CAPTURES", 3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    for backend in ("auto", "torch"):
        maml = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend=backend)
        for examples in (*range(2, 9), *range(2, 9)):
            x = torch.randn(2, examples, 4, 2, dtype=torch.float64)
            y = torch.randn(2, examples, 4, 1, dtype=torch.float64)
            expected = fm.MAML(net, loss="mse", inner_lr=0.1, inner_steps=2, backend="reference")(x, y, x, y)
            torch.testing.assert_close(maml(x, y, x, y).loss, expected.loss, rtol=1e-9, atol=0)


class _Closed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.rng, self.scale = random.Random(1), lambda x: x * self.linear.bias.numel()

    def forward(self, x):
        return self.scale(self.linear(x)) + 0 * self.rng.random()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 1), _Closed])
def test_deleted_network_is_freed(make, backend):
    net = make()
    maml = fm.MAML(net, loss=lambda o, y: F.mse_loss(o, y), inner_lr=0.1, inner_steps=2, backend=backend)
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    maml(x, y, x, y).loss.backward()
    adapted = fm.inner_sgd(net, dict(net.named_parameters()), x, y, loss="mse", lr=0.1, steps=1)
    sum(value.sum() for value in adapted.values()).backward()
    generators_of(net)
    gone = weakref.ref(net)
    del net, maml, adapted
    gc.collect()
    assert gone() is None


def test_static_tensors_of_triton_plans_are_given_back(monkeypatch):
    pytest.importorskip("triton")
    from fastmeta.backends.triton import run as runs

    monkeypatch.setattr(runs, "_MOST_BYTES", 100)
    monkeypatch.setattr(runs, "_kept", {})

    def plan(size):
        job = SimpleNamespace(
            device=torch.device("cpu"), step=SimpleNamespace(memory=SimpleNamespace(bytes=size))
        )
        scratch = Scratch(triton=job)
        runs.keep(scratch, job)
        return scratch, job

    first, second = plan(40), plan(40)
    runs.used(*first)
    third = plan(40)
    assert [len(scratch) for scratch, _ in (first, second, third)] == [1, 0, 1]
    del first
    gc.collect()
    fourth = plan(60)
    assert [len(scratch) for scratch, _ in (third, fourth)] == [1, 1]
