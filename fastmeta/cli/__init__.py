"""The command line: `fastmeta` and `python -m fastmeta`, one file per command."""

from __future__ import annotations

import click

from fastmeta.cli.bench import bench
from fastmeta.cli.cost import cost
from fastmeta.cli.info import info
from fastmeta.cli.train import train
from fastmeta.cli.verify import verify
from fastmeta.version import __version__

COMMANDS = (info, verify, train, bench, cost)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, "-V", "--version", prog_name="fastmeta")
def main() -> None:
    """Gradient-based meta-learning in PyTorch on fused kernels."""


for command in COMMANDS:
    main.add_command(command)
