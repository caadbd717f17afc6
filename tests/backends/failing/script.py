"""Runs with failing.cpp preloaded: an error is a MemoryError, nothing is lost, and the next call is
right."""

from __future__ import annotations

import ctypes
import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import _C

failing = ctypes.CDLL(None)
failing.failing_allocation_left.restype = failing.failing_threads_left.restype = ctypes.c_long
T, N, M = 5, 3, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2)).double()


def call(net: nn.Module, tasks: int = T) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    x, y, q, z = (torch.randn(tasks, n, 2, generator=numbers, dtype=torch.float64) for n in (N, N, M, M))
    wrt = ("params", "lr", "support_x", "query_y")
    rates = torch.tensor(0.1, dtype=torch.float64)
    found = fm.meta_gradient(
        net, dict(net.named_parameters()), (x, y), (q, z), loss="mse", lr=rates, steps=2, wrt=wrt
    )
    some: list[Any] = [found.loss, *found.grads.values(), found.lr, found.support_x, found.query_y]
    return some


def state(net: nn.Module) -> list[Any]:
    return [(name, id(p), p.detach().clone(), p.grad) for name, p in net.named_parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def allocations(first: bool, threads: int) -> int:
    """Fail one allocation after the other of a network's first call, or of a later one; how many
    there are."""
    torch.set_num_threads(threads)
    want = call(network())
    net = network()
    call(net)
    for n in itertools.count(1, 7 if first else 1):  # a first call is slow
        if first:
            net = network()
        _C.release_scratch()
        before = state(net)
        failing.failing_allocation(n)
        try:
            got = call(net)
        except MemoryError:
            got = []
        left = failing.failing_allocation_left()
        failing.failing_allocation(0)
        after = state(net)
        assert all(
            a[:2] == b[:2] and torch.equal(a[2], b[2]) and a[3] is b[3]
            for a, b in zip(before, after, strict=True)
        )
        if left > 0:  # there were fewer
            assert same(got, want)
            return n - 1
        assert not got or same(got, want), f"allocation {n} failed, and the answer is wrong"
        assert same(call(net), want), f"the call after allocation {n} failed is wrong"
    return 0


def threads() -> None:
    """Starts of threads fail: fewer run, with the same bits; later there are as many as were asked
    for."""
    torch.set_num_threads(1)
    nets = network(), nn.Sequential(nn.Linear(2, 300), nn.Tanh(), nn.Linear(300, 2)).double()
    want = [[call(net, tasks) for tasks in (1, 7)] for net in nets]
    torch.set_num_threads(6)
    for failures in (100, 3, 1, 0):  # no thread at all, then some of them
        for net, wanted in zip(nets, want, strict=True):
            failing.failing_threads(failures)
            got = [call(net, tasks) for tasks in (1, 7)]
            left = failing.failing_threads_left()
            failing.failing_threads(0)
            assert left < failures or failures == 0 or failures < 100, "no thread was started at all"
            assert all(map(same, got, wanted))


if __name__ == "__main__":
    if sys.argv[1] == "threads":
        threads()
    else:
        print(allocations(sys.argv[1] == "first", int(sys.argv[2])))
