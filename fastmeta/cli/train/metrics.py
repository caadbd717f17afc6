"""The metrics of a run: a CSV file, and TensorBoard where asked for."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import click

from fastmeta.cli.train.run import Run


class Metrics:
    """Writes one row per logged iteration to metrics.csv, and scalars for TensorBoard if the run wants them.

    Args:
        run: its folder must exist.
        columns: names of the metrics, after `iteration`.
        start: the iteration the run starts at; rows behind it, left by a run that was cut off, are dropped.
    """

    def __init__(self, run: Run, columns: Sequence[str], start: int) -> None:
        path = run.out / "metrics.csv"
        kept: list[dict[str, str]] = []
        if start and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["iteration"]) <= start]
        self._file = path.open("w", newline="")
        self._rows = csv.DictWriter(self._file, ["iteration", *columns])
        self._rows.writeheader()
        self._rows.writerows(kept)
        self._board = summary_writer()(str(run.out), purge_step=start + 1) if run.tensorboard else None

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._rows.writerow({"iteration": iteration, **values})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def summary_writer() -> Any:
    """TensorBoard's writer class.

    Raises:
        click.UsageError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = "--tensorboard needs the package tensorboard: pip install 'fastmeta[tensorboard]'"
        raise click.UsageError(message) from error
    return SummaryWriter
