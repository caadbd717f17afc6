"""The result of a run as a CSV file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastmeta.cli.files import write_whole
from fastmeta.cli.train.metrics import csv_text
from fastmeta.cli.train.run import Run


def write_result(run: Run, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write result.csv into the folder of the run.

    Raises:
        click.ClickException: it cannot be written.
    """
    write_whole(run.out / "result.csv", csv_text([columns, *rows]))
