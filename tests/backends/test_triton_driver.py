"""Launches of the Triton backend through Triton's own run time, on a library that stands in for
NVIDIA's driver.

Kernels are compiled for an H100, loaded and launched with their arguments as on a GPU; the library
counts and computes nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_driver import STAND_IN

from fastmeta.backends.cuda import compile as compiler

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = STAND_IN

#: A launch on another stream than 77 fails, and so does code that is not machine code.
_LIBRARY = r"""
#include <cstring>
#define API extern "C" __attribute__((visibility("default"))) int
typedef void* P;
struct Config { unsigned grid[3], block[3], shared; P stream, attributes; unsigned count; };
API launches = 0, programs = 0;
API cuDeviceGet(int* device, int index) { return *device = index, 0; }
API cuDeviceGetAttribute(int* value, int what, int) { return *value = what == 97 ? 227 << 10 : 100, 0; }
API cuCtxGetCurrent(P* context) { return *context = P(1000), 0; }
API cuModuleLoadData(P* module, const void* code) {
  return *module = P(2000), std::memcmp(code, "\x7f""ELF", 4) ? 200 : 0;
}
API cuModuleGetFunction(P* function, P, const char*) { return *function = P(3000), 0; }
API cuFuncGetAttribute(int* value, int what, P) { return *value = what == 0 ? 1024 : 0, 0; }
API cuPointerGetAttribute(void* value, int, unsigned long long p) { return std::memcpy(value, &p, 8), 0; }
API cuGetErrorString(int, const char** text) { return *text = "invalid", 0; }
API cuLaunchKernelEx(const Config* config, P function, P* arguments, P*) {
  if (config->stream != P(77) || function != P(3000) || !arguments) return 400;
  return ++launches, programs += config->grid[0], 0;
}
"""

_PROGRAM = """
import ctypes
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability, torch.cuda.current_device = lambda *_: (9, 0), lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 77
import triton
assert triton.runtime.driver.active.get_current_target().arch == 90
torch.cuda.is_available = lambda: False
from fastmeta.backends.triton import compile as triton_compile, run
from fastmeta.backends.triton.step import MetaStep
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify.problems import problem_of, wanted
case = next(case for case in VERIFICATION if case.id == "tanh-T18-N3-M2-K2-mse")
problem, compiled = problem_of(case, torch.float32, 0), []
triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(1)
names = wanted(case, problem)
step = MetaStep(problem, run.network(problem, names), names, "store", "ieee", torch.device("cpu"))
triton_compile.compile_together(step.emit.launches)
before = len(compiled)
assert all(launch.run().n_spills == 0 for launch in step.emit.launches)
library = ctypes.CDLL("libcuda.so.1")
count = lambda name: ctypes.c_int.in_dll(library, name).value
print(before, len(compiled), len(step.emit.launches), count("launches"))
print(sum(launch.programs for launch in step.emit.launches), count("programs"))
"""


def test_launches_go_through_triton_s_own_run_time(tmp_path: Path) -> None:
    """All kernels are compiled before the first launch, and none at it; each launch arrives with
    its programs."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    wanted = set(
        re.findall(r"\bcu[A-Z]\w+", (nvidia / "driver.c").read_text() + (nvidia / "driver.py").read_text())
    )
    rest = "".join(
        f"API {name}() {{ return 0; }}\n" for name in sorted(wanted) if f" {name}(" not in _LIBRARY
    )
    flags = ["-shared", "-fPIC", "-fpermissive", "-w"]
    compiler.build_host(_LIBRARY + rest, flags, tmp_path / "libcuda.so.1")
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")
    here = {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**own, **here, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    compiled, in_all, recorded, arrived, programs, started = map(int, done.stdout.split())
    assert compiled == in_all > 10
    assert recorded == arrived > compiled
    assert programs == started
