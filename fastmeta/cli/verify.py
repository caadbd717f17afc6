"""`fastmeta verify`: every backend against the float64 reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from fastmeta import backends
from fastmeta.cases.verification import VERIFICATION
from fastmeta.layers.registry import KINDS
from fastmeta.verify import DTYPES, Row, present
from fastmeta.verify import verify_case as run_case
from fastmeta.verify.layer import examples
from fastmeta.verify.layer import verify_example as run_layer


@click.command()
@click.option(
    "--backend",
    "names",
    type=click.Choice(backends.NAMES),
    multiple=True,
    help="Only this one; repeatable. inductor, which compiles every case for long, runs only so.",
)
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Only this one; repeatable."
)
@click.option("--case", "pattern", default="", help="Only cases whose name contains this.")
@click.option(
    "--layer",
    "layers",
    type=click.Choice(list(KINDS)),
    multiple=True,
    help="Instead of the cases: layers of this kind alone; repeatable.",
)
@click.option("--all", "every", is_flag=True, help="A line for every comparison too.")
@click.option("--list", "only_list", is_flag=True, help="List the cases and stop.")
def verify(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    pattern: str,
    layers: tuple[str, ...],
    every: bool,
    only_list: bool,
) -> None:
    """Compare every backend present, in value and in every gradient, with the float64 reference.

    In float64 the relative error may be 1e-9; in float32 twice the error that PyTorch itself makes,
    plus 4 eps (4.8e-7). Exit code 1 if anything fails.

    With --layer the layers of a kind are compared one by one, each of their four functions with
    torch.func: forward, vjp, jvp, and the jvp of the vjp.
    """
    console = Console()
    cases = {id: run for id, run in _cases(layers).items() if pattern in id}
    if not cases:
        raise click.UsageError(f"--case: no case has {pattern!r} in its name; --list shows them")
    if only_list:
        for id in cases:
            click.echo(id)
        return
    for name in names:
        reason = backends.get(name).missing()
        if reason:
            raise click.ClickException(f"backend {name!r} cannot run here: {reason}")
    jobs = [
        partial(run, name, dtype)
        for run in cases.values()
        for name in names or present()
        for dtype in dtypes or DTYPES
    ]
    rows: list[Row] = []
    for job in track(jobs, "verifying", console=console):
        rows += job()

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


def _cases(layers: tuple[str, ...]) -> dict[str, Callable[[str, str], list[Row]]]:
    """Name -> what gives the rows of a backend and a dtype: of the cases, or of layers alone."""
    if not layers:
        return {case.id: partial(run_case, case) for case in VERIFICATION}
    chosen = [(kind, example) for kind in layers for example in examples(kind)]
    return {f"{kind} {example.label}": partial(run_layer, kind, example) for kind, example in chosen}


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
