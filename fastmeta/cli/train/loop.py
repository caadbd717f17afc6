"""The training loop of all `fastmeta train` commands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

import fastmeta as fm
from fastmeta.cli import folder
from fastmeta.cli.train.checkpoint import State, begin, forget, save
from fastmeta.cli.train.interrupt import Interrupt
from fastmeta.cli.train.metrics import Metrics
from fastmeta.cli.train.run import Run
from fastmeta.data import Episode
from fastmeta.data.meta_batches import MetaBatches

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130

#: What a run writes, besides the lock.
FILES = (
    "metrics.csv",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "result.csv",
    "adaptation.png",
    "episode.png",
)

#: Further metrics of one step: name -> function of the query output [T, M, ...] and the episode.
Measures = dict[str, Callable[[Tensor, Episode], float]]


def fit(
    maml: fm.MAML,
    data: MetaBatches,
    run: Run,
    outer_lr: float,
    console: Console,
    measures: Measures | None = None,
) -> State:
    """Train `maml` with Adam on the episodes of `data`, the i-th in the i-th outer step.

    Args:
        maml: changed in place; its parameters are made views of one flat vector.
        data: at least `run.iterations` meta-batches.
        run: the folder, the length and what to save how often.
        outer_lr: Adam's learning rate.
        console: gets the progress bar and the messages.
        measures: metrics besides the loss, taken in the iterations that are logged.

    Raises:
        click.UsageError: the folder and the options do not fit together.
        click.ClickException: the loss is not finite any more, the backend asked for cannot run
            this, or the folder cannot be written into or holds damaged files.
        click.exceptions.Exit: interrupted; the checkpoint is saved.
    """
    measures = measures or {}
    optimizer = torch.optim.Adam([fm.flatten(maml)], lr=outer_lr, fused=True)
    columns = ["loss", *measures, "seconds"]
    state = begin(run, maml, optimizer, columns)
    folder.make(run.out, FILES)
    if run.overwrite:
        forget(run)
    if state.iteration:
        console.print(f"resumed at iteration {state.iteration} from {escape(str(run.out))}")
    started = time.perf_counter() - state.seconds
    written = Metrics(run, columns, state.rows, state.iteration)
    with written as metrics, _progress(console) as progress, Interrupt() as interrupt:
        bar = progress.add_task("training", total=run.iterations, completed=state.iteration, loss=math.nan)
        while state.iteration < run.iterations and not interrupt.requested:
            episode = data[state.iteration]
            optimizer.zero_grad()
            out = _forward(maml, episode, state)
            out.loss.backward()
            _update(optimizer)
            state.iteration += 1
            state.losses.append(out.loss.detach())
            if state.iteration % run.log_every == 0:
                state.seconds = time.perf_counter() - started
                loss = _mean(state)
                further = {name: measure(out.output, episode) for name, measure in measures.items()}
                metrics.write(state.iteration, {"loss": loss, **further, "seconds": round(state.seconds, 3)})
                progress.update(bar, completed=state.iteration, loss=loss)
            if state.iteration % run.checkpoint_every == 0 and state.iteration < run.iterations:
                save(run, maml, optimizer, state, columns)
        progress.update(bar, completed=state.iteration)
        state.seconds = time.perf_counter() - started
        save(run, maml, optimizer, state, columns)
    if state.iteration < run.iterations:
        where = escape(str(run.checkpoint))
        console.print(f"interrupted: iteration {state.iteration} is saved in {where}; go on with --resume")
        raise click.exceptions.Exit(INTERRUPTED)
    return state


def _forward(maml: fm.MAML, episode: Episode, state: State) -> fm.MetaLoss:
    """`maml(*episode)`.

    Raises:
        click.ClickException: tasks diverged, or the backend asked for cannot run this.
    """
    try:
        return maml(*episode)
    except FloatingPointError as error:
        raise click.ClickException(
            f"at iteration {state.iteration + 1} {error}; try a smaller --inner-lr"
        ) from error
    except fm.BackendUnavailable as error:
        raise click.ClickException(str(error)) from error


def _update(optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimiser, on one thread.

    PyTorch's threads go on spinning after they have shared out a vector that one thread updates in
    microseconds, and the kernels want the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer.step()
    torch.set_num_threads(threads)


def _mean(state: State) -> float:
    """The mean loss since the last call.

    Raises:
        click.ClickException: it is not finite.
    """
    loss = float(torch.stack(state.losses).mean())
    if not math.isfinite(loss):
        raise click.ClickException(
            f"the loss is {loss} at iteration {state.iteration}; try a smaller --inner-lr"
        )
    state.losses.clear()
    return loss


def _progress(console: Console) -> Progress:
    columns: Sequence[
        TextColumn | BarColumn | MofNCompleteColumn | TimeElapsedColumn | TimeRemainingColumn
    ] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Few refreshes: the thread that draws competes with the kernels for a core.
    return Progress(*columns, console=console, refresh_per_second=4)
