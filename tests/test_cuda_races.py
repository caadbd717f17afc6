"""The CUDA kernels under ThreadSanitizer: a block of several threads, and no two of them where they should not be."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_launches import recorded
from torch import Tensor, nn

from fastmeta import backends
from fastmeta.backends import _cuda_compile as compiler
from fastmeta.backends import _cuda_plan as plans
from fastmeta.backends import _cuda_run as runs
from fastmeta.cases import VERIFICATION, Case
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64") or not compiler.host_compiler(),
    reason="ThreadSanitizer needs 64-bit Linux and a C++ compiler",
)

#: No divisor of the cases' sizes: else the same thread would write and read what others should.
THREADS = 4
FLAGS = (
    "-std=c++17 -O1 -g -fsanitize=thread -fno-strict-aliasing -Wno-unknown-pragmas -DFASTMETA_EMULATE -pthread".split()
)


class Twice(nn.Module):
    """A value that one layer reads twice: the two shares of its gradient come from different threads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))  # [N, 6]
        return self.head(torch.cat([x, x], 1).reshape(x.shape[0], 2, 6))  # [N, 2, 2]


TWICE = Case("twice", Twice, (3,), wrt_inputs=False)
CASES = (
    "residual-T3-N7-M5-K2-ce",
    "tied-T3-N7-M5-K2-mse",
    "tanh-T3-N7-M5-K3-mse-lr_element_step_task-mu0.9-wd0.05-recompute",
    "tanh-T3-N7-M5-K2-ce-step_weights-weights_sqt-per_step-store",
    TWICE.id,
)
KNOWN = {case.id: case for case in (*VERIFICATION, TWICE)}


def _run(
    case_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> subprocess.CompletedProcess:
    monkeypatch.setenv("FASTMETA_CUDA_EMULATE", str(THREADS))
    case = KNOWN[case_id]
    problem = problem_of(case, torch.float32, 0)
    wrt = wanted(case, problem)
    with recorded(monkeypatch, tmp_path / "launches", threads=THREADS):
        backends.get("cuda").solve(problem, wrt, False)
    source = plans.source(runs.make_plan(problem, wrt)) + '#include "race_check.cpp"\n'
    compiler.build_host(source, [*FLAGS, *flags], tmp_path / "program")
    # the addresses that a kernel of today chooses at random may lie where the sanitizer has its own memory
    fixed = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(tmp_path / "program"), str(tmp_path / "launches")]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("case_id", CASES)
def test_threads_of_a_block_do_not_race(case_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = _run(case_id, tmp_path, monkeypatch, [])
    assert done.stdout.split() == ["done"], done.stderr[:4000]
    assert done.returncode == 0, done.stderr[:4000]


def test_missing_barriers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: the same without a barrier inside the kernels."""
    done = _run(CASES[0], tmp_path, monkeypatch, ["-DFASTMETA_EMULATE_NO_BARRIERS"])
    assert done.returncode != 0
    assert "data race" in done.stderr
