"""The same meta-training twice, by fastmeta and by a plain loop over tasks: same initial weights,
same episodes.

    python bench/training_curve.py --data <folder of Omniglot's small sets> --out runs/curve

Strided Conv4, 5-way 1-shot, on the small sets of Omniglot. Both are tested on the same held-out
episodes; the time is that of training alone. Writes curve.csv and curve.png, and prints the ratio
of the times.
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.data import Episode, Episodes


class Fastmeta:
    """A training step of `fm.MAML`."""

    name = "fastmeta"

    def __init__(self, net: nn.Module, inner_lr: float) -> None:
        self.maml = fm.MAML(net, loss="cross_entropy", inner_lr=inner_lr, inner_steps=1)

    def backward(self, episode: Episode) -> None:
        """Fills the gradients."""
        self.maml(*episode).loss.backward()


class Loop:
    """The plain one: a task at a time, through autograd."""

    name = "autograd loop"

    def __init__(self, net: nn.Module, inner_lr: float) -> None:
        self.net, self.inner_lr = net, inner_lr

    def backward(self, episode: Episode) -> None:
        """Fills the gradients, task by task."""
        for support_x, support_y, query_x, query_y in zip(*episode, strict=True):
            theta = dict(self.net.named_parameters())
            loss = F.cross_entropy(functional_call(self.net, theta, support_x), support_y)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: p - self.inner_lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            query_loss = F.cross_entropy(functional_call(self.net, theta, query_x), query_y)
            (query_loss / len(episode.support_x)).backward()


@torch.no_grad()
def accuracy(net: nn.Module, episodes: Episodes, inner_lr: float, steps: int) -> tuple[float, float]:
    """Mean accuracy on the episodes and half the width of its 95 % interval, in per cent."""
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=inner_lr, inner_steps=steps)
    found: list[Tensor] = []
    for episode in episodes:
        adapted = maml.adapt(episode.support_x, episode.support_y)
        right = maml.predict(adapted, episode.query_x).argmax(-1) == episode.query_y
        found.append(100 * right.float().mean(1))
    scores = torch.cat(found)
    return float(scores.mean()), 1.96 * float(scores.std()) / math.sqrt(len(scores))


def train(
    method: type[Fastmeta] | type[Loop],
    net: nn.Module,
    data: Episodes,
    tests: Episodes,
    inner_lr: float,
    every: int,
) -> list[tuple[int, float, float, float]]:
    """(iteration, seconds of training, accuracy, interval) after every so many iterations."""
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    step, seconds, curve = method(net, inner_lr), 0.0, []
    for iteration in track(range(len(data)), description=method.name):
        episode = data[iteration]
        start = time.perf_counter()
        optimiser.zero_grad()
        step.backward(episode)
        optimiser.step()
        seconds += time.perf_counter() - start
        if (iteration + 1) % every == 0:
            curve.append((iteration + 1, seconds, *accuracy(net, tests, inner_lr, 3)))
    return curve


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="As in `fastmeta train omniglot`.")
@click.option("--iterations", type=click.IntRange(1), default=1000)
@click.option("--every", type=click.IntRange(1), default=100, help="Iterations between two tests.")
@click.option("--tasks", type=click.IntRange(1), default=16)
@click.option("--test-episodes", type=click.IntRange(2), default=100)
@click.option("--inner-lr", type=float, default=0.4)
@click.option("--width", type=click.IntRange(1), default=64)
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/curve"))
def main(
    data: Path | None,
    iterations: int,
    every: int,
    tasks: int,
    test_episodes: int,
    inner_lr: float,
    width: int,
    seed: int,
    out: Path,
) -> None:
    """Train twice and compare."""
    console = Console()
    train_set, test_set = fm.data.Omniglot.small_split(data)
    episodes = Episodes(train_set, ways=5, shots=1, query=5, tasks=tasks, iterations=iterations, seed=seed)
    tests = Episodes(
        test_set, ways=5, shots=1, query=15, tasks=10, iterations=math.ceil(test_episodes / 10), seed=seed + 1
    )
    curves = {}
    for method in (Fastmeta, Loop):
        torch.manual_seed(seed)
        net = fm.models.Conv4(5, width=width, form="strided")
        curves[method.name] = train(method, net, episodes, tests, inner_lr, every)
    write(out, console, curves)


def write(out: Path, console: Console, curves: dict[str, list[tuple[int, float, float, float]]]) -> None:
    """The table, the file and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "iteration", "seconds", "accuracy", "interval95", "threads"])
        for name, curve in curves.items():
            writer.writerows((name, *point, torch.get_num_threads()) for point in curve)
    table = Table(
        "iteration", *[f"{name}: accuracy" for name in curves], *[f"{name}: seconds" for name in curves]
    )
    for points in zip(*curves.values(), strict=True):
        scores = [f"{score:.1f} ± {interval:.1f} %" for _, _, score, interval in points]
        table.add_row(str(points[0][0]), *scores, *[f"{seconds:.1f}" for _, seconds, _, _ in points])
    console.print(table)
    ours, loop = (curve[-1] for curve in curves.values())
    console.print(
        f"time {loop[1] / ours[1]:.2f} x less, accuracy {ours[2] - loop[2]:+.1f} % against the loop"
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), (0, 1), ("iteration", "seconds of training"), strict=True
    ):
        for name, curve in curves.items():
            axes.plot([point[column] for point in curve], [point[2] for point in curve], "o-", label=name)
        axes.set(xlabel=label, ylabel="accuracy on held-out alphabets, %")
        axes.legend()
    figure.savefig(out / "curve.png", dpi=120)
    console.print(f"wrote {out / 'curve.csv'} and {out / 'curve.png'}")


if __name__ == "__main__":
    main()
