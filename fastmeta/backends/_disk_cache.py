"""What takes long to make and is kept on disk: in FASTMETA_CACHE, else in the user's cache
folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import fastmeta


def folder() -> Path:
    """Where everything is kept."""
    if named := os.environ.get("FASTMETA_CACHE"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "fastmeta"


def digest(key: tuple[object, ...]) -> str:
    """A name for everything that something is made of, and this version of fastmeta."""
    return hashlib.sha256("\0".join(map(str, (fastmeta.__version__, *key))).encode()).hexdigest()[:40]


def path(key: tuple[object, ...], suffix: str) -> Path:
    """Where a file made of these is, or would be."""
    return folder() / f"{digest(key)}{suffix}"


def write(target: Path, content: bytes) -> None:
    """Put a file there as a whole: whoever looks finds all of it or what was there before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        made = Path(own, target.name)
        made.write_bytes(content)
        os.replace(made, target)
