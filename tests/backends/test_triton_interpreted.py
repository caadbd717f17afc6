"""Runs tests/backends/interpreted under Triton's interpreter, in other processes: once it is on,
nothing can be compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
FOLDER = HERE / "interpreted"


def test_under_the_interpreter() -> None:
    """All files at once: the start of a process costs as much as many a file."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "-p",
            "no:cacheprovider",
            "-n",
            "2",
            "--dist",
            "worksteal",
            str(FOLDER),
        ],
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FOLDER.glob("test_*.py"):
        assert re.search(rf"^PASSED .*{file.name}", done.stdout, re.MULTILINE), file.name
