"""Checkpoints: all that a run needs to go on bit for bit, in one file."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor, nn

from fastmeta.cli.files import discard, keep, sync_folder, told, write_whole
from fastmeta.cli.train import sealed
from fastmeta.cli.train.content import FORMAT, OtherVersion, check, check_weights
from fastmeta.cli.train.run import Run
from fastmeta.cli.train.sealed import Damaged


@dataclass(slots=True)
class State:
    """Where a run is, besides its weights and its optimiser.

    Data is a function of (seed, iteration), so no random state is kept.
    """

    iteration: int = 0  # outer steps done
    seconds: float = 0.0  # time spent in training
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last row of metrics
    rows: list[list[float]] = field(default_factory=list)  # of the metrics: the iteration, then the columns


def save(
    run: Run, maml: nn.Module, optimizer: torch.optim.Optimizer, state: State, columns: Sequence[str]
) -> None:
    """Write the checkpoint, and keep the one before; at any moment one of them is whole.

    Raises:
        click.ClickException: it cannot be written; the one that is there stays.
    """
    content = {
        "format": FORMAT,
        "settings": dict(run.settings),
        "maml": maml.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": state.iteration,
        "seconds": state.seconds,
        # One tensor: each would be a record of its own in the archive.
        "losses": torch.stack(state.losses) if state.losses else torch.zeros(0),
        "columns": list(columns),
        "rows": state.rows,
    }
    archive = io.BytesIO()
    torch.save(content, archive)
    if _whole(run):
        keep(run.checkpoint, run.previous)
    write_whole(run.checkpoint, sealed.seal(archive.getvalue()))


def _whole(run: Run) -> bool:
    """Whether the newest checkpoint is worth keeping in place of the one before."""
    with told(run.checkpoint, "read"):
        try:
            sealed.check(run.checkpoint)
        except (Damaged, FileNotFoundError):
            return False
    return True


def begin(run: Run, maml: nn.Module, optimizer: torch.optim.Optimizer, columns: Sequence[str]) -> State:
    """The state to start from: a new one, or with --resume that of the checkpoint.

    The checkpoint is loaded into `maml` and `optimizer`.

    A damaged checkpoint is passed over, with a sentence, if the one before is whole.

    Raises:
        click.UsageError: --resume without a checkpoint or with other settings, or a run that would
            be overwritten.
        click.ClickException: no checkpoint is whole, or it cannot be read, or is of another
            version.
    """
    # Path.exists raises where the folder may not be read.
    there = [path for path in (run.checkpoint, run.previous) if os.path.lexists(path)]
    if not run.resume:
        if there and not run.overwrite:
            raise click.UsageError(
                f"{run.out} holds a run already: pass --resume to go on, or --overwrite to begin anew"
            )
        return State()
    if not there:
        raise click.UsageError(f"--resume: there is no checkpoint in {run.out}")
    damaged: list[str] = []
    for path in there:
        with told(path, "read"):
            try:
                sealed.check(path)
                content = _load(path)
                check(content, columns)
                _fits(run, path, content)
                # Other settings may mean another network, so those first.
                check_weights(content, maml, optimizer)
            except Damaged as error:
                damaged.append(f"{path} is damaged: {error}")
                continue
            except OtherVersion as error:
                raise click.ClickException(f"{path} is of another version of fastmeta: {error}") from error
        for sentence in damaged:
            click.echo(f"{sentence}; going on from {path}, iteration {content['iteration']}", err=True)
        maml.load_state_dict(content["maml"])
        own = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": own})
        return State(content["iteration"], content["seconds"], list(content["losses"]), content["rows"])
    raise click.ClickException("; ".join(damaged))


def _load(path: os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a made-up pickle may make the reader raise anything
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise Damaged(f"expected a checkpoint, got what PyTorch cannot load: {first[:200]}") from error


def _fits(run: Run, path: os.PathLike[str], content: dict[str, Any]) -> None:
    for name, value in run.settings.items():
        if content["settings"].get(name) != value:
            raise click.UsageError(
                f"--resume: --{name} was {content['settings'].get(name)} in {path}, got {value}"
            )
    if content["iteration"] > run.iterations:
        raise click.UsageError(
            f"--resume: {path} is at iteration {content['iteration']}, past --iterations {run.iterations}"
        )


def forget(run: Run) -> None:
    """Remove the checkpoints of a run that is overwritten, so that the new run finds none.

    Raises:
        click.ClickException: they cannot be removed.
    """
    for path in (run.previous, run.checkpoint):
        with told(path, "remove"):
            discard(path)
    with told(run.out, "write into"):
        sync_folder(run.out)
