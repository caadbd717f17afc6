"""`fastmeta bench`: every peer on every case of a workload, checked first, then timed side by
side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmeta.benchmark import check, cost, machine, memory
from fastmeta.benchmark.peers import NOOP, OURS, PEERS, Prepared
from fastmeta.benchmark.peers.ours import seconds_inside
from fastmeta.benchmark.rows import Row
from fastmeta.benchmark.timing import Protocol, Times, measure
from fastmeta.cases import Case
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.errors import BackendUnavailable

Say = Callable[[str], None]


@dataclass(slots=True)
class _Ready:
    """A peer that has passed the check."""

    prepared: Prepared
    row: Row


def run(
    workload: str,
    *,
    tasks: Sequence[int] = (),
    shots: Sequence[int] = (),
    steps: Sequence[int] = (),
    threads: int = 2,
    peers: Sequence[str] = tuple(PEERS),
    protocol: Protocol | None = None,
    say: Say = lambda _: None,
) -> list[Row]:
    """Benchmark the cases of one workload.

    Args:
        workload: a name in `fastmeta.cases.WORKLOADS`.
        tasks, shots, steps: only cases with these numbers of tasks, support examples and inner
            steps; empty: all.
        threads: cores that this process keeps to, from now on; set it before JAX is imported.
        peers: names in `PEERS`.
        protocol: of the clock; None: the usual one.
        say: told what goes on.

    Returns:
        A row for each case and peer, those that could not be timed included.

    Raises:
        ValueError: more threads than cores, or nothing to run.
    """
    machine.limit(threads)
    machine.twice_differentiable()
    cases = select(workload, tasks, shots, steps)
    facts = machine.facts()
    rows = []
    times: dict[str, dict[str, Times]] = {}
    for case in cases:
        peak = machine.fma_peak("float32", threads)
        ready = {}
        for name in peers:
            say(f"{case.id}: {name}")
            row, prepared = _check(workload, case, name, threads)
            row.facts = facts
            rows.append(row)
            if prepared is not None:
                ready[name] = _Ready(prepared, row)
        say(f"{case.id}: timing")
        with machine.OtherWork() as others:
            measured = measure(
                {name: entry.prepared for name, entry in ready.items()}, protocol or Protocol()
            )
        # The machine may be slower now than before: the better of two measurements is the peak.
        peak = max(peak, machine.fma_peak("float32", threads))
        for name, entry in ready.items():
            _fill(entry.row, case, measured, name, peak)
            entry.row.others_busy = others.cores
        times[case.id] = measured
    _fill_bandwidth(rows, cases, times, threads)
    return rows


def select(
    workload: str, tasks: Sequence[int] = (), shots: Sequence[int] = (), steps: Sequence[int] = ()
) -> list[Case]:
    """The cases of a workload with these numbers; arguments are those of `run`.

    Raises:
        ValueError: there are none.
    """
    cases = [case for case in WORKLOADS[workload] if not tasks or case.tasks in tasks]
    cases = [
        case for case in cases if (not shots or case.shots in shots) and (not steps or case.steps in steps)
    ]
    if not cases:
        raise ValueError(
            f"bench: {workload} has no case with tasks {list(tasks)}, shots {list(shots)} and steps "
            f"{list(steps)}"
        )
    return cases


def _check(workload: str, case: Case, name: str, threads: int) -> tuple[Row, Prepared | None]:
    """The row of a peer, and the peer ready for the clock if its gradient is right."""
    peer = PEERS[name]
    row = Row(workload, case.id, name, peer_version=peer.version(), threads=threads)
    row.tasks, row.shots, row.queries, row.steps = case.tasks, case.shots, case.queries, case.steps
    row.reason = peer.missing()
    if row.reason:
        row.status = "missing"
        return row, None
    prepared: dict[int, Prepared] = {}
    outs: dict[int, Any] = {}
    try:
        for seed in (0,) if name == NOOP else check.seeds(case):
            prepared[seed] = peer.prepare(case, case.build(torch.float32, seed))
            start = time.perf_counter()
            outs[seed] = prepared[seed].step()
            if math.isnan(row.first_call_s):
                row.first_call_s = time.perf_counter() - start
        if name != NOOP:
            row.peak_mib = memory.peak_bytes(workload, case.id, name, threads) / 2**20
            verdict = check.judge(case, prepared, outs)
            row.error, row.allowed = verdict.error, verdict.allowed
            if not verdict.right:
                row.status = "wrong"
                row.reason = (
                    f"error {verdict.error:.1e} against the float64 reference, allowed {verdict.allowed:.1e}"
                )
                return row, None
        if prepared[0].backend is not None:
            row.backend = prepared[0].backend()
            prepared[0].inside = seconds_inside(row.backend)
    except BackendUnavailable as error:
        row.status, row.reason = "missing", str(error)
        return row, None
    except Exception as error:  # a peer that breaks is reported; the others still count
        row.status, row.reason = (
            "broken",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )
        return row, None
    return row, prepared[0]


def _fill(row: Row, case: Case, measured: dict[str, Times], name: str, peak: float) -> None:
    times = measured[name]
    row.calls = len(times.total)
    row.median_ms, row.min_ms = 1e3 * times.median, 1e3 * min(times.total)
    row.p20_ms, row.p80_ms = 1e3 * times.percentile(20), 1e3 * times.percentile(80)
    if name == NOOP:
        return
    row.gflops = cost.flops(case) / times.median / 1e9
    row.peak_share = row.gflops / peak
    if OURS in measured:
        row.ratio = times.median / measured[OURS].median
    if times.beyond:
        row.beyond_us = 1e6 * float(np.median(times.beyond))
        if name == "fastmeta-maml" and NOOP in measured:
            row.beyond_noop_us = row.beyond_us - 1e6 * measured[NOOP].median


def _fill_bandwidth(
    rows: list[Row], cases: list[Case], times: dict[str, dict[str, Times]], threads: int
) -> None:
    """The share of the cache bandwidth that the inner steps reach: bytes and seconds of the steps
    that one case has more than another."""
    for case in cases:
        fewer = [c for c in cases if c.tasks == case.tasks and c.steps < case.steps]
        if not fewer or OURS not in times[case.id] or OURS not in times[fewer[0].id]:
            continue
        base = fewer[0]
        seconds = times[case.id][OURS].median - times[base.id][OURS].median
        bandwidth = 1e9 * machine.cache_bandwidth(cost.working_set(case), threads)
        streamed = (case.steps - base.steps) * cost.streamed_bytes(case)
        for row in rows:
            if row.case == case.id and row.peer == OURS and seconds > 0:
                row.bandwidth_share = streamed / seconds / bandwidth
