"""`fastmeta bench`: fastmeta and its peers side by side."""

from __future__ import annotations

import math
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmeta.benchmark import PEERS, QUICK, Protocol, Row, engine, machine, run, write_chart, write_csv
from fastmeta.cases.workloads import NOT_CAPTURED, WORKLOADS
from fastmeta.cli import folder
from fastmeta.cli.bench_layers import bench_layers
from fastmeta.cli.files import told
from fastmeta.layers.registry import KINDS

#: Columns of the tables where the output is no terminal.
WIDTH = 140
#: Cores that other programs may keep busy without a warning.
BUSY = 0.15


@click.command()
@click.option(
    "--workload", "workloads", type=click.Choice(list(WORKLOADS)), multiple=True, help="Repeatable."
)
@click.option("--tasks", type=int, multiple=True, help="Only cases with this many tasks; repeatable.")
@click.option(
    "--shots", type=int, multiple=True, help="Only cases with this many support examples; repeatable."
)
@click.option("--steps", type=int, multiple=True, help="Only cases with this many inner steps; repeatable.")
@click.option("--threads", default=2, help="Cores that all peers are kept to.")
@click.option(
    "--peers",
    default="",
    help="Names, separated by commas; without it all that are installed, but not torch.compile on "
    "networks that it takes minutes for.",
)
@click.option(
    "--quick", is_flag=True, help="A shorter clock; at most 32 tasks unless --tasks says otherwise."
)
@click.option("--out", type=folder.Folder(), default=Path("runs/bench"))
@click.option(
    "--layer",
    "layers",
    type=click.Choice(list(KINDS)),
    multiple=True,
    help="Instead of workloads and peers: fastmeta on the cases of this layer kind; repeatable.",
)
@click.option("--backend", default="auto", help="With --layer: the backend.")
@click.option("--base", default="", help="With --layer: a commit, or a layers.csv, to compare with.")
def bench(
    workloads: tuple[str, ...],
    tasks: tuple[int, ...],
    shots: tuple[int, ...],
    steps: tuple[int, ...],
    threads: int,
    peers: str,
    quick: bool,
    out: Path,
    layers: tuple[str, ...],
    backend: str,
    base: str,
) -> None:
    """Time the meta-gradient of fastmeta and of other libraries in one process on the same tensors.

    Every peer's result is compared with the float64 reference first; one that is wrong is not
    timed. Writes bench.csv and bench.png. Exit code 1 if fastmeta itself was wrong or broke.

    With --layer: the time of the forward pass and of all gradients of each case of a layer kind,
    beside that of another commit or of an earlier layers.csv. Writes layers.csv.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if layers:
        if workloads or peers or shots or steps or len(tasks) > 1:
            raise click.UsageError(
                "--layer goes with --tasks (once), --threads, --quick, --backend and --base"
            )
        bench_layers(console, layers, backend, tasks, threads, quick, base, out)
        return
    if base or backend != "auto":
        raise click.UsageError("--base and --backend go with --layer")
    named = [name.strip() for name in peers.split(",") if name.strip()]
    names = named or list(PEERS)
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise click.UsageError(
            f"--peers: no peer is called {', '.join(unknown)}; there are {', '.join(PEERS)}"
        )
    chosen: dict[str, tuple[int, ...]] = {}
    for workload in workloads or tuple(WORKLOADS):
        few = tuple({case.tasks for case in WORKLOADS[workload] if case.tasks <= 32})
        chosen[workload] = tasks or (few if quick else ())
    # Before anything is timed: a mistake shows at once, not after the workloads that are right.
    try:
        machine.check_threads(threads)
        for workload, counts in chosen.items():
            engine.select(workload, counts, shots, steps)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder.make(out, ("bench.csv", "bench.png"))
    rows: list[Row] = []
    with console.status("") as status:
        for workload, counts in chosen.items():
            rows += run(
                workload,
                tasks=counts,
                shots=shots,
                steps=steps,
                threads=threads,
                peers=named
                or [name for name in names if name != "torch.compile" or workload not in NOT_CAPTURED],
                protocol=QUICK if quick else Protocol(),
                say=status.update,
            )
    _report(console, rows)
    with told(out / "bench.csv", "write"):
        write_csv(out / "bench.csv", rows)
    console.print(f"wrote {escape(str(out / 'bench.csv'))}")
    try:
        with told(out / "bench.png", "write"):
            write_chart(out / "bench.png", rows)
        console.print(f"wrote {escape(str(out / 'bench.png'))}")
    except ImportError as error:
        console.print(f"no chart: {error}; pip install 'fastmeta[plot]'", markup=False)
    if any(row.peer.startswith("fastmeta") and row.status in ("wrong", "broken") for row in rows):
        raise click.exceptions.Exit(1)


def _report(console: Console, rows: list[Row]) -> None:
    facts = rows[0].facts
    console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value), highlight=False)
    for case in dict.fromkeys(row.case for row in rows):
        console.print(_table(case, [row for row in rows if row.case == case]))


def _table(case: str, rows: list[Row]) -> Table:
    table = Table(title=f"{case}, {rows[0].precision}, {rows[0].threads} threads")
    table.add_column("peer", no_wrap=True)
    for heading in (
        "median ms",
        "min",
        "p20 - p80",
        "ratio",
        "GFLOP/s",
        "of peak",
        "beyond us",
        "error",
        "first s",
        "MiB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    timed = sorted((row for row in rows if row.status == "timed"), key=lambda row: row.median_ms)
    for row in timed:
        own = row.backend and not row.peer.endswith(row.backend)
        table.add_row(
            f"{row.peer} ({row.backend})" if own else row.peer,
            _number(row.median_ms, ".3f"),
            _number(row.min_ms, ".3f"),
            f"{row.p20_ms:.3f} - {row.p80_ms:.3f}",
            _number(row.ratio, ".2f"),
            _number(row.gflops, ".1f"),
            _number(row.peak_share, ".0%"),
            _number(row.beyond_us, ".0f"),
            _number(row.error, ".1e"),
            _number(row.first_call_s, ".2f"),
            _number(row.peak_mib, ".0f"),
        )
    busy = max((row.others_busy for row in timed), default=0.0)
    notes = [f"other programs kept {busy:.1f} cores busy: do not trust these times"] if busy > BUSY else []
    notes += [f"{row.peer}: {row.status}, {row.reason}" for row in rows if row.status != "timed"]
    for row in timed:
        if not math.isnan(row.beyond_noop_us):
            notes.append(
                f"{row.peer}: {row.beyond_noop_us:+.0f} us beyond kernel and no-op autograd Function"
            )
        if not math.isnan(row.bandwidth_share):
            notes.append(
                f"{row.peer}: inner steps stream weights at {row.bandwidth_share:.0%} of the cache bandwidth"
            )
    table.caption = "\n".join(notes)
    return table


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
