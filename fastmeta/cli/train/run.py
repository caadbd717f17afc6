"""What one training run was asked to do, and the options that say so."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from fastmeta import backends
from fastmeta.benchmark.machine import usable_cores
from fastmeta.cli.folder import Folder
from fastmeta.cli.memory import enough_memory

FREE = ("eval_", "data", "backend")

#: Tasks, examples, iterations: what a length of an array may be at most.
COUNT = click.IntRange(1, 2**31 - 1)


class Finite(click.FloatRange):
    """A number of the range that is finite, in float32 too: the networks are of float32."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        if abs(number) > torch.finfo(torch.float32).max:
            self.fail(f"{number} is not finite in float32.", param, ctx)
        return number


@dataclass(frozen=True)
class Run:
    """One training run and the folder it lives in.

    Args:
        out: the folder.
        iterations: outer steps in all.
        resume: go on from the checkpoint in `out`.
        overwrite: begin anew even if `out` holds a checkpoint.
        log_every: iterations between two rows of the metrics.
        checkpoint_every: iterations between two checkpoints.
        tensorboard: write the metrics for TensorBoard too.
        settings: what the run means, by option name; a resumed run must have the same.
    """

    out: Path
    iterations: int
    resume: bool
    overwrite: bool
    log_every: int
    checkpoint_every: int
    tensorboard: bool
    settings: Mapping[str, str | int | float | bool | None]

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.out / "checkpoint.pt"

    @property
    def previous(self) -> Path:
        """Where the checkpoint before is, for when the newest is damaged."""
        return self.out / "checkpoint.previous.pt"


def run_options(iterations: int, out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of all training commands, with these defaults; the command gets them as `run`.

    `seed` and `outer_lr` are passed on as well. Every other option is a setting of the run, unless
    its name begins with one of `FREE`: how it is tested, where the data is and which backend runs
    may change when a run goes on.
    """
    options = [
        click.option("--iterations", type=COUNT, default=iterations, help="Outer steps in all."),
        click.option(
            "--outer-lr", type=Finite(min=0), default=1e-3, help="Learning rate of the outer loop (Adam)."
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of weights and tasks."),
        click.option("--out", type=Folder(), default=out, help="Folder of the run."),
        click.option("--resume", is_flag=True, help="Go on from the checkpoint in the folder."),
        click.option("--overwrite", is_flag=True, help="Begin anew even if the folder holds a run."),
        click.option(
            "--log-every", type=COUNT, default=100, help="Iterations between two rows of metrics.csv."
        ),
        click.option(
            "--checkpoint-every", type=COUNT, default=1000, help="Iterations between two checkpoints."
        ),
        click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard too."),
        click.option(
            "--backend",
            type=click.Choice(["auto", *backends.NAMES]),
            default="auto",
            callback=_present,
            help="Which kernels run.",
        ),
        click.option(
            "--threads",
            type=COUNT,
            callback=_set_threads,
            expose_value=False,
            help="CPU threads [default: PyTorch's].",
        ),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def with_run(**given: Any) -> None:
            of_run = {field.name: given.pop(field.name) for field in fields(Run) if field.name != "settings"}
            if of_run["resume"] and of_run["overwrite"]:
                raise click.UsageError(
                    "--resume goes on with the run in the folder, --overwrite begins anew: pass one"
                )
            settings = {
                name.replace("_", "-"): value for name, value in given.items() if not name.startswith(FREE)
            }
            run = Run(**of_run, settings=settings)
            if run.resume and not os.path.exists(run.out):
                raise click.UsageError(f"--resume: there is no checkpoint in {run.out}, which is not there")
            with enough_memory():
                command(run=run, **given)

        decorated: Callable[..., None] = with_run
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def held_out_seed(seed: int) -> int:
    """The seed of the test tasks: one that `--seed` cannot be."""
    return 2**63 + seed


def _set_threads(context: click.Context, parameter: click.Parameter, threads: int | None) -> None:
    if threads is None:
        return
    cores = len(usable_cores())
    if threads > cores:
        raise click.BadParameter(f"there are {cores} cores, got {threads}", context, parameter)
    torch.set_num_threads(threads)


def _present(context: click.Context, parameter: click.Parameter, name: str) -> str:
    reason = "" if name == "auto" else backends.get(name).missing()
    if reason:
        raise click.ClickException(f"backend {name!r} cannot run here: {reason}")
    return name
