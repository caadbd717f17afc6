"""The package as installed, and its build."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import fastmeta

ROOT = Path(__file__).parents[2]


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_version_is_written_once():
    assert fastmeta.__version__ == version("fastmeta")


def test_package_is_typed():
    assert files("fastmeta").joinpath("py.typed").is_file()


def test_kernels_are_part_of_the_package():
    import fastmeta.kernels

    assert Path(fastmeta.kernels.__file__).resolve().parent == ROOT / "kernels"


def test_module_runs_as_command():
    done = subprocess.run([sys.executable, "-m", "fastmeta", "--version"], capture_output=True, text=True)
    assert done.stdout.split() == ["fastmeta,", "version", fastmeta.__version__]


def test_builds_without_a_compiler_on_request(tmp_path):
    done = build(tmp_path, "--build-lib", str(tmp_path / "lib"), FASTMETA_NO_EXT="1", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    built = {
        str(path.relative_to(tmp_path / "lib"))
        for path in tmp_path.joinpath("lib").rglob("*")
        if path.is_file()
    }
    assert {"fastmeta/__init__.py", "fastmeta/py.typed", "fastmeta/kernels/__init__.py"} <= built
    # all that the cuda backend compiles at run time, nothing that was compiled before
    folders = [ROOT / "csrc" / name for name in ("cuda", "shared")]
    headers = [path for folder in folders for path in folder.rglob("*.[hi]*")]
    assert len(headers) > 20
    sources = {f"fastmeta/{path.relative_to(ROOT)}" for path in headers}
    assert sources <= built
    assert not any(name.startswith("fastmeta/csrc/cpu") for name in built)
    assert not [name for name in built if name.endswith(".so")]


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [("no-such-compiler", "CXX=no-such-compiler is not a program"), ("false", "compiler false is too old")],
)
def test_rejects_a_missing_or_old_compiler(tmp_path, compiler, complaint):
    done = build(tmp_path, CXX=compiler, FASTMETA_NO_EXT="0")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert complaint in last
    assert "FASTMETA_NO_EXT=1" in last
    assert "Traceback" not in done.stderr


def test_layer_kinds_are_those_of_the_folder_and_written_when_they_change(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "layer_kinds.py"), str(tmp_path)]
    subprocess.run(command, check=True)
    kinds, files = tmp_path / "layer_kinds.h", tmp_path / "layer_files.h"
    for path in (ROOT / "csrc" / "cpu" / "layers").glob("*.h"):
        assert f" X({path.stem})" in kinds.read_text()
        assert f'#include "cpu/layers/{path.name}"' in files.read_text()
    for header in (kinds, files):
        os.utime(header, (1, 1))
    files.write_text(files.read_text() + "// of an older list")
    subprocess.run(command, check=True)
    assert kinds.stat().st_mtime == 1
    assert "older" not in files.read_text()
