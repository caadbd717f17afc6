"""One row of the result: a case and a peer."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Row:
    """Everything that is known of one peer on one case; nan where it is not known."""

    workload: str
    case: str
    peer: str
    backend: str = ""  # of fastmeta: which of them ran it
    status: str = "timed"  # "timed" | "wrong" | "broken" | "missing"
    reason: str = ""  # why it was not timed
    tasks: int = 0
    shots: int = 0
    queries: int = 0
    steps: int = 0
    precision: str = "float32"
    threads: int = 0
    error: float = math.nan  # of the meta-gradient against the float64 reference
    allowed: float = math.nan
    first_call_s: float = math.nan  # with compilation
    calls: int = 0
    median_ms: float = math.nan
    min_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    ratio: float = math.nan  # of medians, this peer over fastmeta
    gflops: float = math.nan
    peak_share: float = math.nan  # of the FMA peak measured in the same run
    beyond_us: float = math.nan  # median time outside of the kernel
    beyond_noop_us: float = math.nan  # the same less a no-op autograd Function, for MAML
    bandwidth_share: float = math.nan  # of the cache bandwidth measured in the same run, for inner steps
    peak_mib: float = math.nan  # high water of memory over the first calls, in a process of its own
    others_busy: float = math.nan  # cores that other programs kept busy while the case was timed
    peer_version: str = ""
    facts: dict[str, str] = field(default_factory=dict)


def write_csv(path: Path, rows: Iterable[Any]) -> None:
    """One line a row, of this or another dataclass with `facts`; the facts are columns too."""
    flat = []
    for row in rows:
        values = asdict(row)
        values.update(values.pop("facts"))
        flat.append({name: _text(value) for name, value in values.items()})
    columns = list(flat[0]) if flat else [f.name for f in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
