"""The n-th allocation and the start of a thread fail, jobs throw, processes fork: nothing is
lost."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmeta as fm

FOLDER = Path(__file__).resolve().parent / "failing"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.system() != "Linux" or COMPILER is None or "LD_PRELOAD" in os.environ:
        pytest.skip("libraries are preloaded on Linux, once, and need a compiler")
    made = tmp_path_factory.mktemp("failing") / "failing.so"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        str(FOLDER / "failing.cpp"),
        "-o",
        str(made),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return made


def run(shim: Path, *arguments: str) -> str:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "script.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("which", ["first", "later"])
def test_a_failed_allocation_loses_nothing(which: str, threads: str, shim: Path) -> None:
    assert int(run(shim, which, threads)) > 10


def test_threads_that_do_not_start_change_no_bits(shim: Path) -> None:
    run(shim, "threads")


def _gradients(net: nn.Module) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 3, 2, generator=numbers, dtype=torch.float64) for _ in range(2))
    found = fm.meta_gradient(net, dict(net.named_parameters()), (x, y), (x, y), loss="mse", lr=0.1, steps=2)
    assert found.grads is not None
    return list(found.grads.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_the_same_bits() -> None:
    net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        want = _gradients(net)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    grandchild = os.fork()
                    code = 0 if all(map(torch.equal, _gradients(net), want)) else 2
                    if grandchild:
                        code = code or os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(map(torch.equal, _gradients(net), want))
    finally:
        torch.set_num_threads(before)
