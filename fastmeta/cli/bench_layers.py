"""`fastmeta bench --layer`: the cases of layer kinds, beside an earlier measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmeta.benchmark import QUICK, Protocol, layers, machine, write_csv
from fastmeta.benchmark.layers import LayerRow
from fastmeta.cli import folder
from fastmeta.cli.files import told


def bench_layers(
    console: Console,
    kinds: Sequence[str],
    backend: str,
    tasks: Sequence[int],
    threads: int,
    quick: bool,
    base: str,
    out: Path,
) -> None:
    """Time, compare, print and write layers.csv.

    Args:
        console: where to print.
        kinds, backend, threads: as `fastmeta.benchmark.layers.run` takes them.
        tasks: none or one number.
        quick: a shorter clock.
        base: a commit, a file, or "".
        out: the folder of the file.

    Raises:
        click.ClickException: something asked for is not there.
    """
    try:
        machine.check_threads(threads)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder.make(out, ("layers.csv",))
    count = tasks[0] if tasks else layers.TASKS
    try:
        with console.status("") as status:
            earlier: list[LayerRow] = []
            if base and not Path(base).is_file():
                asked = [f"--layer={kind}" for kind in kinds]
                asked += [f"--backend={backend}", f"--tasks={count}", f"--threads={threads}"]
                with layers.tree_of(base, status.update) as tree:
                    status.update(f"timing {base}")
                    earlier = layers.run_in(tree, [*asked, *["--quick"] * quick])
            elif base:
                with told(Path(base), "read"):
                    earlier = layers.read_csv(Path(base))
            rows = layers.run(
                kinds,
                backend=backend,
                tasks=count,
                threads=threads,
                protocol=QUICK if quick else Protocol(),
                say=status.update,
            )
        if base:
            layers.compare(rows, earlier)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console.print(_table(rows, base))
    for row in rows:
        if row.status != "timed":
            console.print(f"{row.case}, {row.what}: {row.status}, {row.reason}", markup=False)
    with told(out / "layers.csv", "write"):
        write_csv(out / "layers.csv", rows)
    console.print(f"wrote {escape(str(out / 'layers.csv'))}")
    if any(row.status == "wrong" for row in rows) or not any(row.status == "timed" for row in rows):
        raise click.exceptions.Exit(1)


def _table(rows: Sequence[LayerRow], base: str) -> Table:
    table = Table(title=f"float32, {rows[0].tasks} tasks, {rows[0].threads} threads")
    table.add_column("case", overflow="fold")
    headings = ("", "backend", "median ms", "min")
    more = ("base median", "base min", "ratio", "of minima") if base else ()
    for heading in (*headings, *more):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.status != "timed":
            continue
        before = (row.base_median_ms, row.base_min_ms)
        ratios = (row.ratio, row.ratio_of_minima)
        cells = [row.case, row.what, row.backend, _number(row.median_ms, ".4f"), _number(row.min_ms, ".4f")]
        if base:
            cells += [_number(value, ".4f") for value in before] + [_number(value, ".2f") for value in ratios]
        table.add_row(*cells)
    return table


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
