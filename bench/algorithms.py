"""Every algorithm on the same budget: few-shot classification of Omniglot's small sets.

    OMP_WAIT_POLICY=passive python bench/algorithms.py --out runs/algorithms \\
        --data <folder of Omniglot's small sets>

Strided Conv4, the same initial weights and the same episodes for all; tested on alphabets never
seen in training, or with --validation on alphabets kept from the training set, which is where
hyperparameters may be chosen. `bench/few_shot.py` says how each algorithm is trained. Writes
algorithms.csv, a row for each algorithm and seed as soon as it is there, and algorithms.png. The
variable keeps PyTorch's threads from spinning beside fastmeta's, which costs the algorithms that
are chains of calls a multiple of their time where other programs run.
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from few_shot import ALGORITHMS, Budget, Learner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastmeta.cli.train.omniglot import EVAL_BATCH, Accuracy, accuracies_of
from fastmeta.cli.train.run import held_out_seed
from fastmeta.data import Episode, Episodes, Omniglot
from fastmeta.ops.divergence import named

#: Alphabets of the training set that --validation tests on: 41 of its 156 characters.
VALIDATION = ("Greek", "Tagalog")
SHOTS = 1
COLUMNS = ("algorithm", "seed", "iterations", "seconds", "accuracy", "interval95", "test_tasks", "diverged")
COLUMNS += ("diverged_tasks", "notes", "settings", "source")


@dataclass
class Outcome:
    """One algorithm from one seed."""

    algorithm: str
    seed: int
    iterations: int = 0  # done
    seconds: float = 0.0  # of training
    scores: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # accuracy of each test task, 0 if it diverged
    diverged: list[int] = field(default_factory=list)  # test tasks
    notes: list[str] = field(default_factory=list)

    def row(self) -> list[object]:
        """Of `COLUMNS`; no accuracy where the training diverged."""
        accuracy = Accuracy.over(self.scores) if len(self.scores) else ("", "")
        diverged = " ".join(map(str, self.diverged))
        settings = ALGORITHMS[self.algorithm]
        done = [self.iterations, f"{self.seconds:.1f}"]
        tested = [*accuracy, len(self.scores), len(self.diverged), diverged]
        return [
            self.algorithm,
            self.seed,
            *done,
            *tested,
            "; ".join(self.notes),
            settings.settings,
            settings.source,
        ]


def train(outcome: Outcome, learner: Learner, data: Episodes) -> None:
    """Train on all of `data`; stops, with a note, where tasks diverge."""
    for iteration in track(range(len(data)), description=f"{outcome.algorithm}, seed {outcome.seed}"):
        episode = data[iteration]
        start = time.perf_counter()
        learner.optimizer.zero_grad()
        try:
            learner.loss(episode, iteration).backward()
        except FloatingPointError as error:
            outcome.notes.append(f"training ended at iteration {iteration + 1}: {error}")
            break
        learner.optimizer.step()
        if learner.schedule is not None:
            learner.schedule.step()
        outcome.seconds += time.perf_counter() - start
        outcome.iterations += 1
    if learner.note():
        outcome.notes.append(learner.note())


@torch.no_grad()
def evaluate(outcome: Outcome, learner: Learner, data: Episodes, count: int) -> None:
    """Accuracy of the first `count` test tasks; one that diverged has nothing right."""
    scores, finite = [], []
    for episode in data:
        logits = predictions(learner, episode)
        finite.append(logits.flatten(1).isfinite().all(1))
        scores.append(torch.where(finite[-1], accuracies_of(logits, episode), 0))
    outcome.scores = torch.cat(scores)[:count]
    outcome.diverged = (~torch.cat(finite)[:count]).nonzero().flatten().tolist()
    if outcome.diverged:
        outcome.notes.append(
            f"{len(outcome.diverged)} of {count} test tasks diverged: {named(outcome.diverged)}"
        )


def predictions(learner: Learner, episode: Episode) -> Tensor:
    """Logits [T, M, C]; NaN for tasks that diverged and that the learner refuses."""
    tasks = len(episode.support_x)
    try:
        return learner.predict(episode)
    except FloatingPointError:
        if tasks == 1:
            ways = int(episode.query_y.max()) + 1
            return torch.full((*episode.query_y.shape, ways), math.nan)
        return torch.cat(
            [predictions(learner, Episode(*(x[t : t + 1] for x in episode))) for t in range(tasks)]
        )


def split(data: Path | None, validation: bool) -> tuple[Omniglot, Omniglot]:
    """(training set, test set), without a common alphabet."""
    if not validation:
        return Omniglot.small_split(data)
    held = Omniglot(data, parts="background_small2", alphabets=VALIDATION)
    everything = Omniglot(data, parts="background_small2")
    rest = {name.partition("/")[0] for name in everything.classes} - {*VALIDATION}
    return Omniglot(data, parts="background_small2", alphabets=rest, rotations=(0, 90, 180, 270)), held


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="As in `fastmeta train omniglot`.")
@click.option(
    "--algorithm", "algorithms", type=click.Choice([*ALGORITHMS]), multiple=True, help="[default: all]"
)
@click.option("--iterations", type=click.IntRange(1), default=500)
@click.option("--seeds", type=click.IntRange(1), default=1, help="Runs of each, from seeds 0, 1, ...")
@click.option("--ways", type=click.IntRange(2), default=5)
@click.option("--query", type=click.IntRange(1), default=5, help="Query drawings of a class in training.")
@click.option("--tasks", type=click.IntRange(1), default=16)
@click.option("--width", type=click.IntRange(1), default=32, help="Filters.")
@click.option("--test-tasks", type=click.IntRange(2), default=600)
@click.option(
    "--test-query", type=click.IntRange(1), default=15, help="Query drawings of a class in testing."
)
@click.option(
    "--validation", is_flag=True, help=f"Keep {' and '.join(VALIDATION)} from training, test on them."
)
@click.option("--threads", type=click.IntRange(1), help="[default: PyTorch's]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/algorithms"))
def main(
    data: Path | None,
    algorithms: tuple[str, ...],
    iterations: int,
    seeds: int,
    ways: int,
    query: int,
    tasks: int,
    width: int,
    test_tasks: int,
    test_query: int,
    validation: bool,
    threads: int | None,
    out: Path,
) -> None:
    """Train and test all algorithms, and write the table."""
    if threads is not None:
        torch.set_num_threads(threads)
    train_set, test_set = split(data, validation)
    task: dict[str, int] = {"ways": ways, "shots": SHOTS}
    common = {
        **task,
        "tasks": tasks,
        "width": width,
        "tested_on": ", ".join(sorted({name.partition("/")[0] for name in test_set.classes})),
        "threads": torch.get_num_threads(),
    }
    batches = math.ceil(test_tasks / EVAL_BATCH)
    outcomes = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "algorithms.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *common])
        for seed, name in itertools.product(range(seeds), algorithms or ALGORITHMS):
            training = Episodes(train_set, **task, query=query, tasks=tasks, iterations=iterations, seed=seed)
            testing = Episodes(
                test_set,
                **task,
                query=test_query,
                tasks=EVAL_BATCH,
                iterations=batches,
                seed=held_out_seed(seed),
            )
            outcome = Outcome(name, seed)
            learner = ALGORITHMS[name].learner(Budget(ways, width, iterations, seed))
            train(outcome, learner, training)
            if outcome.iterations == iterations:
                evaluate(outcome, learner, testing, test_tasks)
            writer.writerow([*outcome.row(), *common.values()])
            file.flush()
            outcomes.append(outcome)
    console = Console()
    console.print(
        table(outcomes, f"{ways}-way {SHOTS}-shot, {iterations} iterations of {tasks} tasks, {width} filters")
    )
    for outcome in outcomes:
        for note in outcome.notes:
            console.print(f"{outcome.algorithm}, seed {outcome.seed}: {note}")
    plot(outcomes, out / "algorithms.png")
    console.print(f"wrote {out / 'algorithms.csv'} and {out / 'algorithms.png'}")


def accuracies(outcomes: Iterable[Outcome]) -> dict[str, Accuracy | None]:
    """Of each algorithm over the test tasks of all its seeds; None where no training went
    through."""
    scores: dict[str, list[Tensor]] = {}
    for outcome in outcomes:
        scores.setdefault(outcome.algorithm, []).append(outcome.scores)
    pooled = {name: torch.cat(parts) for name, parts in scores.items()}
    return {name: Accuracy.over(each) if len(each) else None for name, each in pooled.items()}


def table(outcomes: list[Outcome], title: str) -> Table:
    """A row for each algorithm, over its seeds."""
    table = Table("algorithm", "accuracy", "seeds", "diverged", "seconds", title=title)
    for name, accuracy in accuracies(outcomes).items():
        own = [outcome for outcome in outcomes if outcome.algorithm == name]
        tested = sum(len(outcome.scores) > 0 for outcome in own)
        seconds = sum(outcome.seconds for outcome in own) / len(own)
        diverged = sum(len(outcome.diverged) for outcome in own)
        table.add_row(
            name, str(accuracy or "diverged"), f"{tested} of {len(own)}", str(diverged), f"{seconds:.0f}"
        )
    return table


def plot(outcomes: list[Outcome], path: Path) -> None:
    """The accuracies and their intervals."""
    from matplotlib.figure import Figure

    shown = {name: accuracy for name, accuracy in accuracies(outcomes).items() if accuracy}
    figure = Figure(figsize=(7, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    means = [100 * accuracy.mean for accuracy in shown.values()]
    axes.errorbar(means, list(shown), xerr=[100 * accuracy.interval for accuracy in shown.values()], fmt="o")
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, %, and its 95 % interval")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
