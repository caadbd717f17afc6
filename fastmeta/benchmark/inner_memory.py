"""Peak memory over the number of inner steps: the `torch` backend beside the loop that keeps one
graph of everything.

Each cell is measured in a process of its own,
`python -m fastmeta.benchmark.inner_memory <steps> <way>`: what another cell left in the allocator
would hide what this one needs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastmeta.benchmark import check, machine
from fastmeta.benchmark.cost import parameter_bytes
from fastmeta.benchmark.memory import ALLOCATOR
from fastmeta.benchmark.peers import Peer
from fastmeta.benchmark.peers.autograd_loop import AutogradLoop
from fastmeta.benchmark.peers.ours import MetaGradientPeer
from fastmeta.cases import Case
from fastmeta.cases.workloads import WORKLOADS

WORKLOAD = "transformer-wide"
STEPS = (1, 5, 20)

#: Every way to run a case: (the peer, its `memory=`).
WAYS: dict[str, tuple[Peer, str]] = {
    "recompute": (MetaGradientPeer("fastmeta-torch", "torch"), "recompute"),
    "recompute, a task at a time": (MetaGradientPeer("fastmeta-torch", "torch", task_chunk=1), "recompute"),
    "store": (MetaGradientPeer("fastmeta-torch", "torch"), "store"),
    "autograd loop": (AutogradLoop(), "auto"),
}


@dataclass(slots=True)
class MemoryRow:
    """The high water of one way at one number of inner steps."""

    case: str
    way: str
    steps: int
    peak_mib: float  # above the level before the first call
    checkpoints_mib: float  # theta_0 .. theta_K of all tasks, in every way needed
    error: float = math.nan  # of the meta-gradient against the float64 reference
    allowed: float = math.nan
    reason: str = ""  # why there is no peak
    facts: dict[str, str] = field(default_factory=dict)


def run(
    ways: Sequence[str] = tuple(WAYS),
    steps: Sequence[int] = STEPS,
    say: Callable[[str], None] = lambda _: None,
) -> list[MemoryRow]:
    """A row for each way and number of inner steps; a way whose gradient is wrong is not measured.

    Args:
        ways: names in `WAYS`.
        steps: numbers of inner steps.
        say: told what goes on.
    """
    facts = machine.facts()
    rows = []
    for way in ways:
        for count in steps:
            say(f"memory: {way}, K = {count}")
            case = _case(count, way)
            # theta_0 is shared by all tasks, but each steps on from a copy
            checkpoints = (count + 1) * case.tasks * parameter_bytes(case.make())
            row = MemoryRow(case.id, way, count, math.nan, checkpoints / 2**20, facts=facts)
            rows.append(row)
            command = [sys.executable, "-m", "fastmeta.benchmark.inner_memory", str(count), way]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR}
            )
            if done.returncode:
                row.reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                continue
            peak, row.error, row.allowed = map(float, done.stdout.split())
            if row.error <= row.allowed:
                row.peak_mib = peak / 2**20
            else:
                row.reason = f"error {row.error:.1e} against the float64 reference, allowed {row.allowed:.1e}"
    return rows


def _case(steps: int, way: str) -> Case:
    return replace(WORKLOADS[WORKLOAD][0], steps=steps, memory=WAYS[way][1])


def _cell(steps: int, way: str) -> tuple[float, float, float]:
    """(bytes of the first call's high water, error of its result, error allowed), on one thread."""
    torch.set_num_threads(1)
    machine.twice_differentiable()
    case, peer = _case(steps, way), WAYS[way][0]
    small = replace(case, tasks=1, shots=1, queries=1, steps=1)
    peer.prepare(small, small.build(torch.float32, 0)).step()  # loads whatever a first call loads
    prepared = peer.prepare(case, case.build(torch.float32, 0))
    with machine.PeakMemory() as memory:
        out = prepared.step()
    verdict = check.judge(case, {0: prepared}, {0: out})
    return memory.growth, verdict.error, verdict.allowed


if __name__ == "__main__":
    print(*_cell(int(sys.argv[1]), sys.argv[2]))
