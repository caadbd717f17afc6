"""Programs of the tests that run in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZERS = Path(__file__).parents[1] / "fuzz"


def python(*arguments: str) -> str:
    """What Python prints, run with these arguments in the folder of the fuzzers, where it ends by
    itself with 0 or 1."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=FUZZERS, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout
