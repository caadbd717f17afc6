"""`fastmeta train`: the experiments of the MAML paper, one file each, on one training loop."""

from __future__ import annotations

import click

from fastmeta.cli.train.omniglot import omniglot
from fastmeta.cli.train.sinusoid import sinusoid


@click.group()
def train() -> None:
    """Train and test a published experiment: metrics, checkpoints, a plot and a table.

    A run lives in its folder (--out): metrics.csv, checkpoint.pt, checkpoint.previous.pt for when
    that is damaged, result.csv and adaptation.png. Ctrl-C saves a checkpoint; --resume goes on from
    the last one, also after a crash, with the same numbers as if nothing had happened. One run at a
    time works in a folder.
    """


train.add_command(sinusoid)
train.add_command(omniglot)
