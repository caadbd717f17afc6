"""The command line: `fastmeta` and `python -m fastmeta`, one file per command."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any

import click

from fastmeta.cli.bench import bench
from fastmeta.cli.cost import cost
from fastmeta.cli.info import info
from fastmeta.cli.train import train
from fastmeta.cli.verify import verify
from fastmeta.version import __version__

COMMANDS = (info, verify, train, bench, cost)


class _Commands(click.Group):
    """The commands; a failure to write the output becomes one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            # An error about a file has its name; one about the output has none.
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise click.ClickException(f"cannot write the output: {error.strerror}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, "-V", "--version", prog_name="fastmeta")
def main() -> None:
    """Gradient-based meta-learning in PyTorch on fused kernels."""
    # A folder's name need not be text, and a terminal need not know every letter.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


for command in COMMANDS:
    main.add_command(command)
