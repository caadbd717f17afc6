"""A learned optimiser, an LSTM on coordinates, against tuned Adam on small networks:
`python examples/learned_optimizer.py [--iterations 60] [--restarts 3] [--seed 0]
[--out runs/learned_optimizer]`; needs matplotlib for the plot.

A task is a 1-20-1 network, freshly initialised, and a sinusoid to fit. The LSTM sees the gradient
of one coordinate, by log and sign, and says the step of that coordinate. It is trained through
unrolls of 10 steps, and tested on new tasks over 50. As in the paper, gradients of the small
network count as constants (order="first"), and the best of several LSTMs is taken: that of the
least loss on validation tasks. The rate of Adam is tuned on the same tasks.

What to expect: with the numbers below the mean loss over 50 steps is about a tenth less than that
of Adam. A single LSTM may well be no better than Adam. Nothing makes the steps small in the end:
after 100 steps, Adam is ahead.

Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent" (2016),
section 3 and appendix A.
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fastmeta as fm

UNROLL, STEPS = 10, 50  # of training, of the test
RATES = (0.003, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)  # of Adam

State = tuple[Tensor, Tensor]
Named = Mapping[str, Tensor]


class PerCoordinate(nn.Module):
    """theta' = theta + 0.1 out(LSTM(log |g|, sign g)), the same LSTM for every coordinate."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(2, width), nn.Linear(width, 1)

    def init(self, theta: Named) -> State:
        """Zeros for every coordinate."""
        flat = torch.cat([value.flatten() for value in theta.values()])
        zeros = flat.new_zeros(len(flat), self.cell.hidden_size)
        return zeros, zeros

    def forward(self, theta: Named, gradient: Named, state: State) -> tuple[dict[str, Tensor], State]:
        g = torch.cat([gradient[name].flatten() for name in theta])
        h, c = self.cell(preprocess(g), state)
        steps = (0.1 * self.out(h)[:, 0]).split([value.numel() for value in theta.values()])
        moved = {
            name: value + step.reshape(value.shape)
            for (name, value), step in zip(theta.items(), steps, strict=True)
        }
        return moved, (h, c)


def preprocess(g: Tensor, p: float = 10.0) -> Tensor:
    """[P] -> [P, 2], both between -1 and about 1: appendix A of the paper."""
    large = g.abs() >= math.exp(-p)
    log = g.abs().clamp_min(math.exp(-p)).log() / p
    return torch.stack((log, torch.where(large, g.sign(), math.exp(p) * g)), -1)


class Tasks(NamedTuple):
    """Networks with sinusoids to fit."""

    params: dict[str, Tensor]  # name -> [T, *shape]
    x: Tensor  # [T, 20, 1]
    y: Tensor


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))


def draw(count: int) -> Tasks:
    drawn = [dict(network().named_parameters()) for _ in range(count)]
    x = 4 * torch.rand(count, 20, 1) - 2
    return Tasks(
        {name: torch.stack([params[name].detach() for params in drawn]) for name in drawn[0]},
        x,
        torch.sin(2.5 * x - math.pi * torch.rand(count, 1, 1)),
    )


def run(
    tasks: Tasks, rule: fm.UpdateRule, rate: float, steps: int, wrt: Iterable[str] = ()
) -> fm.MetaGradient:
    """The mean loss after 0 .. `steps` steps, and its gradient by the numbers of the rule."""
    return fm.meta_gradient(
        network(),
        tasks.params,
        tasks[1:],
        tasks[1:],  # what counts is how the loss itself goes down
        loss="mse",
        lr=rate,
        steps=steps,
        update_rule=rule,
        step_weights=[1 / (steps + 1)] * (steps + 1),
        order="first",
        wrt=wrt,
    )


def learn(validation: Tasks, iterations: int, count: int, console: Console) -> tuple[PerCoordinate, float]:
    """The mean of the LSTMs of the last iterations, when the validation loss was least."""
    optimizer, mean = PerCoordinate(), PerCoordinate()
    best, least = mean, math.inf
    meta = torch.optim.Adam(optimizer.parameters(), lr=5e-3)
    for i in track(range(iterations), "meta-training", console=console):
        found = run(draw(count), fm.CustomRule(optimizer), 1.0, UNROLL, ("rule",))
        for name, value in optimizer.named_parameters():
            value.grad = found.rule[name]
        nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
        meta.step()
        with torch.no_grad():
            for average, value in zip(mean.parameters(), optimizer.parameters(), strict=True):
                average.lerp_(value, 0.1 if i >= 10 else 1.0)
        if i % 5 == 4:
            loss = run(validation, fm.CustomRule(mean), 1.0, STEPS).loss.item()
            if loss < least:
                best, least = copy.deepcopy(mean), loss
    return best, least


def curve(tasks: Tasks, rule: fm.UpdateRule, rate: float) -> Tensor:
    """The loss of each task after 0, 5, ... STEPS steps, [1 + STEPS / 5, T]."""
    runs = [
        fm.meta_gradient(
            network(),
            tasks.params,
            tasks[1:],
            tasks[1:],
            loss="mse",
            lr=rate,
            steps=k,
            update_rule=rule,
            wrt=(),
        )
        for k in range(0, STEPS + 1, 5)
    ]
    return torch.stack([one.task_losses for one in runs])


def plot(path: Path, curves: Mapping[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, losses in curves.items():
        log = losses.log10()  # the deviation of a loss that falls by powers of ten
        steps, middle, width = range(0, STEPS + 1, 5), log.mean(1), log.std(1)
        (line,) = axes.plot(steps, 10**middle, label=label)
        axes.fill_between(
            steps, 10 ** (middle - width), 10 ** (middle + width), alpha=0.2, color=line.get_color()
        )
    axes.set(xlabel="steps", ylabel="loss, geometric mean and deviation", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    iterations: int = 60, restarts: int = 3, count: int = 32, seed: int = 0, out: Path | None = None
) -> tuple[float, float]:
    """Learn, print a table, write the losses and the plot to `out`, and return the mean loss on
    held-out tasks of the LSTM and of tuned Adam."""
    torch.manual_seed(seed)
    console = Console()
    validation, held_out = draw(64), draw(64)
    learned = [learn(validation, iterations, count, console) for _ in range(restarts)]
    best = min(learned, key=lambda pair: pair[1])[0]
    rate = min(RATES, key=lambda rate: run(validation, fm.Adam(), rate, STEPS).loss.item())
    rules = {"LSTM": (fm.CustomRule(best), 1.0), f"Adam, rate {rate}": (fm.Adam(), rate)}
    means = {name: run(held_out, *given, STEPS).loss.item() for name, given in rules.items()}
    curves = {name: curve(held_out, *given) for name, given in rules.items()}
    table = Table("on held-out tasks", f"mean loss of {STEPS} steps", "loss after 10", f"after {STEPS}")
    for name, losses in curves.items():
        shown = means[name], losses[2].mean().item(), losses[-1].mean().item()
        table.add_row(name, *(f"{value:.4f}" for value in shown))
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "losses.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("optimizer", "step", "task", "loss"))
            for name, losses in curves.items():
                for step, row in enumerate(losses.tolist()):
                    writer.writerows((name, 5 * step, task, loss) for task, loss in enumerate(row))
        plot(out / "losses.png", curves)
    lstm, adam = means.values()
    return lstm, adam


@click.command()
@click.option("--iterations", default=60, show_default=True, help="Of meta-training.")
@click.option("--restarts", default=3, show_default=True, help="LSTMs, of which the best is taken.")
@click.option("--count", default=32, show_default=True, help="Tasks in an iteration.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/learned_optimizer"), show_default=True
)
def command(iterations: int, restarts: int, count: int, seed: int, out: Path) -> None:
    """A learned optimiser, an LSTM on coordinates, against tuned Adam on small networks."""
    torch.set_num_threads(1)  # on tensors this small, more of them only wait for each other
    main(iterations, restarts, count, seed, out)


if __name__ == "__main__":
    command()
