"""Convolutions of the cpu backend alone: `pytest bench/test_conv2d.py` (needs pytest-benchmark).

Eight equal convolutions without anything between them, so that copies in and out of the engine's
layout hardly count. `share of peak` is that of the multiply-add peak measured in the same process.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import _C

LAYERS = 8
#: channels, height = width, examples
SIZES = [(64, 28, 5), (64, 28, 25), (64, 14, 5), (64, 14, 25), (64, 7, 25), (32, 42, 5)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _network(channels: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(LAYERS)]
    net = nn.Sequential(*layers)
    return net, {name: value.detach() for name, value in net.named_parameters()}


def _record(benchmark: BenchmarkFixture, convolutions: int, channels: int, size: int, examples: int) -> None:
    if benchmark.stats is None:
        return
    flops = 2.0 * convolutions * examples * size**2 * 9 * channels**2
    rate = flops / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GFLOP/s"] = round(rate, 1)
    benchmark.extra_info["share of peak"] = round(rate / _C.fma_peak("float32", 1), 3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(benchmark: BenchmarkFixture, size: tuple[int, int, int]) -> None:
    channels, side, examples = size
    net, params = _network(channels)
    x = torch.randn(1, examples, channels, side, side)
    out = benchmark(lambda: fm.task_forward(net, params, x, backend="cpu"))
    assert torch.allclose(out[0], net(x[0]), rtol=1e-3, atol=1e-5)
    _record(benchmark, LAYERS, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(benchmark: BenchmarkFixture, size: tuple[int, int, int]) -> None:
    channels, side, examples = size
    net, params = _network(channels)
    x = torch.randn(1, examples, channels, side, side)
    one = (x[:, :1], x[:, :1])
    grads = benchmark(
        lambda: fm.meta_gradient(net, params, one, (x, x), loss="mse", lr=0.0, steps=0, backend="cpu").grads
    )
    want = torch.autograd.grad(nn.functional.mse_loss(net(x[0]), x[0]), list(net.parameters()))
    assert all(torch.allclose(g, w, rtol=1e-2, atol=1e-6) for g, w in zip(grads.values(), want, strict=True))
    _record(benchmark, 3 * LAYERS - 1, *size)
