"""The sinusoid experiment of the MAML paper: several settings and seeds, beside what a reproduction
has measured.

    python bench/sinusoid.py --seeds 2 --out runs/sinusoid-table

Each run is one of `fastmeta train sinusoid`, in a folder of its own, and --resume goes on from what
is there. Writes sinusoid.csv, a row for each run and number of inner steps, as soon as it is there,
and sinusoid.png.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table

from fastmeta.cli.train import reported
from fastmeta.cli.train.reported import Setting
from fastmeta.cli.train.run import Run
from fastmeta.cli.train.sinusoid import Errors, experiment
from fastmeta.ops.divergence import named

SETTINGS = {
    "MAML, 1 step": Setting(10, 0.01, 1, False),
    "MAML, 5 steps": Setting(10, 0.01, 5, False),
    "FOMAML": Setting(10, 0.01, 1, True),
    "MAML, rate 0.001": Setting(10, 0.001, 1, False),
    "MAML, 5 shots, rate 0.001": Setting(5, 0.001, 1, False),
    "MAML, 20 shots": Setting(20, 0.01, 1, False),
}
DEFAULT = [*SETTINGS][:3]
STEPS = reported.SINUSOID_STEPS
COLUMNS = ("setting", "seed", "iterations", "seconds", "threads", "steps", "mse_mean", "mse_mean_of_rest")
COLUMNS += ("mse_median", "test_tasks", "diverged", "diverged_tasks", "reference")


class Outcome(NamedTuple):
    """One run."""

    setting: str
    seed: int
    iterations: int
    seconds: float
    errors: Errors

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Of `COLUMNS`, for every number of inner steps; the reference is a mean."""
        run = (self.setting, self.seed, self.iterations, f"{self.seconds:.1f}", torch.get_num_threads())
        for steps, reference in zip(STEPS, reported.SINUSOID[SETTINGS[self.setting]], strict=True):
            mean, median, diverged = self.errors.row(steps)
            tasks = " ".join(map(str, self.errors.diverged(steps)))
            rest, count = self.errors.rest(steps), self.errors.mse.shape[1]
            yield *run, steps, mean, rest, median, count, diverged, tasks, reference


@click.command()
@click.option(
    "--setting", "settings", type=click.Choice([*SETTINGS]), multiple=True, help=f"[default: {DEFAULT}]"
)
@click.option("--seeds", type=click.IntRange(1), default=2, help="Runs of each, from seeds 0, 1, ...")
@click.option("--iterations", type=click.IntRange(1), default=70_000)
@click.option("--tasks", type=click.IntRange(1), default=25)
@click.option("--test-tasks", type=click.IntRange(1), default=2000)
@click.option("--threads", type=click.IntRange(1), help="[default: PyTorch's]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoints that are there; else begin anew.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/sinusoid-table"))
def main(
    settings: tuple[str, ...],
    seeds: int,
    iterations: int,
    tasks: int,
    test_tasks: int,
    threads: int | None,
    resume: bool,
    out: Path,
) -> None:
    """Train and test all settings, and write the table."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    outcomes, failures = [], []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sinusoid.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name in settings or DEFAULT:
            for seed in range(seeds):
                console.print(f"{name}, seed {seed}")
                run = _run(
                    out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}",
                    iterations,
                    tasks,
                    seed,
                    resume,
                )
                try:
                    trained = experiment(
                        SETTINGS[name],
                        run,
                        console,
                        tasks=tasks,
                        eval_tasks=test_tasks,
                        eval_steps=max(STEPS),
                        outer_lr=1e-3,
                        seed=seed,
                    )
                except click.UsageError:
                    raise
                except click.ClickException as error:  # tasks diverged in training
                    failures.append(f"{name}, seed {seed}: {error.message}")
                    continue
                outcome = Outcome(name, seed, trained.state.iteration, trained.state.seconds, trained.errors)
                writer.writerows(outcome.rows())
                file.flush()
                outcomes.append(outcome)
    console.print(table(outcomes, f"query MSE over {test_tasks} test tasks, {iterations} iterations"))
    for outcome in outcomes:
        for steps in STEPS:
            if diverged := outcome.errors.diverged(steps):
                console.print(
                    f"{outcome.setting}, seed {outcome.seed}, {steps} steps: {named(diverged)} diverged"
                )
    plot(outcomes, out / "sinusoid.png")
    console.print(f"wrote {out / 'sinusoid.csv'} and {out / 'sinusoid.png'}")
    if failures:
        raise click.ClickException("; ".join(failures))


def _run(out: Path, iterations: int, tasks: int, seed: int, resume: bool) -> Run:
    settings = {"tasks": tasks, "seed": seed}
    goes_on = resume and (out / "checkpoint.pt").exists()
    return Run(out, iterations, goes_on, not goes_on, 1000, 10_000, False, settings)


def table(outcomes: list[Outcome], title: str) -> Table:
    """Errors over the test tasks, of all and of those that did not diverge: means over the seeds ±
    their deviation."""
    headings = ("setting", "seeds", "steps", "mean", "without diverged", "median", "diverged", "reference")
    table = Table(*headings, title=title, caption=f"reference: the mean of a {reported.SINUSOID_SOURCE}")
    for name, own in _by_setting(outcomes).items():
        for steps, reference in zip(STEPS, reported.SINUSOID[SETTINGS[name]], strict=True):
            means, medians, diverged = zip(*[outcome.errors.row(steps) for outcome in own], strict=True)
            errors = [_over_seeds(means), _over_seeds([outcome.errors.rest(steps) for outcome in own])]
            errors.append(_over_seeds(medians))
            table.add_row(name, str(len(own)), str(steps), *errors, str(sum(diverged)), reference)
        table.add_section()
    return table


def _over_seeds(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return (
        f"{mean} ± {statistics.stdev(values):.3f}"
        if len(values) > 1 and all(map(math.isfinite, values))
        else mean
    )


def plot(outcomes: list[Outcome], path: Path) -> None:
    """The mean error of tasks that did not diverge over the inner steps, and the reference as
    points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, own in _by_setting(outcomes).items():
        mse = [
            statistics.fmean(outcome.errors.rest(steps) for outcome in own) for steps in range(max(STEPS) + 1)
        ]
        (line,) = axes.plot(mse, label=name)
        reference = [float(text.partition(" ")[0]) for text in reported.SINUSOID[SETTINGS[name]]]
        axes.plot(STEPS, reference, "o", color=line.get_color())
    axes.set(
        xlabel="inner steps", ylabel="query MSE", yscale="log", title=f"points: {reported.SINUSOID_SOURCE}"
    )
    if outcomes:
        axes.legend()
    figure.savefig(path, dpi=120)


def _by_setting(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    return {
        name: [o for o in outcomes if o.setting == name]
        for name in dict.fromkeys(o.setting for o in outcomes)
    }


if __name__ == "__main__":
    main()
