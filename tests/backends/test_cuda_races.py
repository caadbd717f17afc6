"""The CUDA kernels under ThreadSanitizer: a block of several threads, and no two of them where they
should not be."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from cuda_launches import recorded
from torch import Tensor, nn

from fastmeta import backends
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import plan as plans
from fastmeta.backends.cuda import run as runs
from fastmeta.cases import Case
from fastmeta.cases.networks import mlp
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify.problems import problem_of, wanted

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux"
    or platform.machine() not in ("x86_64", "aarch64")
    or not compiler.host_compiler(),
    reason="ThreadSanitizer needs 64-bit Linux and a C++ compiler",
)

#: No divisor of the cases' sizes: else the same thread would write and read what others should.
THREADS = 6
FLAGS = "-std=c++17 -O0 -g1 -fsanitize=thread -fno-strict-aliasing -Wno-unknown-pragmas -pthread".split()
FLAGS += ["-DFASTMETA_EMULATE", "-DFASTMETA_EMULATE_MUTANTS"]


class Twice(nn.Module):
    """A value that one layer reads twice: the two shares of its gradient come from different
    threads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))  # [N, 5]
        return self.head(torch.cat([x, x], 1).reshape(x.shape[0], 2, 5))  # [N, 2, 2]


class TiedFirst(nn.Module):
    """The same weights in the first layer and in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))  # [N, 2]


BY_ID = {case.id: case for case in VERIFICATION}
TANH = "tanh-T3-N7-M5-K"
H100 = launches.EMULATED


@dataclass(frozen=True)
class Race:
    """A case, and what is unusual about it."""

    case: Case
    chip: plans.Chip = H100
    precision: str = "highest"
    step_weights: tuple[float, ...] = ()
    wrt: frozenset[str] = frozenset()  # none: whatever there is


RACES = {
    "residual": Race(BY_ID["residual-T3-N7-M5-K2-ce"]),
    "tied": Race(BY_ID["tied-T3-N7-M5-K2-mse"]),
    "tied first": Race(Case("tied", TiedFirst, (7,), tasks=2, wrt_inputs=False)),
    "decay": Race(replace(BY_ID[f"{TANH}2-mse"], weight_decay=0.1)),
    "inputs": Race(
        Case("inputs", partial(mlp, (9, 4, 2), "tanh"), (9,)), wrt=frozenset({"params", "query_x"})
    ),
    "recompute": Race(BY_ID[f"{TANH}3-mse-lr_element_step_task-mu0.9-wd0.05-recompute"]),
    "store": Race(BY_ID[f"{TANH}2-ce-step_weights-weights_sqt-per_step-store"]),
    "masks": Race(replace(BY_ID[f"{TANH}1-mse_masked_mean-weights_sqt"], shots=33)),
    "adapting": Race(replace(BY_ID[f"{TANH}2-ce-inner_sgd-lr_head-weights_s-recompute"], memory="store")),
    "forward": Race(BY_ID[f"{TANH}0-task_forward-own_some"]),
    "no loss at the end": Race(BY_ID[f"{TANH}2-mse"], step_weights=(0.5, 0.5, 0.0)),
    "twice": Race(Case("twice", Twice, (3,), wrt_inputs=False)),
    "cluster": Race(
        BY_ID[f"{TANH}3-mse-lr_element_step_task-mu0.9-wd0.05-store"], chip=plans.Chip(8_000, cluster=2)
    ),
    "wide": Race(
        Case("wide", partial(mlp, (3, 64, 64), "tanh"), (3,), 1, 5, 3, 1, wrt_inputs=False),
        precision="medium",
    ),
    "rule": Race(replace(BY_ID[f"{TANH}3-mse-adamw"], rates="head")),
    "rule without rates": Race(BY_ID[f"{TANH}3-mse-adam_plain"], wrt=frozenset({"params"})),
    "normed": Race(BY_ID["bn_mlp-T3-N7-M5-K3-ce-lr_element_step_task-mu0.9-wd0.05-recompute"]),
    "normed rows": Race(BY_ID["rows_normed-T3-N7-M5-K2-mse"]),
    "positions": Race(BY_ID["grid-T3-N7-M5-K2-ce_masked_mean-weights_sq0-recompute"]),
}


@dataclass(frozen=True)
class Ran:
    """What a run said, and how long it took."""

    done: subprocess.CompletedProcess[str]
    seconds: float


#: Runs a case without the barrier that is named; "": with all of them, once.
Runner = Callable[[str, str], Ran]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("races")

    @lru_cache
    def built(name: str) -> tuple[Path, Path]:
        race = RACES[name]
        case = race.case
        program, recording = folder / name, folder / f"{name}.launches"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTMETA_CUDA_EMULATE", str(THREADS))
            patch.setattr(launches, "EMULATED", race.chip)
            patch.setattr(plans, "asked_for", lambda: race.precision)
            problem = problem_of(case, torch.float32, 0)
            if race.step_weights:
                problem = replace(problem, step_weights=race.step_weights)
            wrt = race.wrt or wanted(case, problem)
            with recorded(patch, recording, threads=THREADS):
                backends.get("cuda").solve(problem, wrt, case.operator == "inner_sgd")
            plan = runs.make_plan(problem, wrt)
        assert (plan.ranks > 1) == (name == "cluster")
        assert any(layer.multiply != "fma" for layer in plan.layers) == (name == "wide")
        compiler.build_host(plans.source(plan) + '#include "race_check.cpp"\n', FLAGS, program)
        return program, recording

    @lru_cache
    def run(name: str, without: str) -> Ran:
        # the addresses that a kernel of today chooses at random may lie where the sanitizer has its
        # own memory
        fixed = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
        command = [*fixed, *map(str, built(name)), without]
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        return Ran(done, time.perf_counter() - start)

    return run


@pytest.mark.parametrize("name", RACES)
def test_threads_of_a_block_do_not_race(name: str, run: Runner) -> None:
    done = run(name, "").done
    assert done.returncode == 0, done.stderr[:4000]
    assert len(done.stdout.split()) > 5


def _barriers() -> set[str]:
    """Every barrier of the kernels, as "file:line"."""
    folder = compiler.source_folder() / "cuda"
    return {
        f"{file.name}:{number}"
        for file in folder.rglob("*.h")
        if file.name not in ("device.h", "emulate.h")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if re.search(r"\bbarrier\(\)", line)
    }


def test_every_barrier_is_needed(run: Runner) -> None:
    """Without any one of them some case has a race: so none is missed, and the check would find one
    that is missing."""
    clean = {name: run(name, "") for name in RACES}
    passed = {name: set(clean[name].done.stdout.split()) for name in RACES}
    cheapest = sorted(RACES, key=lambda name: clean[name].seconds)
    assert set().union(*passed.values()) == _barriers()
    unnoticed = []
    for barrier in sorted(_barriers()):
        cases = [name for name in cheapest if barrier in passed[name]]
        if not any("data race" in run(name, barrier).done.stderr for name in cases):
            unnoticed.append(barrier)
    assert not unnoticed, " ".join(unnoticed)
