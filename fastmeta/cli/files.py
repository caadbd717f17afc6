"""Files that a command writes: whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

#: What file systems answer that cannot sync a folder.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def told(path: Path, doing: str) -> Iterator[None]:
    """Turn an error of the operating system inside the block into one sentence.

    Args:
        path: the file or folder.
        doing: a verb: "write".

    Raises:
        click.ClickException: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot {doing} {path}: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that there is either the old one or the new one after a crash at any moment.

    The content goes to a temporary file in the same folder, to the disk, and only then to its name.
    A temporary file left by a process that was killed is replaced. Only one process at a time may
    write this `path`.

    Raises:
        click.ClickException: it cannot be written; the old file is as it was.
    """
    fresh = path.with_name(path.name + ".new")
    with told(path, "write"):
        try:
            discard(fresh)
            # Exclusive, so that a link planted under this name is not followed.
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(fresh, path)
        except BaseException:
            with suppress(OSError):
                discard(fresh)
            raise
        sync_folder(path.parent)


def keep(path: Path, other: Path) -> None:
    """Give `path` the content of `other`; at any moment it has the old or the new one.

    Raises:
        click.ClickException: it cannot be done; both are as they were.
    """
    fresh = other.with_name(other.name + ".new")
    with told(other, "write"):
        discard(fresh)
        try:
            os.link(path, fresh)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            # A file system without hard links.
            write_whole(other, path.read_bytes())
            return
        try:
            os.replace(fresh, other)
        finally:
            # Renaming one name of a file to another of its names does nothing.
            discard(fresh)


def write_all(descriptor: int, content: bytes) -> None:
    """`os.write` until all is written."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def discard(path: Path) -> None:
    """Remove a file that need not be there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
