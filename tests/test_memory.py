"""Memory: nothing grows over many steps, and "recompute" keeps K + 1 parameter sets and one step's activations."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.verify.problems import problem_of, wanted

NO_EXTENSION = pytest.mark.skipif(os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension")
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")

STEPS = 10_000
#: A leak of 64 bytes a step would be 640 KB; the allocators' own noise is below this.
GROWTH = 512 * 1024


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return mlp((1, 8, 8, 1), "tanh")


def _episode(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 5, 1, generator=generator) for _ in range(4))


@LINUX
@NO_EXTENSION
@pytest.mark.parametrize("way", ["meta_gradient", "MAML"])
def test_memory_does_not_grow_over_many_steps(way: str) -> None:
    net = _net()
    maml = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=2, learn_lr="tensor", backend="cpu")
    optimizer = torch.optim.SGD(maml.parameters(), lr=1e-3)
    support_x, support_y, query_x, query_y = episode = _episode()
    params = {name: value.detach() for name, value in net.named_parameters()}

    def step() -> None:
        if way == "MAML":
            optimizer.zero_grad()
            maml(*episode).loss.backward()
            optimizer.step()
        else:
            fm.meta_gradient(
                net, params, (support_x, support_y), (query_x, query_y), loss="mse", lr=0.01, steps=2, backend="cpu"
            )

    for _ in range(STEPS // 5):
        step()
    before = _resident()
    for _ in range(STEPS):
        step()
    assert _resident() - before <= GROWTH


@LINUX
@NO_EXTENSION
def test_memory_does_not_grow_with_new_networks_and_shapes() -> None:
    """Plans are cached by network: those of networks that are gone must go too."""

    def step(i: int) -> None:
        maml = fm.MAML(_net(), loss="mse", inner_lr=0.01, inner_steps=1 + i % 3, backend="cpu")
        maml(*(tensor[:, : 1 + i % 5] for tensor in _episode())).loss.backward()

    for i in range(300):
        step(i)
    before = _resident()
    for i in range(600):
        step(i)
    assert _resident() - before <= GROWTH


WIDE = Case("wide", partial(mlp, (16, 64, 64, 4)), (16,), tasks=2, shots=10, queries=10, memory="recompute")


@NO_EXTENSION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_recompute_keeps_one_parameter_set_a_step(dtype: torch.dtype) -> None:
    cpu = backends.get("cpu")
    known = {}
    for steps in (1, 5, 50):
        problem = problem_of(replace(WIDE, steps=steps), dtype, 0)
        known[steps] = cpu.workspace_bytes(problem, frozenset({"params"}))
        one_set = cpu.parameter_set_bytes(problem)
        plain = sum(value.numel() * value.element_size() for value in problem.params.values())
        assert plain <= one_set <= 1.5 * plain
        assert known[steps] >= (steps + 1) * one_set
    assert known[5] - known[1] == 4 * one_set
    assert known[50] - known[5] == 45 * one_set


@NO_EXTENSION
def test_store_keeps_activations_too() -> None:
    cpu = backends.get("cpu")
    problem = problem_of(replace(WIDE, steps=5), torch.float32, 0)
    recompute = cpu.workspace_bytes(problem, frozenset({"params"}))
    store = cpu.workspace_bytes(replace(problem, memory="store", scratch={}), frozenset({"params"}))
    # Four more steps of 10 examples, each of at least the two hidden layers.
    assert store - recompute >= 4 * 10 * 2 * 64 * 4


@LINUX
@NO_EXTENSION
def test_measured_memory_of_recompute_is_what_is_reported(one_thread: None) -> None:
    """One worker, workspaces of tens of megabytes: the resident set grows by what `workspace_bytes` says."""
    from fastmeta import _C

    big = Case("big", partial(mlp, (64, 512, 512, 4)), (64,), 1, 8, 8, memory="recompute", wrt_inputs=False)
    cpu = backends.get("cpu")
    # Buffers of PyTorch's and of the allocator's own come with the first call of this size.
    problem = problem_of(replace(big, steps=1), torch.float32, 0)
    cpu.solve(problem, wanted(big, problem), False)
    for steps in (1, 5, 50):
        problem = problem_of(replace(big, steps=steps), torch.float32, 0)
        wrt = frozenset({"params"})
        reported = cpu.workspace_bytes(problem, wrt)
        _C.release_scratch()
        before = _resident()
        cpu.solve(problem, wrt, False)
        grown = _resident() - before
        assert _C.scratch_bytes() >= reported
        assert abs(grown - reported) <= 0.05 * reported + (4 << 20), steps
