"""What second order costs: its time over that of first order, in both memory modes, and the seconds
of the first call; on the `cpu` backend, or on the one that "auto" takes where there is no layer
program."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastmeta import backends
from fastmeta.benchmark import check, machine
from fastmeta.benchmark.cost import flops
from fastmeta.benchmark.peers import Prepared
from fastmeta.benchmark.peers.ours import MetaGradientPeer
from fastmeta.benchmark.timing import Protocol, measure
from fastmeta.cases import Case
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS

#: What second order may cost on `cpu`, in units of first order: docs/architecture.md, "Cost".
LIMITS = {"store": 3.0, "recompute": 4.0}
DEFAULT = ("sinusoid", "mlp", "recommender")
#: Way -> (order, memory).
_WAYS = {"first": ("first", "store"), "store": ("second", "store"), "recompute": ("second", "recompute")}


@dataclass(slots=True)
class OrderRow:
    """Second order on one case, in one memory mode."""

    workload: str
    case: str
    memory: str
    threads: int
    backend: str = ""
    first_call_s: float = math.nan  # of second order: with all that is done once
    first_ms: float = math.nan  # medians
    second_ms: float = math.nan
    ratio: float = math.nan
    limit: float = math.nan  # on `cpu`
    by_flops: float = math.nan  # the ratio of multiply-adds with stored activations
    reason: str = ""  # why it was not timed
    others_busy: float = math.nan  # cores that other programs kept busy meanwhile
    facts: dict[str, str] = field(default_factory=dict)


def run(
    workloads: Sequence[str] = DEFAULT,
    *,
    threads: int = 1,
    most_tasks: int = 32,
    protocol: Protocol | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[OrderRow]:
    """Two rows for every case of some workloads with at most `most_tasks` tasks: "store" and
    "recompute".

    Args:
        workloads: names in `fastmeta.cases.WORKLOADS`.
        threads: cores that this process keeps to, from now on.
        most_tasks: cases with more are left out.
        protocol: of the clock; None: the usual one.
        say: told what goes on.

    Raises:
        ValueError: more threads than cores.
        RuntimeError: there is no cpu backend here, and a workload needs it.
    """
    missing = backends.get("cpu").missing()
    if missing and not NOT_CAPTURED.issuperset(workloads):
        raise RuntimeError(f"the cpu backend cannot run here: {missing}")
    machine.limit(threads)
    facts = machine.facts()
    rows = []
    for workload in workloads:
        for case in WORKLOADS[workload]:
            if case.tasks <= most_tasks:
                say(f"orders: {case.id}")
                rows += _rows(workload, case, threads, protocol or Protocol(), facts)
    return rows


def _rows(
    workload: str, case: Case, threads: int, protocol: Protocol, facts: dict[str, str]
) -> list[OrderRow]:
    cases = {way: replace(case, order=order, memory=memory) for way, (order, memory) in _WAYS.items()}
    asked = "auto" if workload in NOT_CAPTURED else "cpu"
    ready: dict[str, Prepared] = {}
    first_calls: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for way, each in cases.items():
        prepared, outs = {}, {}
        for seed in check.seeds(each):
            prepared[seed] = MetaGradientPeer(way, asked).prepare(each, each.build(torch.float32, seed))
            start = time.perf_counter()
            outs[seed] = prepared[seed].step()
            first_calls.setdefault(way, time.perf_counter() - start)
        verdict = check.judge(each, prepared, outs)
        ready[way] = prepared[0]
        if not verdict.right:
            wrong[way] = (
                f"{way}: error {verdict.error:.1e} against the float64 reference, allowed "
                f"{verdict.allowed:.1e}"
            )
    chosen = ready["store"].backend
    backend = asked if chosen is None else chosen()
    rows = [
        OrderRow(workload, case.id, memory, threads, backend, first_calls[memory], facts=facts)
        for memory in LIMITS
    ]
    for row in rows:
        if backend == "cpu":
            row.limit = LIMITS[row.memory]
        row.by_flops = flops(cases["store"]) / flops(cases["first"])
        row.reason = wrong.get("first", "") or wrong.get(row.memory, "")
    if all(row.reason for row in rows):
        return rows
    with machine.OtherWork() as others:
        times = measure(ready, protocol)
    for row in rows:
        row.others_busy = others.cores
        if not row.reason:
            row.first_ms, row.second_ms = 1e3 * times["first"].median, 1e3 * times[row.memory].median
            row.ratio = row.second_ms / row.first_ms
    return rows
