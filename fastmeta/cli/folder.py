"""The folder that a command writes into."""

from __future__ import annotations

import os
from pathlib import Path

import click


def make(out: Path) -> None:
    """Make the folder `--out`, if it is not there.

    Raises:
        click.ClickException: nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out: cannot make the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise click.ClickException(f"--out: cannot write into the folder {out}")
