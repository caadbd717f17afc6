"""`fastmeta train omniglot`: few-shot classification of handwritten characters."""

from __future__ import annotations

import math
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
from fastmeta.cli.train.inner import RULES, rule_option
from fastmeta.cli.train.loop import FILES, fit
from fastmeta.cli.train.result import write_result
from fastmeta.cli.train.run import COUNT, Finite, Run, held_out_seed, run_options
from fastmeta.data import Episode

#: Test tasks computed at once.
EVAL_BATCH = 20
#: The defaults for an MLP, and for networks with batch norm, whose rates may be larger.
_MLP = {"inner_lr": 0.1, "inner_steps": 5, "eval_steps": 5}
_NORMED = {"inner_lr": 0.4, "inner_steps": 1, "eval_steps": 3}
DEFAULTS = {"mlp": _MLP, "mlp-bn": _NORMED, "conv4": _NORMED, "conv4-strided": _NORMED}


class Accuracy(NamedTuple):
    """Mean accuracy over test episodes, in 0 .. 1."""

    mean: float
    interval: float  # half the width of the 95 % confidence interval

    @classmethod
    def over(cls, episodes: Tensor) -> Accuracy:
        """Of the accuracies [E] of test episodes; the interval is that of a normal mean."""
        return cls(float(episodes.mean()), 1.96 * float(episodes.std()) / math.sqrt(len(episodes)))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f} %"


@click.command()
@click.option(
    "--model", type=click.Choice([*DEFAULTS]), default="mlp", help="The network, see `fastmeta.models`."
)
@click.option("--width", type=COUNT, default=64, help="Filters of a convolutional network.")
@click.option("--ways", type=click.IntRange(2, COUNT.max), default=5, help="Classes of a task.")
@click.option("--shots", type=COUNT, default=1, help="Support drawings of a class.")
@click.option("--query", type=COUNT, default=5, help="Query drawings of a class in training.")
@click.option("--inner-lr", type=Finite(), help="Inner learning rate [default: 0.4, and 0.1 for mlp].")
@click.option(
    "--inner-steps",
    type=click.IntRange(0, COUNT.max),
    help="Inner steps in training [default: 1, and 5 for mlp].",
)
@rule_option
@click.option("--first-order", is_flag=True, help="First-order MAML.")
@click.option("--tasks", type=COUNT, default=16, help="Tasks of a meta-batch.")
@click.option("--eval-episodes", type=click.IntRange(2, COUNT.max), default=600, help="Test tasks.")
@click.option("--eval-query", type=COUNT, default=15, help="Query drawings of a class in testing.")
@click.option("--eval-steps", type=COUNT, help="Inner steps in testing [default: 3, and 5 for mlp].")
@click.option(
    "--data",
    type=folder.Folder(),
    help="Folder of images_background_small{1,2}.zip, or of omniglot/ with them [default: $FASTMETA_DATA].",
)
@click.option(
    "--download", "data_download", is_flag=True, help="Fetch the files into the folder if they are missing."
)
@run_options(iterations=3000, out="runs/omniglot")
def omniglot(
    model: str,
    width: int,
    ways: int,
    shots: int,
    query: int,
    inner_lr: float | None,
    inner_steps: int | None,
    inner_rule: str,
    first_order: bool,
    tasks: int,
    eval_episodes: int,
    eval_query: int,
    eval_steps: int | None,
    data: Path | None,
    data_download: bool,
    outer_lr: float,
    seed: int,
    backend: str,
    run: Run,
) -> None:
    """Few-shot classification of Omniglot characters.

    On the two small background sets, tested on alphabets never seen in training.
    """
    console = Console()
    defaults = DEFAULTS[model]
    inner_steps = int(defaults["inner_steps"]) if inner_steps is None else inner_steps
    eval_steps = int(defaults["eval_steps"]) if eval_steps is None else eval_steps
    try:
        train, test = fm.data.Omniglot.small_split(data, download=data_download)
    except (OSError, ImportError, ValueError) as error:
        raise click.ClickException(f"{error} (here: --data, --download)") from error
    if model.startswith("conv4"):
        # Weights, their gradient and Adam's two moments, of three blocks.
        memory.need(4 * 4 * 3 * 9 * width**2, "--width")
    net = network(model, ways, width, seed)
    memory.need(4 * sum(map(Tensor.numel, net.parameters())) * inner_steps, "--inner-steps")
    memory.need(
        4 * train.images[0, 0].numel() * tasks * ways * (shots + query),
        "--tasks, --ways, --shots and --query",
    )
    maml = fm.MAML(
        net,
        loss="cross_entropy",
        inner_lr=defaults["inner_lr"] if inner_lr is None else inner_lr,
        inner_steps=inner_steps,
        order="first" if first_order else "second",
        update_rule=RULES[inner_rule](),
        backend=backend,
    )
    console.print(
        f"{ways}-way {shots}-shot, {tasks} tasks, {torch.get_num_threads()} threads, run in "
        f"{escape(str(run.out))}"
    )
    try:
        training = fm.data.Episodes(
            train, ways=ways, shots=shots, query=query, tasks=tasks, iterations=run.iterations, seed=seed
        )
        testing = fm.data.Episodes(
            test,
            ways=ways,
            shots=shots,
            query=eval_query,
            tasks=EVAL_BATCH,
            iterations=math.ceil(eval_episodes / EVAL_BATCH),
            seed=held_out_seed(seed),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder.make(run.out, FILES)
    with folder.locked(run.out):
        state = fit(maml, training, run, outer_lr, console, {"accuracy": _mean_accuracy})
        console.print(f"{state.iteration} iterations in {state.seconds:.1f} s")
        accuracies = evaluate(maml, testing, eval_episodes, eval_steps)
        console.print(table(accuracies, ways, shots, eval_episodes))
        rows = [(steps, *accuracy) for steps, accuracy in enumerate(accuracies)]
        write_result(run, ["steps", "accuracy", "interval95"], rows)
        logged = [(int(iteration), loss) for iteration, loss, *_ in state.rows]
        plots.accuracy(
            run.out / "adaptation.png", console, logged=logged, accuracies=accuracies, chance=1 / ways
        )
        _plot_episode(run.out / "episode.png", console, maml, next(iter(testing)), eval_steps)


def network(model: str, ways: int, width: int, seed: int) -> nn.Module:
    """The network that `--model` names, on images [1, 28, 28]; `seed` is that of its weights."""
    torch.manual_seed(seed)
    if model.startswith("conv4"):
        return fm.models.Conv4(ways, width=width, form="strided" if model == "conv4-strided" else "max_pool")
    return fm.models.MLP((784, 256, 128, 64, 64, ways), batch_norm=model == "mlp-bn", flatten=True)


@torch.no_grad()
def _plot_episode(path: Path, console: Console, maml: fm.MAML, episode: Episode, steps: int) -> None:
    """The first test task: its drawings, and the predictions before and after adaptation."""
    one = Episode(*(tensor[:1] for tensor in episode))
    guesses = {}
    for k in (0, steps):
        adapted = maml.adapt(one.support_x, one.support_y, steps=k)
        guesses[k] = maml.predict(adapted, one.query_x)[0].argmax(-1)
    support = one.support_x[0], one.support_y[0]
    plots.episode(path, console, support=support, query=(one.query_x[0], one.query_y[0]), guesses=guesses)


def evaluate(maml: fm.MAML, episodes: fm.data.Episodes, count: int, steps: int) -> list[Accuracy]:
    """Accuracy over the first `count` test episodes after 0 .. `steps` inner steps."""
    return [_evaluate(maml, episodes, count, k) for k in range(steps + 1)]


@torch.no_grad()
def _evaluate(maml: fm.MAML, episodes: fm.data.Episodes, count: int, steps: int) -> Accuracy:
    found = []
    for episode in episodes:
        adapted = maml.adapt(episode.support_x, episode.support_y, steps=steps)
        found.append(accuracies_of(maml.predict(adapted, episode.query_x), episode))
    return Accuracy.over(torch.cat(found)[:count])


def accuracies_of(
    output: Tensor,  # [T, M, C]
    episode: Episode,
) -> Tensor:
    """The share of query examples that are right, of each task: [T]."""
    return (output.argmax(-1) == episode.query_y).float().mean(dim=1)


def _mean_accuracy(output: Tensor, episode: Episode) -> float:
    return float(accuracies_of(output, episode).mean())


def table(accuracies: list[Accuracy], ways: int, shots: int, episodes: int) -> Table:
    """The result; for 5-way 1-shot next to what others report, which is not the same experiment."""
    table = Table(title=f"{ways}-way {shots}-shot accuracy on held-out alphabets")
    table.add_column("what")
    table.add_column("accuracy", justify="right")
    table.add_column("source")
    last = len(accuracies) - 1
    for steps in sorted({0, 1, last}):
        interval = f"{episodes} episodes, 95 % interval"
        table.add_row(f"this run, {steps} inner steps", str(accuracies[steps]), interval)
    if (ways, shots) == (5, 1):
        table.add_section()
        for row in reported.OMNIGLOT_5_WAY_1_SHOT:
            table.add_row(*row)
    return table
