"""Peak memory of a peer's first meta-step, each in a fresh process: one that has worked before
hides what it reuses."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from fastmeta.benchmark import machine
from fastmeta.benchmark.peers import PEERS
from fastmeta.cases.workloads import WORKLOADS

#: glibc gives memory back to the system as soon as it is free, so that the high water is that of
#: what is in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def peak_bytes(workload: str, case: str, peer: str, threads: int) -> float:
    """By how much the first meta-steps raise the process's high water of resident memory, inputs
    and parameters not counted, what the peer compiles counted; nan where the system does not tell.

    Raises:
        RuntimeError: the peer broke.
    """
    command = (
        f"from fastmeta.benchmark.memory import report; report({workload!r}, {case!r}, {peer!r}, {threads})"
    )
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{peer} broke in a process of its own: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1])


def report(workload: str, case_id: str, peer: str, threads: int) -> None:
    """What that process does."""
    machine.limit(threads)
    machine.twice_differentiable()
    case = next(case for case in WORKLOADS[workload] if case.id == case_id)
    prepared = PEERS[peer].prepare(case, case.build(torch.float32, 0))
    with machine.PeakMemory() as memory:
        prepared.step()
        prepared.step()
    print(memory.growth)
