"""`fastmeta cost`: what exact second order costs, in time and in memory."""

from __future__ import annotations

from math import isnan, nan
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmeta import backends
from fastmeta.benchmark import QUICK, Protocol, inner_memory, machine, orders, write_csv
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS
from fastmeta.cli import folder
from fastmeta.cli.files import told


@click.command()
@click.option(
    "--workload",
    "workloads",
    type=click.Choice(list(WORKLOADS)),
    multiple=True,
    help="Of the first table; repeatable.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 2**31 - 1),
    multiple=True,
    help="Inner steps of the second table; repeatable.",
)
@click.option("--threads", default=1, help="Cores of the first table.")
@click.option(
    "--quick", is_flag=True, help="A shorter clock, and no more than 4 tasks or the fewest there are."
)
@click.option("--out", type=folder.Folder(), default=Path("runs/cost"))
def cost(workloads: tuple[str, ...], steps: tuple[int, ...], threads: int, quick: bool, out: Path) -> None:
    """Time of second order over first order and of the first call, and peak memory over the number
    of inner steps.

    The times are those of the cpu backend; of networks that it does not take, those of the backend
    that "auto" takes.
    The memory is that of the torch backend on a small transformer, beside the loop over tasks that
    keeps one autograd graph; each figure from a process of its own. Results are compared with the
    float64 reference before they count. Writes orders.csv and memory.csv. Exit code 1 if a result
    is wrong.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        machine.check_threads(threads)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder.make(out, ("orders.csv", "memory.csv"))
    times: list[orders.OrderRow] = []
    with console.status("") as status:
        peaks = inner_memory.run(steps=steps or inner_memory.STEPS, say=status.update)
        missing = backends.get("cpu").missing()
        for name in workloads or orders.DEFAULT:
            if missing and name not in NOT_CAPTURED:
                console.print(f"no times of {name}: the cpu backend cannot run here: {missing}")
                continue
            most = max(4, min(case.tasks for case in WORKLOADS[name])) if quick else 32
            times += orders.run(
                (name,),
                threads=threads,
                most_tasks=most,
                protocol=QUICK if quick else Protocol(),
                say=status.update,
            )
    if times:
        console.print(_times(times))
        with told(out / "orders.csv", "write"):
            write_csv(out / "orders.csv", times)
    console.print(_peaks(peaks))
    with told(out / "memory.csv", "write"):
        write_csv(out / "memory.csv", peaks)
    console.print(f"wrote {escape(str(out))}")
    if any(row.reason for row in times) or any(row.reason for row in peaks):
        raise click.exceptions.Exit(1)


def _times(rows: list[orders.OrderRow]) -> Table:
    table = Table(title=f"second order over first order, float32, {rows[0].threads} thread(s)")
    table.add_column("case", no_wrap=True)
    for heading in (
        "backend",
        "memory",
        "first call s",
        "first ms",
        "second ms",
        "ratio",
        "at most",
        "by flops",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = [
            f"{row.first_call_s:.2f}",
            f"{row.first_ms:.3f}",
            f"{row.second_ms:.3f}",
            f"{row.ratio:.2f}",
        ]
        on_paper = [_number(row.limit, "g"), _number(row.by_flops if row.memory == "store" else nan, ".2f")]
        table.add_row(
            row.case, row.backend, row.memory, *([""] * len(figures) if row.reason else figures), *on_paper
        )
    busy = max(row.others_busy for row in rows)
    notes = [f"other programs kept {busy:.1f} cores busy: do not trust these times"] if busy > 0.15 else []
    table.caption = "\n".join([*notes, *(f"{row.case}: {row.reason}" for row in rows if row.reason)])
    return table


def _number(value: float, form: str) -> str:
    return "" if isnan(value) else format(value, form)


def _peaks(rows: list[inner_memory.MemoryRow]) -> Table:
    """One line for each way, one column for each number of inner steps."""
    counts = list(dict.fromkeys(row.steps for row in rows))
    table = Table(title=f"peak MiB of a meta-gradient, {rows[0].case}, float32")
    table.add_column("way", no_wrap=True)
    for count in counts:
        table.add_column(f"K = {count}", justify="right", no_wrap=True)
    for way in dict.fromkeys(row.way for row in rows):
        table.add_row(way, *(f"{row.peak_mib:.1f}" for row in rows if row.way == way))
    first = rows[0].way
    table.add_row(
        "theta_0 .. theta_K alone", *(f"{row.checkpoints_mib:.1f}" for row in rows if row.way == first)
    )
    table.caption = "\n".join(f"{row.way}, K = {row.steps}: {row.reason}" for row in rows if row.reason)
    return table
