"""The cuda backend on a GPU: device and host time of a meta-step, time of the first call, what the
kernels take.

    python bench/cuda_meta_step.py --out runs/gpu          every workload that the backend takes
    python bench/cuda_meta_step.py --quick                  the sinusoid alone

Device time is that of a CUDA graph of one `solve`, replayed: medians of events around a hundred
replays. Every result is compared with the float64 reference first; one that is wrong is not timed.
`host_us` is from Python until the device is done, as peers are timed by bench/gpu.py. First calls
are those of fresh processes, the second one with the first one's cache on disk. Writes cuda.csv,
after every case.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import gpu_timing
import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.backends.cuda import compile as cuda_compile
from fastmeta.backends.cuda import launch as cuda_launch
from fastmeta.backends.cuda import plan as cuda_plan
from fastmeta.backends.cuda import run as cuda_run
from fastmeta.benchmark import cost
from fastmeta.cases import Case
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.problem import Problem
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of
from fastmeta.verify.quantities import quantities, relative_error

WRT = frozenset({"params"})
SINUSOID = WORKLOADS["sinusoid"][-1]
#: T = 4096 is the throughput case: its reference runs on the first tasks only.
CASES = [*WORKLOADS["sinusoid"], replace(SINUSOID, tasks=4096)]
CASES += [case for name in ("recommender", "mlp", "mlp-bn") for case in WORKLOADS[name]]
CHECKED_TASKS = 32
#: Cases whose first calls are timed.
STARTED = [case for case in CASES if case.tasks == CHECKED_TASKS and case.steps == 5]


def moved(thing: Any) -> Any:
    """The same on the GPU."""
    if isinstance(thing, Tensor):
        return thing.cuda()
    return {name: value.cuda() for name, value in thing.items()}


def on_gpu(problem: Problem) -> Problem:
    """The problem of a workload with all of its tensors on the GPU."""
    support, query = problem.support, problem.query
    if support is None or query is None:
        raise ValueError("a workload has support and query sets")
    return replace(
        problem,
        net=problem.net.cuda(),
        params=moved(problem.params),
        rates=moved(problem.rates),
        support=replace(support, x=support.x.cuda(), y=moved(support.y)),
        query=replace(query, x=query.x.cuda(), y=moved(query.y)),
        scratch={},
    )


def error(case: Case) -> tuple[float, float]:
    """(relative error of the meta-gradient, what is allowed) on the first tasks."""
    few = replace(case, tasks=min(case.tasks, CHECKED_TASKS))
    seeds = range(3)
    found, own = [], []
    for seed in seeds:
        result = backends.get("cuda").solve(on_gpu(problem_of(few, torch.float32, seed)), WRT, False)
        out = {key: value.cpu() for key, value in quantities(result).items()}
        ref = {key: value for key, value in runs.truth(few, seed).tensors.items() if key[0] == "d_params"}
        found.append(relative_error(out, ref, list(ref)))
        own.append(runs.own_errors(few, seed)["d_params"])
    return statistics.median(found), rule.FACTOR * statistics.median(own) + rule.FLOOR


def host_seconds(problem: Problem) -> float:
    """One `solve` from Python until the device is done."""
    cuda = backends.get("cuda")
    times = []
    for _ in range(60):
        torch.cuda.synchronize()
        start = time.perf_counter()
        cuda.solve(problem, WRT, False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[10:])


def ffma_peak() -> float:
    """Floating-point operations a second of plain multiply-adds at the highest clock."""
    from cuda.bindings import driver

    _, device = driver.cuDeviceGet(0)
    _, kilohertz = driver.cuDeviceGetAttribute(
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE, device
    )
    lanes = 64 if torch.cuda.get_device_capability(0) == (8, 0) else 128
    return 2e3 * kilohertz * lanes * torch.cuda.get_device_properties(0).multi_processor_count


def first_calls(case: Case) -> tuple[float, float]:
    """Seconds of the first `solve` of a process, with nothing compiled and with everything in the
    cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--first-call", case.id]
        environment = {**os.environ, "FASTMETA_CACHE": folder}
        runs = [
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
    cold, cached = (float(done.stdout.split()[-1]) for done in runs)
    return cold, cached


def first_call(case: Case) -> float:
    """The same in this process."""
    problem = on_gpu(problem_of(case, torch.float32, 0))
    torch.cuda.synchronize()
    start = time.perf_counter()
    backends.get("cuda").solve(problem, WRT, False)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case) -> dict[str, object]:
    """One row of the table."""
    problem = on_gpu(problem_of(case, torch.float32, 0))
    row: dict[str, object] = {"case": case.id, "precision": "float32"}
    if reason := backends.why_not("cuda", problem, WRT):
        return {**row, "status": f"refused: {reason}"}
    if case in STARTED:
        row["first_call_s"], row["cached_call_s"] = first_calls(case)
    wrong, allowed = error(case)
    row |= {"error": wrong, "allowed": allowed}
    if not wrong <= allowed:
        return {**row, "status": "wrong"}
    plan = cuda_run.make_plan(problem, WRT)
    _, report = cuda_compile.compile_for(cuda_plan.source(plan), cuda_launch.architecture(0))
    taken = cuda_compile.resources(report)
    seconds = 1e-3 * gpu_timing.on_device(
        lambda: backends.get("cuda").solve(problem, WRT, False), replays=100
    )
    row |= {
        "device_us": 1e6 * seconds,
        "host_us": 1e6 * host_seconds(problem),
        "gflops": cost.flops(case) / seconds / 1e9,
        "ffma_share": cost.flops(case) / seconds / ffma_peak(),
    }
    row |= {
        "ranks": plan.ranks,
        "threads": plan.threads,
        "registers": taken.registers,
        "spills": taken.spills,
    }
    row |= {"shared_kib": plan.shared_bytes / 1024, "workspace_kib": plan.workspace * plan.itemsize / 1024}
    return {**row, "memory": plan.memory, "status": "timed"}


FIELDS = (
    *("case", "precision", "status", "device_us", "host_us", "gflops", "ffma_share", "error", "allowed"),
    *(
        "first_call_s",
        "cached_call_s",
        "ranks",
        "threads",
        "registers",
        "spills",
        "shared_kib",
        "workspace_kib",
        "memory",
        "device",
        "torch",
        "cuda",
    ),
)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/gpu"))
@click.option("--quick", is_flag=True, help="The sinusoid with up to 32 tasks alone.")
@click.option(
    "--first-call", "first_call_of", hidden=True, help="Print the seconds of a case's first call and stop."
)
def main(out: Path, quick: bool, first_call_of: str | None) -> None:
    """Measure and write a table; exit code 1 if anything is wrong."""
    if reason := backends.get("cuda").missing():
        raise click.ClickException(f"backend 'cuda' cannot run here: {reason}")
    if first_call_of is not None:
        click.echo(first_call(next(case for case in CASES if case.id == first_call_of)))
        return
    facts = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda}
    rows: list[dict[str, object]] = []
    out.mkdir(parents=True, exist_ok=True)
    for case in [case for case in WORKLOADS["sinusoid"] if case.tasks <= CHECKED_TASKS] if quick else CASES:
        rows.append({**measure(case), **facts})
        _say(rows[-1], FIELDS[:-3])
        _write(out / "cuda.csv", FIELDS, rows)
    if any(row["status"] == "wrong" for row in rows):
        raise click.exceptions.Exit(1)


def _say(row: dict[str, object], names: tuple[str, ...]) -> None:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    click.echo("  ".join(f"{key} {shown[key]}" for key in names if key in shown))


def _write(path: Path, names: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
