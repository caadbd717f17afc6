"""The host side of the cuda backend through NVIDIA's own bindings, on a library that stands in for
the driver.

It says what it was called with: so types, pointers and the order of arguments are those that a GPU
would be given.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_driver import STAND_IN

from fastmeta.backends.cuda import compile as compiler

pytestmark = STAND_IN

#: Handles are small numbers; a function's is the address of its name.
_LIBRARY = r"""
#include <dlfcn.h>
#include <cstdio>
#include <cstdint>
#include <cstring>
#define API extern "C" __attribute__((visibility("default"))) int
typedef void* P;
API cuGetProcAddress_v2(const char* name, P* found, int, uint64_t, int* status) {
  *found = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
  if (status) *status = *found ? 0 : 1;
  return 0;
}
API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* version) { return *version = 13000, 0; }
API cuDeviceGet(int* device, int index) { return *device = index, 0; }
API cuDevicePrimaryCtxRetain(P* context, int device) { return *context = P(intptr_t(1000 + device)), 0; }
API cuCtxSetCurrent(P context) { return std::printf("context %ld\n", long(intptr_t(context))), 0; }
API cuModuleLoadData(P* module, const void* code) {
  std::printf("load %.5s\n", static_cast<const char*>(code));
  return *module = P(2000), 0;
}
API cuModuleGetFunction(P* function, P module, const char* name) {
  *function = strdup(name);
  return module == P(2000) ? 0 : 400;
}
API cuFuncSetAttribute(P function, int attribute, int value) {
  return std::printf("attribute %s %d %d\n", static_cast<char*>(function), attribute, value), 0;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, P, int threads, size_t shared) {
  std::printf("occupancy %d %zu\n", threads, shared);
  return *blocks = 2, 0;
}
API cuGetErrorString(int, const char** text) { return *text = "unspecified launch failure", 0; }
API cuLaunchKernel(P function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, P stream, void** params, void** extra) {
  const int64_t* words = static_cast<int64_t*>(params[0]);
  std::printf("launch %s %u %u %u %u %u %u %u %ld %d %ld\n",
              static_cast<char*>(function), x, y, z, bx, by, bz, shared,
              long(intptr_t(stream)), extra == nullptr, long(words[0]));
  return std::fflush(stdout), std::strcmp(static_cast<char*>(function), "fastmeta_sum") ? 0 : 719;
}
"""

_PROGRAM = """
from contextlib import nullcontext
from types import SimpleNamespace
import torch
from fastmeta.backends import get
from fastmeta.backends.cuda import compile as compiler, launch, plan as plans, run
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify.problems import problem_of, wanted

cuda, chip = torch.cuda, plans.Chip(4_000)
cuda.device, cuda.current_stream = lambda _: nullcontext(), lambda _: SimpleNamespace(cuda_stream=77)
cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=3)
cuda.get_device_capability = lambda _: (9, 0)
compiler.cubin = lambda source, architecture: architecture.encode()
launch.EMULATED = chip
run.kernels_for = lambda p, _: launch._OnGpu("", p.ranks, p.threads, p.shared_bytes, bool(p.workspace), 1)
case = next(case for case in VERIFICATION if case.id == "tanh-T18-N3-M2-K2-mse")
problem = problem_of(case, torch.float64, 0)
plan = run.make_plan(problem, wanted(case, problem))
print("plan", plan.threads, plan.shared_bytes, -(-plan.columns // 32), flush=True)
try:
    get("cuda").solve(problem, wanted(case, problem), False)
except RuntimeError as error:
    print(error)
"""


def test_the_driver_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings are not installed")
    flags = ["-shared", "-fPIC", "-fpermissive", "-w", "-ldl"]
    compiler.build_host(_LIBRARY, flags, tmp_path / "libcuda.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FASTMETA_CUDA_EMULATE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    plan, *said = done.stdout.splitlines()
    threads, shared, columns = plan.split()[1:]
    assert said == [
        "context 1001",  # of device 1
        "load sm_90",
        f"attribute fastmeta_meta_step 8 {shared}",
        f"occupancy {threads} {shared}",
        "context 1001",
        # two blocks on each multiprocessor
        f"launch fastmeta_meta_step 6 1 1 {threads} 1 1 {shared} 77 1 18",
        "context 1001",
        f"launch fastmeta_sum {columns} 1 1 512 1 1 4096 77 1 18",
        "CUDA: unspecified launch failure",
    ]
