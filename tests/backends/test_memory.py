"""Memory: nothing grows over many steps, and "recompute" keeps K + 1 parameter sets and one step's
activations."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
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
from fastmeta.verify.problems import problem_of

NO_EXTENSION = pytest.mark.skipif(
    os.environ.get("FASTMETA_NO_EXT") == "1", reason="FASTMETA_NO_EXT=1: no extension"
)
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")

STEPS = 10_000
#: A leak of 64 bytes a step would be 640 KB; the allocators' own noise is below this.
GROWTH = 512 * 1024


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _net() -> nn.Module:
    return mlp((1, 8, 8, 1), "tanh")


def _episode() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(4, 5, 1) for _ in range(4))


def steps_of_maml() -> Callable[[], object]:
    maml = fm.MAML(_net(), loss="mse", inner_lr=0.01, inner_steps=2, learn_lr="tensor", backend="cpu")
    optimizer = torch.optim.SGD(maml.parameters(), lr=1e-3)
    episode = _episode()

    def step() -> None:
        optimizer.zero_grad()
        maml(*episode).loss.backward()
        optimizer.step()

    return step


def steps_of_meta_gradient() -> Callable[[], object]:
    net = _net()
    params = {name: value.detach() for name, value in net.named_parameters()}
    support_x, support_y, query_x, query_y = _episode()
    support, query = (support_x, support_y), (query_x, query_y)
    return lambda: fm.meta_gradient(net, params, support, query, loss="mse", lr=0.01, steps=2, backend="cpu")


def growth(way: str) -> int:
    """Bytes that `STEPS` steps add to a process that has done some before."""
    step = {"MAML": steps_of_maml, "meta_gradient": steps_of_meta_gradient}[way]()
    for _ in range(STEPS // 5):
        step()
    gc.collect()
    before = _resident()
    for _ in range(STEPS):
        step()
    gc.collect()
    return _resident() - before


def _alone(expression: str) -> int:
    """The value of an expression of this file's names, in a process of its own.

    What other tests left in the allocators would move the level.
    """
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_memory; "
    code += f"print(test_memory.{expression})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@LINUX
@NO_EXTENSION
@pytest.mark.parametrize("way", ["meta_gradient", "MAML"])
def test_memory_does_not_grow_over_many_steps(way: str) -> None:
    assert _alone(f"growth({way!r})") <= GROWTH


@NO_EXTENSION
def test_nothing_is_kept_of_networks_that_are_gone() -> None:
    """Captures and plans are cached by network and shapes."""
    torch.manual_seed(0)  # one output in float32 may be as near to zero as the captured network's rounding is

    def step(i: int) -> weakref.ref[nn.Module]:
        net = _net()
        maml = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=1 + i % 3, backend="cpu")
        maml(*(tensor[:, : 1 + i % 5] for tensor in _episode())).loss.backward()
        return weakref.ref(net)

    for i in range(30):
        step(i)
    gc.collect()
    before = len(gc.get_objects())
    nets = [step(i) for i in range(200)]
    gc.collect()
    assert [net for net in nets if net() is not None] == []
    # One object kept of every network would be 200, besides the references here; caches of fixed
    # size may still fill.
    assert len(gc.get_objects()) - before - len(nets) < 100


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


BIG = Case("big", partial(mlp, (64, 512, 512, 4)), (64,), 1, 8, 8, memory="recompute", wrt_inputs=False)
PARAMS = frozenset({"params"})


def measured(steps: int) -> int:
    """Bytes that the first call with big matrices adds to a process that has made a small one."""
    torch.set_num_threads(1)
    cpu = backends.get("cpu")
    cpu.solve(problem_of(WIDE, torch.float32, 0), PARAMS, False)
    problem = problem_of(replace(BIG, steps=steps), torch.float32, 0)
    before = _resident()
    cpu.solve(problem, PARAMS, False)
    return _resident() - before


@LINUX
@NO_EXTENSION
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_measured_memory_of_recompute_is_what_is_reported(steps: int) -> None:
    cpu = backends.get("cpu")
    problem = problem_of(replace(BIG, steps=steps), torch.float32, 0)
    reported = cpu.workspace_bytes(problem, PARAMS)
    gradient = sum(value.numel() * value.element_size() for value in problem.params.values())
    one_set = cpu.parameter_set_bytes(problem)
    # Two megabytes for whatever a first call loads: less than two of the sets that are counted.
    assert abs(_alone(f"measured({steps})") - reported - gradient) <= 2 << 20
    assert 2 * one_set > 2 << 20
