"""`fastmeta verify`: every backend against the float64 reference."""

from __future__ import annotations

import math
from collections import defaultdict

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from fastmeta import backends
from fastmeta.cases import VERIFICATION
from fastmeta.verify import DTYPES, Row, present
from fastmeta.verify import verify_case as run_case


@click.command()
@click.option(
    "--backend", "names", type=click.Choice(backends.NAMES), multiple=True, help="Only this one; repeatable."
)
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Only this one; repeatable."
)
@click.option("--case", "pattern", default="", help="Only cases whose name contains this.")
@click.option("--all", "every", is_flag=True, help="A line for every comparison too.")
@click.option("--list", "only_list", is_flag=True, help="List the cases and stop.")
def verify(
    names: tuple[str, ...], dtypes: tuple[str, ...], pattern: str, every: bool, only_list: bool
) -> None:
    """Compare every backend present, in value and in every gradient, with the float64 reference.

    In float64 the relative error may be 1e-9; in float32 twice the error that PyTorch itself makes,
    plus 4 eps (4.8e-7). Exit code 1 if anything fails.
    """
    console = Console()
    cases = [case for case in VERIFICATION if pattern in case.id]
    if not cases:
        raise click.UsageError(f"--case: no case has {pattern!r} in its name; --list shows them")
    if only_list:
        for case in cases:
            click.echo(case.id)
        return
    for name in names:
        reason = backends.get(name).missing()
        if reason:
            raise click.ClickException(f"backend {name!r} cannot run here: {reason}")
    jobs = [
        (case, name, dtype) for case in cases for name in names or present() for dtype in dtypes or DTYPES
    ]
    rows: list[Row] = []
    for case, name, dtype in track(jobs, "verifying", console=console):
        rows += run_case(case, name, dtype)

    console.print(_table(rows))
    failed = [row for row in rows if not row.passed]
    for row in rows if every else failed:
        click.echo(str(row))
    skipped = sum(row.skipped for row in rows)
    ran = len(rows) - skipped
    for name, reasons in _refusals(rows).items():
        console.print(f"{name} skipped {sum(reasons.values())} of {len(jobs)} cases and dtypes:", style="dim")
        for reason, count in reasons.items():
            console.print(f"  {count} x {escape(reason)}", style="dim", highlight=False)
    console.print(f"{len(cases)} cases, {ran} comparisons, {len(failed)} failed, {skipped} calls skipped")
    if failed or not ran:
        raise click.exceptions.Exit(1)


def _badness(row: Row) -> float:
    """How far a row is towards failing; NaN is the worst."""
    badness = row.error / row.allowed if row.allowed else math.inf
    return math.inf if math.isnan(badness) else badness


def _worst(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    """By backend, dtype and kind of quantity: the row nearest to failing."""
    groups: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.skipped:
            continue
        # "d_params 0.weight, median of 20" is of the kind "d_params".
        kind = (row.backend, row.dtype, row.quantity.partition(",")[0].partition(" ")[0])
        if kind not in groups or _badness(row) > _badness(groups[kind]):
            groups[kind] = row
    return dict(sorted(groups.items()))


def _refusals(rows: list[Row]) -> dict[str, dict[str, int]]:
    """For each backend: why it skipped a call, and how often."""
    refusals: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        if row.skipped:
            refusals[row.backend][row.note] += 1
    return refusals


def _table(rows: list[Row]) -> Table:
    """The worst of each quantity."""
    table = Table(
        title="relative error against the float64 reference, the worst of all cases",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("backend", "dtype", "quantity"):
        table.add_column(heading)
    for heading in ("error", "PyTorch's\nown", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for (backend, dtype, quantity), row in _worst(rows).items():
        own = "" if math.isnan(row.own) else f"{row.own:.1e}"
        verdict = "[green]passed" if row.passed else "[red]FAILED"
        table.add_row(
            backend, dtype, escape(quantity), f"{row.error:.1e}", own, f"{row.allowed:.1e}", verdict
        )
    return table
