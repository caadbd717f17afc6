"""The folder that a command writes into."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fastmeta.cli.files import told

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

#: In the folder of a run; holds the id of the process that works there.
LOCK = "lock"


class Folder(click.Path):
    """A folder, which need not exist; the value is a `Path`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.Path`; an empty string (the current folder) is refused."""
        if not os.fspath(value) or "\0" in os.fspath(value):
            self.fail(f"{os.fspath(value)!r} is no name of a folder.", param, ctx)
        return super().convert(value, param, ctx)


def make(out: Path, files: Sequence[str] = ()) -> None:
    """Make the folder `--out`, if it is not there.

    Args:
        out: the folder.
        files: names of what will be written into it.

    Raises:
        click.ClickException: nothing can be written there, or one of the files is no file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out: cannot make the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise click.ClickException(f"--out: cannot write into the folder {out}")
    for name in files:
        for path in (out / name, out / f"{name}.new"):
            check_file(path)


def check_file(path: Path) -> None:
    """Refuse a path that exists and is not a file.

    Raises:
        click.ClickException: it is a folder, a device or a pipe, or cannot be examined.
    """
    with told(path, "look at"):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise click.ClickException(f"{path} must be a file or not be there, and is {what}")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder inside the block; a dead process holds no lock.

    Raises:
        click.ClickException: another process works in there.
    """
    path = out / LOCK
    check_file(path)
    with told(path, "open"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, out)
        yield
    finally:
        # Closing unlocks. The file stays: removing it would let two processes lock two files of one
        # name.
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise click.ClickException(f"{who} works in the folder {out}: one run at a time") from error
    except OSError as error:
        click.echo(f"{out} cannot be locked ({error.strerror}): see that no other run works in it", err=True)
        return
    with told(out / LOCK, "write"):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"%d\n" % os.getpid())
