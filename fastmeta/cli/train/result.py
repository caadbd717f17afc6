"""The result of a run as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence

from fastmeta.cli.train.run import Run


def write_result(run: Run, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write result.csv into the folder of the run."""
    with (run.out / "result.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
