"""The largest error of every elementary function of the cpu engine over all numbers of float32.

    python tests/sanitize/elementary.py [function ...]

It takes a minute or two a function, and ends with 1 if an error is above 2 units in the last place.

FASTMETA_CPU_ISA chooses the instruction set. Denormal results are not flushed here. pow has two
arguments, and is checked by samples alone (tests/backends/test_elementary.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from elementary_values import FUNCTIONS, MOST_ULP, compute, ulp

from fastmeta import _C

CHUNK = 1 << 14  # of the second-level cache


def largest_error(name: str) -> tuple[float, float]:
    """In units in the last place, and where."""
    constants, exact = FUNCTIONS[name]
    worst = (0.0, 0.0)
    for start in range(-(1 << 31), 1 << 31, CHUNK):
        x = torch.arange(start, start + CHUNK, dtype=torch.int32).view(torch.float32)
        errors = ulp(compute((name, 0, constants, [x])), exact(x.double()))
        at = int(errors.argmax())
        worst = max(worst, (errors[at].item(), x[at].item()))
    return worst


def main(names: list[str]) -> int:
    """Print a row of a table for every function."""
    torch.set_num_threads(1)
    print(f"| function ({_C.instruction_set()}) | largest error in ulp | at |\n| --- | ---: | ---: |")
    most = 0.0
    for name in names or [name for name in FUNCTIONS if name != "pow"]:
        error, at = largest_error(name)
        print(f"| {name} | {error:.2f} | {at:.9g} |", flush=True)
        most = max(most, error)
    return int(most > MOST_ULP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
