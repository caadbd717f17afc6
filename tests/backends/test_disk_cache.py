"""Where compiled kernels and tuned tiles are kept, and that a file there is whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import fastmeta
from fastmeta.backends import _disk_cache
from fastmeta.backends.cuda import compile as compiler


def test_the_folder_is_the_one_named_or_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    for name in ("FASTMETA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert _disk_cache.folder() == Path("/home/user/.cache/fastmeta")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if it were not there
    assert _disk_cache.folder() == Path("/home/user/.cache/fastmeta")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert _disk_cache.folder() == Path("/caches/fastmeta")
    monkeypatch.setenv("FASTMETA_CACHE", "/named")
    assert _disk_cache.folder() == Path("/named")


def test_a_user_without_a_home_can_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("FASTMETA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert _disk_cache.folder() == Path("/caches/fastmeta")


def test_names_follow_everything_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {_disk_cache.digest(key) for key in (("a", "b"), ("a", "c"), ("ab",), ("a",))}
    monkeypatch.setattr(fastmeta, "__version__", "another")
    names.add(_disk_cache.digest(("a", "b")))
    assert len(names) == 5


def test_what_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder" / "file"
    _disk_cache.write(target, b"before")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        _disk_cache.write(target, b"after")
    assert [file.read_bytes() for file in target.parent.iterdir()] == [b"before"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    target = tmp_path / "file"
    before = os.umask(0o022)
    try:
        _disk_cache.write(target, b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


@pytest.mark.skipif(bool(compiler.missing_compiler()), reason=compiler.missing_compiler() or "ready")
def test_machine_code_that_may_not_be_read_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_for", lambda source, architecture: (source.encode(), ""))
    assert compiler.cubin("a", "sm_90a") == b"a"

    def forbidden(*_: object) -> bytes:
        raise PermissionError("Permission denied")

    for name in ("read_bytes", "exists"):  # a folder that may not be entered: neither can be asked
        monkeypatch.setattr(Path, name, forbidden)
    monkeypatch.setattr(compiler, "_headers_digest", lambda: "sources")
    assert compiler.cubin("a", "sm_90a") == b"a"
