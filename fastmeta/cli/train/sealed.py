"""PyTorch's archives with a digest, in one file that `torch.load` reads like any other."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20  # bytes
#: The last record of a zip file: this, 16 bytes, and the length of the comment that ends the file.
_END = b"PK\x05\x06"
_END_BYTES = 22
#: The comment: the SHA-256, in hexadecimal, of the archive as it was without one.
_DIGEST_BYTES = 64
_TAIL = _DIGEST_BYTES.to_bytes(2, "little")


class Damaged(ValueError):
    """A file does not hold what was written; the message says what was expected and is there."""


def seal(archive: bytes) -> bytes:
    """What `torch.save` wrote, with its digest as the comment of the zip file."""
    if archive[-_END_BYTES:][:4] != _END or archive[-2:] != b"\0\0":
        raise ValueError("seal: `archive` must be a zip file without a comment")
    return archive[:-2] + _TAIL + hashlib.sha256(archive).hexdigest().encode()


def check(path: Path) -> None:
    """Check that a file is whole.

    Raises:
        Damaged: it is no sealed archive, or a bit of it is not as it was written.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Damaged("expected a file, got a folder, a device or a pipe")
    with open(path, "rb") as file:
        _check(file, os.fstat(file.fileno()).st_size)


def _check(file: BinaryIO, size: int) -> None:
    length = size - len(_TAIL) - _DIGEST_BYTES
    if length < _END_BYTES:
        raise Damaged(f"expected a checkpoint, got {size} bytes")
    # The end first, so that a large file of another kind is not read.
    file.seek(length - _END_BYTES + 2)
    end = file.read()
    tail, kept = end[-len(_TAIL) - _DIGEST_BYTES : -_DIGEST_BYTES], end[-_DIGEST_BYTES:]
    if end[:4] != _END or tail != _TAIL:
        raise Damaged("expected a checkpoint with a digest at its end, got something else or a part of one")
    file.seek(0)
    digest = hashlib.sha256()
    while length:
        chunk = file.read(min(_CHUNK, length))
        if not chunk:
            raise Damaged("it grew shorter while it was read")
        digest.update(chunk)
        length -= len(chunk)
    digest.update(b"\0\0")
    if digest.hexdigest().encode() != kept:
        found = digest.hexdigest()[:12]
        raise Damaged(
            f"expected the digest {kept[:12].decode('ascii', 'backslashreplace')}..., got {found}..."
        )
