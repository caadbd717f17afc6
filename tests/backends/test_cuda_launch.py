"""The host side of the cuda backend: on a driver that stands in for NVIDIA's, and on a GPU where
there is one."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import backends
from fastmeta.backends import cuda
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda import run as runs
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.problem import Problem
from fastmeta.verify import rule
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import quantities, relative_error

CASE = next(case for case in VERIFICATION if case.id == "tanh-T18-N3-M2-K2-mse")
STREAM = 77
SUCCESS = 0


class Driver(ModuleType):
    """As much of cuda.bindings.driver as is used. A launch runs the emulated kernel on the argument
    it was given."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, plan: plans.Plan, fails: str = "") -> None:
        super().__init__("cuda.bindings.driver")
        self.emulated, self.ranks = launches._Emulated(plan), plan.ranks
        self.fails = fails
        self.calls: list[tuple[object, ...]] = []

    def _answer(self, name: str, *rest: object) -> tuple[Any, ...]:
        self.calls.append((name, *rest))
        return (719 if name == self.fails else SUCCESS,)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return SUCCESS, f"device {index}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:
        return SUCCESS, f"context of {device}"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:
        return self._answer("context", context)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:
        return (*self._answer("load", code), "module")

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return (*self._answer("function", module, name), name.decode())

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[Any, ...]:
        return self._answer("attribute", function, attribute, value)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(
        self, function: str, threads: int, shared: int
    ) -> tuple[Any, ...]:
        return (*self._answer("occupancy", function, threads, shared), 2)

    def cuGetErrorString(self, code: int) -> tuple[Any, ...]:
        return SUCCESS, b"unspecified launch failure"

    def cuLaunchKernel(self, function: str, *rest: int) -> tuple[Any, ...]:
        *grid, shared, stream, params, extra = rest
        assert grid[1:3] == [1, 1]
        assert grid[4:] == [1, 1]
        assert extra == 0
        address = ctypes.cast(params, ctypes.POINTER(ctypes.c_void_p))[0]
        assert address is not None
        ranks = self.ranks if function == "fastmeta_meta_step" else 1
        self.emulated.run(function, grid[0] // ranks, ranks, grid[3], shared, address)
        return self._answer("launch", function, grid[0], grid[3], shared, stream)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the backend load kernels on a device of 3 multiprocessors, through the driver given."""
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(compiler, "cubin", lambda source, architecture: architecture.encode())

    def use(driver: Driver) -> None:
        bindings = ModuleType("cuda.bindings")
        bindings.driver = driver  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

        def kernels_for(plan: plans.Plan, _: torch.device) -> launches.Kernels:
            return launches._OnGpu(
                plans.source(plan), plan.ranks, plan.threads, plan.shared_bytes, bool(plan.workspace), 0
            )

        monkeypatch.setattr(runs, "kernels_for", kernels_for)

    return use


def _problem(chip: plans.Chip, monkeypatch: pytest.MonkeyPatch) -> tuple[Problem, plans.Plan]:
    monkeypatch.setattr(launches, "EMULATED", chip)
    problem = problem_of(CASE, torch.float64, 0)
    return problem, runs.make_plan(problem, wanted(CASE, problem))


@pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU")
@pytest.mark.parametrize(
    ("chip", "blocks"),
    [(plans.Chip(100_000), 18), (plans.Chip(4_000), 6), (plans.Chip(8_000, cluster=4), 4)],
    ids=["shared", "workspace", "cluster"],
)
def test_launches_match_reference(
    chip: plans.Chip, blocks: int, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block or cluster a task where shared memory is all it takes, else no more than are resident
    at once."""
    problem, plan = _problem(chip, monkeypatch)
    driver = Driver(plan)
    gpu(driver)
    wrt = wanted(CASE, problem)
    out = quantities(backends.get("cuda").solve(problem, wrt, False))
    want = quantities(backends.get("reference").solve(problem, wrt, False))
    assert relative_error(out, want, list(want)) <= 1e-9
    assert driver.calls[:2] == [("context", "context of device 0"), ("load", b"sm_90a")]
    assert ("attribute", "fastmeta_meta_step", 8, plan.shared_bytes) in driver.calls
    assert [call for call in driver.calls if call[0] == "launch"] == [
        ("launch", "fastmeta_meta_step", blocks, plan.threads, plan.shared_bytes, STREAM),
        ("launch", "fastmeta_sum", -(-plan.columns // 32), 512, 512 * 8, STREAM),
    ]


@pytest.mark.skipif(not compiler.host_compiler(), reason="no C++ compiler to stand in for a GPU")
def test_an_error_of_the_driver_is_raised(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, plan = _problem(plans.Chip(100_000), monkeypatch)
    gpu(Driver(plan, fails="launch"))
    with pytest.raises(RuntimeError, match="CUDA: unspecified launch failure"):
        backends.get("cuda").solve(problem, wanted(CASE, problem), False)


# ---- on a GPU

ON_GPU = pytest.mark.skipif(
    bool(backends.get("cuda").missing()), reason=backends.get("cuda").missing() or "ready"
)


def _moved(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return thing.cuda()
    if isinstance(thing, dict):
        return {key: _moved(value) for key, value in thing.items()}
    return thing


def _on_gpu(problem: Problem) -> Problem:
    def batch(given: Any) -> Any:
        return given and replace(given, x=_moved(given.x), y=_moved(given.y), weights=_moved(given.weights))

    return replace(
        problem,
        net=problem.net.cuda(),
        params=_moved(problem.params),
        rates=_moved(problem.rates),
        hyper=_moved(problem.hyper),
        support=batch(problem.support),
        query=batch(problem.query),
        task_weights=_moved(problem.task_weights),
        adapted_grad=_moved(problem.adapted_grad),
        output_grad=_moved(problem.output_grad),
        scratch={},
    )


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("case", VERIFICATION, ids=lambda case: case.id)
def test_gpu_matches_reference(case: Any) -> None:
    """float64 within 1e-9, on the real thing; twice the same bits."""
    problem = problem_of(case, torch.float64, 0)
    wrt, adapted = wanted(case, problem), case.operator == "inner_sgd"
    want = quantities(backends.get("reference").solve(problem, wrt, adapted))
    on_gpu = _on_gpu(problem)
    if reason := backends.why_not("cuda", on_gpu, wrt):
        pytest.skip(reason)
    cuda = backends.get("cuda")
    cuda.poison(True)
    try:
        outs = [quantities(cuda.solve(replace(on_gpu, scratch={}), wrt, adapted)) for _ in range(2)]
    finally:
        cuda.poison(False)
    for key in want:
        assert relative_error({key: outs[0][key].cpu()}, want, [key]) <= 1e-9, key
        assert torch.equal(outs[0][key], outs[1][key]), key


@pytest.mark.gpu
@ON_GPU
def test_gpu_graph_reads_rates_and_data_when_it_is_replayed() -> None:
    case = next(case for case in WORKLOADS["sinusoid"] if case.tasks == 32 and case.steps == 5)
    problem = _on_gpu(problem_of(case, torch.float32, 0))
    cuda, wrt = backends.get("cuda"), frozenset({"params"})
    cuda.solve(problem, wrt, False)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.solve(problem, wrt, False)
    for seed in (1, 2):
        other = _on_gpu(problem_of(case, torch.float32, seed))
        for mine, theirs in zip(problem.params.values(), other.params.values(), strict=True):
            mine.copy_(theirs)
        for rate in problem.rates.values():
            rate.fill_(0.01 * seed)
        graph.replay()
        want = quantities(cuda.solve(replace(problem, scratch={}), wrt, False))
        out = quantities(captured)
        assert all(torch.equal(out[key], want[key]) for key in want)


NEEDS_CLUSTERS = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="clusters need compute capability 9.0",
)


@pytest.mark.gpu
@ON_GPU
@NEEDS_CLUSTERS
@pytest.mark.parametrize("size", [1_500, 8_000, 14_000])
@pytest.mark.parametrize("case_id", ["tied-T3-N7-M5-K3-mse-recompute", "residual-T3-N7-M5-K2-ce", CASE.id])
def test_gpu_clusters_match_reference(case_id: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as small as if the network were large."""
    case = next(case for case in VERIFICATION if case.id == case_id)
    problem = problem_of(case, torch.float64, 0)
    wrt = wanted(case, problem)
    want = quantities(backends.get("reference").solve(problem, wrt, False))
    monkeypatch.setattr(runs, "chip", lambda _: plans.Chip(size, cluster=4))
    on_gpu = _on_gpu(problem)
    assert runs.make_plan(on_gpu, wrt).ranks > 1
    outs = [quantities(backends.get("cuda").solve(replace(on_gpu, scratch={}), wrt, False)) for _ in range(2)]
    for key in want:
        assert relative_error({key: outs[0][key].cpu()}, want, [key]) <= 1e-9, key
        assert torch.equal(outs[0][key], outs[1][key]), key


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_gpu_tensor_cores_are_as_good_as_their_stand_in(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are at most twice those of the emulation, whose rounding and summing tests compare
    with the hardware's."""
    case = Case("wide", partial(mlp, (5, 65, 70, 3), "tanh"), (5,), wrt_inputs=False)
    monkeypatch.setattr(plans, "asked_for", lambda: setting)
    problem, exact = (problem_of(case, dtype, 0) for dtype in (torch.float32, torch.float64))
    wrt = wanted(case, problem)
    truth = quantities(backends.get("reference").solve(exact, wrt, False))
    found = quantities(backends.get("cuda").solve(_on_gpu(problem_of(case, torch.float32, 0)), wrt, False))
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "1")
    like = quantities(backends.get("cuda").solve(problem, wrt, False))
    for name, error in rule.errors(
        {key: value.cpu() for key, value in found.items()}, truth, torch.float32
    ).items():
        own = rule.errors(like, truth, torch.float32)[name]
        assert error <= rule.FACTOR * own + rule.FLOOR, (name, error, own)


SANITIZED = """
import sys, torch, fastmeta as fm
from torch import nn
from fastmeta.backends.cuda import plan as cuda_plan
from fastmeta.backends.cuda import run as cuda_run
if sys.argv[1] == "cluster":
    cuda_run.chip = lambda _: cuda_plan.Chip(20_000, cluster=4)
width = 66 if sys.argv[1] == "wide" else 17
net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 5)).cuda()
data = [torch.randn(3, n, d, device="cuda") for n, d in ((7, 3), (7, 5), (5, 3), (5, 5))]
out = fm.meta_gradient(
    net, dict(net.named_parameters()), data[:2], data[2:], loss="mse", lr=0.1, steps=2,
    wrt=("params", "lr", "support_x", "query_x"), backend="cuda",
)
assert out.loss.isfinite()
"""


@pytest.mark.gpu
@ON_GPU
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer")
@pytest.mark.parametrize("what", ["thin", "wide", pytest.param("cluster", marks=NEEDS_CLUSTERS)])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_kernels_pass_compute_sanitizer(tool: str, what: str) -> None:
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        SANITIZED,
        what,
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.gpu
@ON_GPU
def test_gpu_is_chosen_and_used_on_the_current_stream() -> None:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1)).cuda()
    maml = fm.MAML(net, loss="mse", inner_lr=0.01, inner_steps=3)
    episode = [torch.randn(4, 10, 1, device="cuda") for _ in range(4)]
    assert maml.explain(*episode).backend == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()):
        maml(*episode).loss.backward()
        torch.cuda.current_stream().synchronize()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("have", "reason"), [((7, 5), "compute capability 7.5"), ((8, 0), ""), ((12, 1), "")]
)
def test_rejects_devices_that_are_too_old(
    have: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: have)
    found = cuda._refuses_device(torch.device("cuda", 0))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_threads_of_an_emulated_block_are_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "yes")
    with pytest.raises(ValueError, match=r"FASTMETA_CUDA_EMULATE must be the threads.*got 'yes'"):
        launches.emulated_threads()
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", "")
    assert launches.emulated_threads() == 0
