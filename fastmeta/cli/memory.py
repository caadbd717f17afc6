"""Commands that ask for more memory than there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


def total() -> int:
    """Bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def need(size: int, options: str) -> None:
    """Refuse what cannot fit: the system might promise the memory and then kill the process.

    Args:
        size: bytes that are needed at least.
        options: what they come from: "--tasks and --shots".

    Raises:
        click.UsageError: the machine has less.
    """
    there = total()
    if there and size > there:
        raise click.UsageError(
            f"{options}: they need {_shown(size)} of memory, this machine has {_shown(there)}"
        )


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn an allocation that fails inside the block into one sentence.

    Raises:
        click.ClickException: in place of Python's, NumPy's, PyTorch's and C++'s own exceptions.
    """
    try:
        yield
    except MemoryError as error:
        raise click.ClickException(f"not enough memory: {error or 'allocation failed'}") from error
    except RuntimeError as error:
        # PyTorch has no exception type for it.
        if "allocate memory" not in str(error) and "Storage size calculation overflowed" not in str(error):
            raise
        raise click.ClickException(f"not enough memory: {str(error).splitlines()[0]}") from error


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
