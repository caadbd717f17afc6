"""The workloads of `fastmeta bench` on this tree beside an earlier commit.

    python bench/against_commit.py --base HEAD~20 --workload sinusoid --workload mlp --steps 5

The commit is checked out and built in a folder of its own. The two are timed in turn, in processes
of their own, as often as --rounds says: fastmeta alone, each result compared with the float64
reference first. Prints for each case the median over the rounds of the medians, the smallest time,
and the ratio of the medians: above 1, this tree is slower.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import click

from fastmeta.benchmark.layers import tree_of
from fastmeta.cases.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]


def rows_of(tree: Path, arguments: list[str]) -> list[dict[str, str]]:
    """What `fastmeta bench` measures with the package in `tree`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fastmeta", "bench", "--peers", "fastmeta", "--out", f"{out}/run"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            [*command, *arguments], cwd=tree, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise click.ClickException(f"{tree}: {(done.stdout + done.stderr)[-2000:]}")
        with Path(out, "run", "bench.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["peer"] == "fastmeta"]


@click.command()
@click.option("--base", required=True, help="The commit to compare with.")
@click.option("--workload", "workloads", type=click.Choice([*WORKLOADS]), multiple=True, required=True)
@click.option("--tasks", type=int, multiple=True, help="Only cases with this many tasks; repeatable.")
@click.option("--steps", type=int, multiple=True, help="Only cases with this many inner steps; repeatable.")
@click.option("--shots", type=int, multiple=True, help="Only cases with this many support examples.")
@click.option("--threads", default=2)
@click.option("--rounds", default=3)
def main(
    base: str,
    workloads: tuple[str, ...],
    tasks: tuple[int, ...],
    steps: tuple[int, ...],
    shots: tuple[int, ...],
    threads: int,
    rounds: int,
) -> None:
    """Time this tree and an earlier commit in turn."""
    arguments = ["--quick", "--threads", str(threads)]
    for name, values in (("workload", workloads), ("tasks", tasks), ("steps", steps), ("shots", shots)):
        arguments += [word for value in values for word in (f"--{name}", str(value))]
    times: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with tree_of(base, click.echo) as tree:
        for number in range(rounds):
            order = [("base", tree), ("here", ROOT)]
            for name, where in order if number % 2 else order[::-1]:
                for row in rows_of(where, arguments):
                    times[row["case"]][name].append((float(row["median_ms"]), float(row["min_ms"])))
                click.echo(f"round {number + 1} of {rounds}: {name} done")
    click.echo(f"{'case':40} {'base ms (min)':>20} {'here ms (min)':>20} {'ratio':>7}")
    for case, found in times.items():
        middle = {name: median(value for value, _ in found[name]) for name in found}
        least = {name: min(value for _, value in found[name]) for name in found}
        cells = [f"{middle[name]:.4g} ({least[name]:.4g})" for name in ("base", "here")]
        click.echo(f"{case:40} {cells[0]:>20} {cells[1]:>20} {middle['here'] / middle['base']:7.3f}")


if __name__ == "__main__":
    main()
