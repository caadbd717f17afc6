"""The metrics of a run: a CSV file, and TensorBoard where asked for."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from fastmeta.cli.files import told, write_all, write_whole
from fastmeta.cli.folder import check_file
from fastmeta.cli.train.run import Run


class Metrics:
    """Writes a row for each logged iteration to metrics.csv, and to TensorBoard if asked for.

    A checkpoint holds all rows up to its iteration. When a run goes on, the file is written again
    from them, so no row is lost by a crash or by a change of the file.

    Args:
        run: its folder must exist.
        columns: names of the metrics, after `iteration`.
        rows: those of the checkpoint that the run goes on from; new rows are appended to this list
            too.
        start: the iteration that the run starts at; rows after it, from a run that was cut off, are
            dropped.

    Raises:
        click.ClickException: the file cannot be written, or is not one that this run wrote.
        click.UsageError: TensorBoard is wanted and not installed.
    """

    def __init__(self, run: Run, columns: Sequence[str], rows: list[list[float]], start: int) -> None:
        self._path = run.out / "metrics.csv"
        self._state = rows
        writer = summary_writer() if run.tensorboard else None
        content = csv_text([["iteration", *columns], *rows])
        if not run.overwrite:
            self._compare(content, start)
        self._board = None if writer is None else _board(writer, run.out, start)
        write_whole(self._path, content)
        with told(self._path, "write"):
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """One row.

        Raises:
            click.ClickException: it cannot be written.
        """
        row = [iteration, *values.values()]
        self._state.append(row)
        with told(self._path, "write"):
            write_all(self._file, csv_text([row]))
        if self._board is not None:
            with told(self._path.parent, "write into"):
                for name, value in values.items():
                    self._board.add_scalar(name, value, iteration)

    def _compare(self, content: bytes, start: int) -> None:
        """Accept a file that begins with `content`, or that a crash or a full disk has cut off.


        Raises:
            click.ClickException: the file holds something else, which is not overwritten.
        """
        check_file(self._path)
        with told(self._path, "read"):
            # After a power failure some file systems have zeros where data did not reach the disk.
            held = self._path.read_bytes().rstrip(b"\0") if self._path.exists() else b""
        held, content = held.replace(b"\r\n", b"\n"), content.replace(b"\r\n", b"\n")
        if held.startswith(content):
            return
        if content.startswith(held.rstrip(b"\r")):
            if start:
                there = max(held.count(b"\n") - 1, 0)
                click.echo(f"{self._path} held {there} of {len(self._state)} rows: written anew", err=True)
            return
        lines = zip(content.splitlines(), [*held.splitlines(), b""], strict=False)
        number, (wanted, got) = next((n, pair) for n, pair in enumerate(lines, start=1) if pair[0] != pair[1])
        way_out = "move it away" if start else "move it away, or pass --overwrite"
        raise click.ClickException(
            f"{self._path} is not what this run wrote: line {number} should be {_shown(wanted)}, is "
            f"{_shown(got)}; {way_out}, and it is written anew"
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if self._board is not None:
            with told(self._path.parent, "write into"):
                self._board.close()


def csv_text(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as lines of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


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


def _board(writer: Any, out: Path, start: int) -> Any:
    with told(out, "write into"):
        try:
            return writer(str(out), purge_step=start + 1)
        except UnicodeEncodeError as error:
            message = (
                f"--tensorboard: TensorBoard writes only into folders whose names are UTF-8, {out} is not"
            )
            raise click.ClickException(message) from error


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "backslashreplace"))
