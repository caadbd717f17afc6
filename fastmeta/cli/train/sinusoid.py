"""`fastmeta train sinusoid`: regression of sinusoids, the first experiment of the MAML paper."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.cli import folder, memory
from fastmeta.cli.train import plots, reported
from fastmeta.cli.train.checkpoint import State
from fastmeta.cli.train.inner import RULES, rule_option
from fastmeta.cli.train.loop import FILES, fit
from fastmeta.cli.train.result import write_result
from fastmeta.cli.train.run import COUNT, Finite, Run, held_out_seed, run_options
from fastmeta.data.sinusoid import BLOCK

#: A query MSE above this has diverged: predicting zero gives 12.5 at most, at amplitude 5.
DIVERGED = 100.0

#: Query points of a test task: more than in training, for a mean with less noise and no shift.
TEST_QUERY = 50


class Errors(NamedTuple):
    """Query MSE of the test tasks after each number of inner steps."""

    mse: Tensor  # [eval_steps + 1, tasks]

    def row(self, steps: int) -> tuple[float, float, int]:
        """Mean, median and diverged tasks after `steps` inner steps; NaN counts as diverged."""
        mse = self.mse[steps]
        return float(mse.mean()), float(mse.nanmedian()), len(self.diverged(steps))

    def rest(self, steps: int) -> float:
        """Mean over the tasks that did not diverge after `steps` inner steps; NaN if all did."""
        mse = self.mse[steps]
        return float(mse[mse <= DIVERGED].mean())

    def diverged(self, steps: int) -> list[int]:
        """The tasks that diverged after `steps` inner steps."""
        return (~(self.mse[steps] <= DIVERGED)).nonzero().flatten().tolist()


@click.command()
@click.option("--shots", type=COUNT, default=10, help="Support points of a task, and query points.")
@click.option("--inner-lr", type=Finite(), default=0.01, help="Inner learning rate.")
@click.option("--inner-steps", type=click.IntRange(0, COUNT.max), default=1, help="Inner steps in training.")
@rule_option
@click.option("--first-order", is_flag=True, help="First-order MAML.")
@click.option("--tasks", type=COUNT, default=25, help="Tasks of a meta-batch.")
@click.option("--eval-tasks", type=COUNT, default=2000, help="Test tasks.")
@click.option("--eval-steps", type=COUNT, default=10, help="Inner steps in testing.")
@run_options(iterations=70_000, out="runs/sinusoid")
def sinusoid(
    shots: int,
    inner_lr: float,
    inner_steps: int,
    inner_rule: str,
    first_order: bool,
    tasks: int,
    eval_tasks: int,
    eval_steps: int,
    outer_lr: float,
    seed: int,
    backend: str,
    run: Run,
) -> None:
    """Regression of sinusoids with a 1-40-40-1 network.

    Finn, Abbeel, Levine (2017), section 5.1.
    """
    console = Console()
    setting = reported.Setting(shots, inner_lr, inner_steps, first_order, inner_rule)
    console.print(
        f"{shots}-shot sinusoids, {tasks} tasks, {torch.get_num_threads()} threads, run in "
        f"{escape(str(run.out))}"
    )
    # Of the tasks drawn together (float64), and of the weights after every inner step.
    memory.need(8 * BLOCK * tasks * 2 * shots, "--tasks and --shots")
    memory.need(8 * BLOCK * eval_tasks * (shots + TEST_QUERY), "--eval-tasks and --shots")
    memory.need(4 * sum(map(Tensor.numel, network(seed).parameters())) * inner_steps, "--inner-steps")
    folder.make(run.out, FILES)
    with folder.locked(run.out):
        maml, test, errors, state = experiment(
            setting,
            run,
            console,
            tasks=tasks,
            eval_tasks=eval_tasks,
            eval_steps=eval_steps,
            outer_lr=outer_lr,
            seed=seed,
            backend=backend,
        )
        console.print(f"{state.iteration} iterations in {state.seconds:.1f} s")
        console.print(table(errors, reported.SINUSOID.get(setting)))
        write_result(
            run,
            ["steps", "mse_mean", "mse_median", "diverged"],
            [(steps, *errors.row(steps)) for steps in range(eval_steps + 1)],
        )
        _plot(maml, test, errors, run.out / "adaptation.png", console)


class Trained(NamedTuple):
    """The result of an experiment."""

    maml: fm.MAML
    test: fm.data.Sinusoid  # one meta-batch, all test tasks
    errors: Errors  # of the test tasks
    state: State


def experiment(
    setting: reported.Setting,
    run: Run,
    console: Console,
    *,
    tasks: int,
    eval_tasks: int,
    eval_steps: int,
    outer_lr: float,
    seed: int,
    backend: str = "auto",
) -> Trained:
    """Train MAML in a setting and test it; arguments and errors are the command's and `fit`'s."""
    maml = fm.MAML(
        network(seed),
        loss="mse",
        inner_lr=setting.inner_lr,
        inner_steps=setting.inner_steps,
        order="first" if setting.first_order else "second",
        update_rule=RULES[setting.inner_rule](),
        backend=backend,
    )
    data = fm.data.Sinusoid(tasks, setting.shots, iterations=run.iterations, seed=seed)
    state = fit(maml, data, run, outer_lr, console)
    test = fm.data.Sinusoid(eval_tasks, setting.shots, TEST_QUERY, iterations=1, seed=held_out_seed(seed))
    return Trained(maml, test, evaluate(maml, test[0], eval_steps), state)


def network(seed: int) -> nn.Sequential:
    """1-40-40-1 with ReLU; weights normal (deviation 0.01, cut at two deviations), biases zero.

    Source: code of Finn et al. 2017 (cbfinn/maml, `construct_fc_weights`).
    """
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02)
    return net


@torch.no_grad()
def evaluate(maml: fm.MAML, episode: fm.data.Episode, steps: int) -> Errors:
    """Query MSE of every task of `episode` after 0 .. `steps` inner steps."""
    mse = []
    for k in range(steps + 1):
        adapted = maml.adapt(episode.support_x, episode.support_y, steps=k)
        predicted = maml.predict(adapted, episode.query_x)  # [T, M, 1]
        mse.append((predicted - episode.query_y).square().mean(dim=(1, 2)))
    return Errors(torch.stack(mse))


def table(errors: Errors, others: tuple[str, ...] | None) -> Table:
    """The result, next to that of a reproduction of the paper if there is one for this setting."""
    tasks = errors.mse.shape[1]
    table = Table(title=f"query MSE over {tasks} test tasks")
    for heading in ("inner steps", "mean", "median", "diverged"):
        table.add_column(heading, justify="right")
    if others:
        table.add_column(reported.SINUSOID_SOURCE, justify="right")
    last = len(errors.mse) - 1
    for steps in sorted({*(k for k in reported.SINUSOID_STEPS if k <= last), last}):
        mean, median, diverged = errors.row(steps)
        cells = [str(steps), f"{mean:.3f}", f"{median:.3f}", str(diverged)]
        if others:
            cells.append(dict(zip(reported.SINUSOID_STEPS, others, strict=True)).get(steps, ""))
        table.add_row(*cells)
    return table


@torch.no_grad()
def _plot(maml: fm.MAML, test: fm.data.Sinusoid, errors: Errors, path: Path, console: Console) -> None:
    """Three test tasks before and after adaptation, and the error over the inner steps."""
    episode = test[0]
    amplitude, phase = test.parameters(0)
    last = len(errors.mse) - 1
    shown = min(3, len(amplitude))
    x = torch.linspace(-5, 5, 200).reshape(1, -1, 1).expand(test.tasks, -1, -1)
    curves = {}
    for steps in sorted({0, 1, last}):
        adapted = maml.adapt(episode.support_x, episode.support_y, steps=steps)
        curves[steps] = maml.predict(adapted, x)[:shown, :, 0]
    plots.sinusoid(
        path,
        console,
        x=x[0, :, 0],
        truth=amplitude[:shown, None] * torch.sin(x[0, :, 0] - phase[:shown, None]),
        support=(episode.support_x[:shown, :, 0], episode.support_y[:shown, :, 0]),
        curves=curves,
        mse=[errors.row(steps)[0] for steps in range(last + 1)],
    )
