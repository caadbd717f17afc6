"""Checkpoints: all that a run needs to go on bit for bit, in one file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import click
import torch
from torch import Tensor, nn

from fastmeta.cli.train.run import Run


@dataclass(slots=True)
class State:
    """Where a run is, besides its weights and its optimiser.

    Data is a function of (seed, iteration), so no random state is kept.
    """

    iteration: int = 0  # outer steps done
    seconds: float = 0.0  # time spent in training
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last row of metrics


def save(run: Run, maml: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write the checkpoint; one that is there stays whole until the new one is."""
    content = {
        "settings": dict(run.settings),
        "maml": maml.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": state.iteration,
        "seconds": state.seconds,
        "losses": state.losses,
    }
    fresh = run.checkpoint.with_suffix(".new")
    torch.save(content, fresh)
    os.replace(fresh, run.checkpoint)


def begin(run: Run, maml: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The state to start from: a fresh one, or with --resume the checkpoint's, loaded into `maml` and `optimizer`.

    Raises:
        click.UsageError: --resume without a checkpoint or with other settings, or a run that would be overwritten.
    """
    there = os.path.exists(run.checkpoint)  # Path.exists raises where a folder may not be looked into
    if not run.resume:
        if there and not run.overwrite:
            raise click.UsageError(
                f"{run.out} holds a run already: pass --resume to go on, or --overwrite to begin anew"
            )
        return State()
    if not there:
        raise click.UsageError(f"--resume: there is no checkpoint in {run.out}")
    content = torch.load(run.checkpoint, weights_only=True)
    for name, value in run.settings.items():
        if content["settings"].get(name) != value:
            raise click.UsageError(
                f"--resume: --{name} was {content['settings'].get(name)} in {run.checkpoint}, got {value}"
            )
    if content["iteration"] > run.iterations:
        raise click.UsageError(
            f"--resume: {run.checkpoint} is at iteration {content['iteration']}, past --iterations {run.iterations}"
        )
    maml.load_state_dict(content["maml"])
    optimizer.load_state_dict(content["optimizer"])
    return State(content["iteration"], content["seconds"], content["losses"])
