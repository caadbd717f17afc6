"""`fastmeta info`: what is installed, and what runs on this machine."""

from __future__ import annotations

import platform

import click
import numpy
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastmeta import backends
from fastmeta.version import __version__


@click.command()
def info() -> None:
    """Versions, instruction sets, threads, and the backends with why one is missing."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "fastmeta": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "CUDA": torch.version.cuda or "not in this build of PyTorch",
        "instruction set": instruction_sets(),
        "threads": str(torch.get_num_threads()),
    }
    rows.update({f"backend {name}": backends.get(name).missing() or "ready" for name in backends.NAMES})
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console(highlight=False).print(table)


def instruction_sets() -> str:
    """The instruction set that the extension uses here, and those it was compiled for."""
    try:
        from fastmeta import _C
    except ImportError as error:
        return f"the extension is not there ({error})"
    return f"{_C.instruction_set()} (compiled: {', '.join(_C.instruction_sets())})"
