"""The workloads that are timed: the table of docs/architecture.md, "Benchmarks". To add one, add an entry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastmeta.cases.case import Case
from fastmeta.cases.networks import mlp


def _workload(
    label: str,
    widths: tuple[int, ...],
    tasks: Sequence[int],
    shots: int,
    queries: int,
    steps: Sequence[int],
    loss: str,
    lr: float,
) -> tuple[Case, ...]:
    make = partial(mlp, widths, "relu")
    return tuple(
        Case(label, make, (widths[0],), count, shots, queries, inner, loss, lr=lr, kinks=True, wrt_inputs=False)
        for count in tasks
        for inner in steps
    )


WORKLOADS: dict[str, tuple[Case, ...]] = {
    "sinusoid": _workload("sinusoid", (1, 40, 40, 1), (4, 32, 256, 1024), 10, 10, (1, 5), "mse", 0.01),
    "mlp": _workload("mlp", (784, 256, 128, 64, 64, 5), (16, 32), 5, 75, (1, 5), "ce", 0.01),
    "recommender": _workload("recommender", (128, 64, 64, 1), (32,), 20, 10, (1, 5), "mse", 0.01),
}
