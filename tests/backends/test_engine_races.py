"""The engine's threads under ThreadSanitizer: no races, and the same bits on any number of
threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "") or "c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -g1 -pthread -fsanitize=thread -fno-tree-slp-vectorize -fno-math-errno".split()
SOURCES = [
    *(f"csrc/cpu/{name}.cpp" for name in ("instruction_set", "kernels_base", "run", "thread_pool")),
    *(f"csrc/cpu/{name}.cpp" for name in ("check", "check_fused", "plan")),
    "csrc/cpu/machine/execute_base.cpp",
    "tests/sanitize/engine_races.cpp",
]

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64") or COMPILER is None,
    reason="ThreadSanitizer needs 64-bit Linux and a C++ compiler",
)

Runner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("races")
    subprocess.run([sys.executable, str(ROOT / "csrc" / "layer_kinds.py"), str(folder)], check=True)
    include = [f"-I{ROOT / 'csrc'}", f"-I{folder}"]

    def compiled(source: str) -> str:
        made = folder / Path(source).with_suffix(".o").name
        command = [str(COMPILER), *FLAGS, *include, "-c", str(ROOT / source), "-o", str(made)]
        subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    program = folder / "engine_races"
    subprocess.run([str(COMPILER), "-fsanitize=thread", "-pthread", *objects, "-o", str(program)], check=True)
    # the addresses that a kernel of today chooses at random may lie where the sanitizer has its own
    # memory
    fixed = [str(shutil.which("setarch")), platform.machine(), "-R"] if shutil.which("setarch") else []

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1"}
        command = [*fixed, str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run


def test_threads_do_not_race_and_bits_match_one_thread(run: Runner) -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout == "ok\n"


def test_a_planted_race_is_reported(run: Runner) -> None:
    done = run("plant")
    assert done.returncode != 0
    assert "data race" in done.stderr
