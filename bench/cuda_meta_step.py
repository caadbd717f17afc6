"""The cuda backend on a GPU: device and host time of a meta-step, time of the first call, what the kernels take.

    python bench/cuda_meta_step.py --out runs/gpu          every workload that the backend takes
    python bench/cuda_meta_step.py --quick                  the sinusoid alone

Device time is that of a CUDA graph of one `solve`, replayed: medians of events around a hundred replays. Every result
is compared with the float64 reference first; one that is wrong is not timed. Writes cuda.csv.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.backends import _cuda_compile, _cuda_launch, _cuda_plan, _cuda_run
from fastmeta.benchmark import cost
from fastmeta.cases import WORKLOADS, Case
from fastmeta.problem import Problem
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of
from fastmeta.verify.quantities import quantities, relative_error

WRT = frozenset({"params"})
SINUSOID = WORKLOADS["sinusoid"][-1]
#: T = 4096 is the throughput case: its reference runs on the first tasks only.
CASES = [*WORKLOADS["sinusoid"], replace(SINUSOID, tasks=4096), *WORKLOADS["recommender"], *WORKLOADS["mlp"]]
CHECKED_TASKS = 32


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


def device_seconds(problem: Problem) -> float:
    """One meta-step in a replayed CUDA graph."""
    cuda = backends.get("cuda")
    cuda.solve(problem, WRT, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.solve(problem, WRT, False)
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(100):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 100e3)
    return statistics.median(times[3:])


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


def measure(case: Case) -> dict[str, object]:
    """One row of the table."""
    problem = on_gpu(problem_of(case, torch.float32, 0))
    row: dict[str, object] = {"case": case.id, "precision": "float32"}
    if reason := backends.why_not("cuda", problem, WRT):
        return {**row, "status": f"refused: {reason}"}
    start = time.perf_counter()
    backends.get("cuda").solve(problem, WRT, False)
    torch.cuda.synchronize()
    row["first_call_s"] = time.perf_counter() - start
    wrong, allowed = error(case)
    row |= {"error": wrong, "allowed": allowed}
    if not wrong <= allowed:
        return {**row, "status": "wrong"}
    plan = _cuda_run.make_plan(problem, WRT)
    _, report = _cuda_compile.compile_for(_cuda_plan.source(plan), _cuda_launch.architecture(0))
    taken = _cuda_compile.resources(report)
    seconds = device_seconds(problem)
    row |= {
        "device_us": 1e6 * seconds,
        "host_us": 1e6 * host_seconds(problem),
        "gflops": cost.flops(case) / seconds / 1e9,
    }
    row |= {"threads": plan.threads, "registers": taken.registers, "spills": taken.spills}
    row |= {"shared_kib": plan.shared_bytes / 1024, "workspace_kib": plan.workspace * plan.itemsize / 1024}
    return {**row, "memory": plan.memory, "status": "timed"}


FIELDS = (
    *("case", "precision", "status", "device_us", "host_us", "gflops", "error", "allowed", "first_call_s"),
    *("threads", "registers", "spills", "shared_kib", "workspace_kib", "memory", "device", "torch", "cuda"),
)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/gpu"))
@click.option("--quick", is_flag=True, help="The sinusoid with up to 32 tasks alone.")
def main(out: Path, quick: bool) -> None:
    """Measure and write a table; exit code 1 if anything is wrong."""
    if reason := backends.get("cuda").missing():
        raise click.ClickException(f"backend 'cuda' cannot run here: {reason}")
    facts = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda}
    rows = []
    for case in [case for case in WORKLOADS["sinusoid"] if case.tasks <= CHECKED_TASKS] if quick else CASES:
        rows.append({**measure(case), **facts})
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()}
        click.echo("  ".join(f"{key} {shown[key]}" for key in FIELDS[:-3] if key in shown))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    if any(row["status"] == "wrong" for row in rows):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
