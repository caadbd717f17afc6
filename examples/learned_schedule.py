"""A learned schedule of learning rates against tuned ones: a rate for each of 100 steps of SGD with
momentum, by metagradients through the training.

`python examples/learned_schedule.py [--iterations 300] [--seeds 3] [--out runs/learned_schedule]`;
needs scikit-learn, and matplotlib for the plot.

A small network learns digits, one label in five of which is wrong, from minibatches of 16. High
rates go far in few steps, but the noise of the minibatches stays in the weights until low rates
average it out. No constant rate does both.

The logarithms of the rates are learned, over many initialisations and orders of the examples, to
lower the loss on a validation set after the last step. Their mean over the later iterations is the
schedule. Constant, cosine and linear schedules are tuned on the same validation set, by a grid of
their highest rate. What is compared is the loss on a test set, over initialisations and orders that
are new to all of them; each seed has its own split, wrong labels, tuning and learning.

What to expect: about a quarter less loss than with the best constant rate, and 2 to 4 % less than
with the best cosine or linear schedule. Learning starts at the constant rate and finds the decay.
In the last steps the rates rise again, for every seed: what such a step adds is the momentum, a
mean of the gradients of several minibatches. In return, learning costs several times the grid of a
schedule with one number to tune, and only the highest rate of those schedules is tuned, not where
they begin to fall.

Source: Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible
Learning" (2015), section 3.1.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastmeta as fm

STEPS, BATCH = 100, 16
TRAIN, VALIDATION, WRONG = 1000, 400, 0.2
RULE = fm.SGD(momentum=0.9)
RATES = [10 ** (i / 10 - 2) for i in range(19)]  # 0.01 to 0.63, highest rates of the tuned schedules
TUNING, TEST = 50, 50  # trainings for each rate of the grid, for each schedule in the test

AT = (torch.arange(STEPS) + 0.5) / STEPS
SHAPES = {
    "constant": torch.ones(STEPS),
    "cosine": (1 + torch.cos(math.pi * AT)) / 2,
    "linear": 1 - AT,
}

Set = tuple[Tensor, Tensor]  # digits [N, 64] and labels [N]


class Trainings(NamedTuple):
    """Networks, and the minibatches that each of them sees."""

    params: dict[str, Tensor]  # name -> [T, *shape]
    x: Tensor  # [T, STEPS, BATCH, 64]
    y: Tensor


class Result(NamedTuple):
    """What one seed finds."""

    rates: dict[str, Tensor]  # schedule -> [STEPS]
    losses: dict[str, Tensor]  # schedule -> on the test set, [TEST]


def digits() -> tuple[Set, Set, Set]:
    """The training set, some of whose labels are wrong, the validation set and the test set."""
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order].float() / 16, y[order]
    train, validation, test = (
        (x[part], y[part])
        for part in (slice(TRAIN), slice(TRAIN, TRAIN + VALIDATION), slice(TRAIN + VALIDATION, None))
    )
    other = (train[1] + torch.randint(1, 10, (TRAIN,))) % 10
    return (train[0], torch.where(torch.rand(TRAIN) < WRONG, other, train[1])), validation, test


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


#: What is called; the parameters are those of each training. A new module would be traced anew.
NET = network()


def draw(train: Set, count: int) -> Trainings:
    """New initialisations, each with an order of the examples of its own."""
    drawn = [dict(network().named_parameters()) for _ in range(count)]
    epochs = -(-STEPS * BATCH // TRAIN)
    orders = [torch.cat([torch.randperm(TRAIN) for _ in range(epochs)]) for _ in range(count)]
    seen = torch.stack(orders)[:, : STEPS * BATCH].reshape(count, STEPS, BATCH)
    params = {name: torch.stack([params[name].detach() for params in drawn]) for name in drawn[0]}
    return Trainings(params, train[0][seen], train[1][seen])


def run(trainings: Trainings, rates: Tensor, held_out: Set, wrt: tuple[str, ...] = ()) -> fm.MetaGradient:
    """The loss of every training after its last step, and the gradient of the mean by the rates."""
    count = len(trainings.x)
    return fm.meta_gradient(
        NET,
        trainings.params,
        trainings[1:],
        tuple(part.expand(count, *part.shape) for part in held_out),
        loss="cross_entropy",
        lr=rates,
        steps=STEPS,
        update_rule=RULE,
        support_per_step=True,
        wrt=wrt,
    )


def tuned(shape: Tensor, trainings: Trainings, validation: Set) -> Tensor:
    """The rates of a schedule of this shape with the least loss."""
    losses = {rate: run(trainings, rate * shape, validation).loss.item() for rate in RATES}
    return shape * min((rate for rate in RATES if math.isfinite(losses[rate])), key=losses.__getitem__)


def learn(
    train: Set, validation: Set, start: Tensor, iterations: int, count: int, console: Console
) -> Tensor:
    """The schedule that metagradients make of `start`, [STEPS]."""
    log = start.log().requires_grad_()
    meta = torch.optim.Adam([log], lr=0.05)
    fade = torch.optim.lr_scheduler.LinearLR(meta, 1.0, 0.05, iterations)
    total, later = torch.zeros(STEPS), range(iterations // 2, iterations)
    for i in track(range(iterations), "metagradients", console=console):
        rates = log.detach().exp()
        found = run(draw(train, count), rates, validation, ("lr",))
        log.grad = found.lr * rates  # d/d log(rate) = rate * d/d rate
        meta.step()
        fade.step()
        if i in later:
            total += log.detach()
    return (total / len(later)).exp()


def one_seed(seed: int, iterations: int, count: int, console: Console) -> Result:
    """Tune and learn on one split of the digits, and test."""
    torch.manual_seed(seed)
    train, validation, test = digits()
    trainings = draw(train, TUNING)
    rates = {name: tuned(shape, trainings, validation) for name, shape in SHAPES.items()}
    rates["learned"] = learn(train, validation, rates["constant"], iterations, count, console)
    new = draw(train, TEST)
    return Result(rates, {name: run(new, each, test).task_losses for name, each in rates.items()})


def plot(path: Path, results: list[Result], means: Mapping[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, name in enumerate(means):
        for seed, result in enumerate(results):
            label = f"{name}, test loss {means[name].mean():.3f}" if seed == 0 else None
            axes.plot(range(STEPS), result.rates[name], color=f"C{i}", alpha=0.7, label=label)
    axes.set(xlabel="step", ylabel="learning rate, a line a seed", yscale="log", ylim=(3e-3, 1))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    iterations: int = 300, seeds: int = 3, count: int = 12, out: Path | None = None
) -> dict[str, Tensor]:
    """Tune, learn and test for each seed, print a table, write rates and plot to `out`, and return
    the mean loss on the test set by schedule, [seeds]."""
    console = Console()
    results = [one_seed(seed, iterations, count, console) for seed in range(seeds)]
    means = {name: torch.stack([one.losses[name].mean() for one in results]) for name in results[0].losses}
    table = Table(
        "schedule", "test loss, by seed", "deviation over trainings", "trainings where learned is better"
    )
    for name, by_seed in means.items():
        spread = torch.stack([one.losses[name].std() for one in results]).mean()
        better = torch.cat([one.losses["learned"] < one.losses[name] for one in results]).float().mean()
        shown = "" if name == "learned" else f"{better:.0%}"
        table.add_row(name, "  ".join(f"{loss:.3f}" for loss in by_seed), f"{spread:.3f}", shown)
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "rates.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("seed", "schedule", "test_loss", *(f"rate_{k}" for k in range(STEPS))))
            for seed, one in enumerate(results):
                for name, rates in one.rates.items():
                    writer.writerow((seed, name, one.losses[name].mean().item(), *rates.tolist()))
        plot(out / "rates.png", results, means)
    return means


@click.command()
@click.option("--iterations", default=300, show_default=True, help="Metagradients.")
@click.option("--seeds", default=3, show_default=True, help="Repetitions of everything.")
@click.option("--count", default=12, show_default=True, help="Trainings in a metagradient.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/learned_schedule"), show_default=True
)
def command(iterations: int, seeds: int, count: int, out: Path) -> None:
    """A learned schedule of learning rates against tuned ones."""
    torch.set_num_threads(1)  # on tensors this small, more of them only wait for each other
    main(iterations, seeds, count, out)


if __name__ == "__main__":
    command()
