"""Where data files are, and how they get there: the user's folder, or a verified download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen
from uuid import uuid4

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without an answer


class RemoteFile(NamedTuple):
    """A published file and its checksum."""

    url: str
    algorithm: str  # a name that hashlib knows
    digest: str  # hexadecimal


def data_root(caller: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder of data sets: `root`, else the environment variable FASTMETA_DATA.

    Raises:
        FileNotFoundError: neither is given.
    """
    folder = os.environ.get("FASTMETA_DATA", "") if root is None else os.fspath(root)
    if not folder:
        raise FileNotFoundError(
            f"{caller}: no data folder; pass `root=` or set the environment variable FASTMETA_DATA to a "
            "folder"
        )
    return Path(folder).expanduser()


def find(caller: str, root: Path, folder: str, remote: RemoteFile, download: bool) -> Path:
    """The local copy of `remote`, in `root` or root/folder; with `download` it is fetched there.


    Raises:
        FileNotFoundError: it is in neither place and `download` is false.
        OSError: the download failed; nothing is left behind.
        ValueError: the download has another checksum; nothing is left behind.
    """
    name = remote.url.rpartition("/")[2]
    for path in (root / name, root / folder / name):
        if path.is_file():
            return path
    if not download:
        raise FileNotFoundError(
            f"{caller}: {name} is neither in {root} nor in {root / folder}; pass `download=True`, "
            f"or put the file of {remote.url} there, or point `root` or FASTMETA_DATA at its folder"
        )
    return fetch(caller, remote, root / folder / name)


def fetch(caller: str, remote: RemoteFile, path: Path) -> Path:
    """Download `remote` to `path`, which is made, or replaced, only when the checksum is right.

    Raises:
        OSError: the download failed; nothing is left behind.
        ValueError: the download has another checksum; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.new(remote.algorithm, usedforsecurity=False)
    # In the same folder, so that the rename at the end is atomic; with its own name, so that two
    # downloads may run at once.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with urlopen(remote.url, timeout=_TIMEOUT) as answer, open(partial, "xb") as file:
            while chunk := answer.read(_CHUNK):
                checksum.update(chunk)
                file.write(chunk)
        if checksum.hexdigest() != remote.digest:
            raise ValueError(
                f"{caller}: the {remote.algorithm} of {remote.url} must be {remote.digest}, "
                f"got {checksum.hexdigest()}; the download was discarded"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
