"""Nanoseconds a number of every elementary function of the `cpu` backend, beside PyTorch's.

    python bench/elementary.py [--function NAME]

One thread, arrays that stay in the second-level cache, the best of many repetitions. Of the
functions of element-wise layers also the two derivatives. FASTMETA_CPU_ISA chooses the instruction
set. Their errors: tests/sanitize/elementary.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta import _C

COUNT = 1 << 15
REPETITIONS = 300
POSITIVE = ("log", "log1p", "sqrt", "pow")
# name: constants, where there are derivatives, and PyTorch's function
FUNCTIONS: dict[str, tuple[tuple[float, ...], Callable[..., Tensor]]] = {
    "exp": ((), torch.exp),
    "expm1": ((), torch.expm1),
    "log": ((), torch.log),
    "log1p": ((), torch.log1p),
    "cos": ((), torch.cos),
    "erf": ((), torch.erf),
    "sqrt": ((), torch.sqrt),
    "pow": ((), torch.pow),
    "sin": ((0, 0), torch.sin),
    "tanh": ((0, 0), torch.tanh),
    "sigmoid": ((0, 0), torch.sigmoid),
    "gelu": ((0, 0), F.gelu),
    "gelu_tanh": ((0, 0), lambda x: F.gelu(x, approximate="tanh")),
    "silu": ((0, 0), F.silu),
    "mish": ((0, 0), F.mish),
    "softplus": ((1, 20), F.softplus),
    "elu": ((1, 0), F.elu),
}


def nanoseconds(run: Callable[[], object]) -> float:
    """Of one number, the best of many runs."""
    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.perf_counter_ns()
        run()
        best = min(best, time.perf_counter_ns() - start)
    return best / COUNT


@click.command()
@click.option("--function", "chosen", type=click.Choice(list(FUNCTIONS)), multiple=True)
def main(chosen: tuple[str, ...]) -> None:
    """Print a row of a table for every function."""
    torch.set_num_threads(1)
    print(
        f"| ns a number ({_C.instruction_set()}) | float32 | f' | f'' | torch | float64 | f' | f'' | torch |"
    )
    print("| --- |" + " ---: |" * 8)
    for name in chosen or FUNCTIONS:
        constants, theirs = FUNCTIONS[name]
        row = []
        for dtype in (torch.float32, torch.float64):
            x = torch.linspace(0.01 if name in POSITIVE else -8, 8, COUNT, dtype=dtype)
            output = torch.empty(COUNT, dtype=dtype)
            for order in range(3):
                inputs = [x, x] if name == "pow" or order else [x]
                call = (name, order, dtype == torch.float64, list(constants), inputs, output)
                there = order == 0 or constants
                row.append(f"{nanoseconds(lambda call=call: _C.elementary(*call)):.2f}" if there else "")
            with torch.inference_mode():
                row.append(
                    f"{nanoseconds(lambda run=theirs, at=[x, x] if name == 'pow' else [x]: run(*at)):.2f}"
                )
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
