"""A meta-gradient through a thousand steps of AdamW: what each way keeps, and the time it takes.

    python bench/long_unroll.py [--steps 1000] [--repeats 3] [--out runs/long_unroll]

One task: a network 64-128-10 with tanh, 64 examples, cross-entropy, random tensors; the gradient by
the weights of the examples. Every run is in a process of its own, after a short one that loads what
a first call loads, and the ways take turns, on one thread. Seconds are of the processor: other
programs on the machine hardly change their ratios. Copies are of theta and the moments of AdamW;
the peak is the high water of memory above the level before. "autograd" is a plain loop that keeps
its graph; "auto" is what a user gets who says nothing; "on cpu" is the C++ engine, whose copies
are padded to whole vectors; all others run on the `torch` backend.

Writes long_unroll.csv. Exit code 1 if a gradient differs from that of "recompute" by more than 1e-4
of its largest element.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm
from fastmeta.backends._checkpoints import advances, slots_for
from fastmeta.benchmark import machine, write_csv
from fastmeta.benchmark.memory import ALLOCATOR

EXAMPLES, WIDTH, CLASSES, INPUTS = 64, 128, 10, 64
RATE, BETAS, DECAY, EPS, EPS_ROOT = 1e-3, (0.9, 0.999), 0.01, 1e-8, 1e-8
ALLOWED = 1e-4
FEW = 10  # copies that the last way with checkpoints may keep
#: Every way: (backend, memory, the most copies); an unrolled loop in plain PyTorch has none.
WAYS: dict[str, tuple[str, str, int | None] | None] = {
    "recompute": ("torch", "recompute", None),
    "checkpoint": ("torch", "checkpoint", None),
    f"checkpoint, {FEW} copies": ("torch", "checkpoint", FEW),
    "auto": ("auto", "auto", None),
    "recompute on cpu": ("cpu", "recompute", None),
    "checkpoint on cpu": ("cpu", "checkpoint", None),
    "autograd": None,
}


@dataclass(slots=True)
class Row:
    """One way; nan where it is not known."""

    way: str
    backend: str
    steps: int
    copies: float  # of theta and the state of the rule
    copies_mib: float
    step_runs: float  # of each inner step, the Hessian-vector product not counted
    median_s: float
    min_s: float
    ratio: float  # of medians, over "recompute"
    peak_mib: float
    difference: float  # to the gradient of "recompute", of its largest element
    facts: dict[str, str] = field(default_factory=dict)


def _setting() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """The network and the one task, always the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    x, query_x = torch.randn(2, 1, EXAMPLES, INPUTS)
    y, query_y = torch.randint(CLASSES, (2, 1, EXAMPLES))
    return net, x, y, query_x, query_y


def _copy_bytes(net: nn.Module) -> int:
    """Of theta and both moments."""
    return 3 * sum(value.numel() * value.element_size() for value in net.parameters())


def gradient(way: str, steps: int) -> Tensor:
    """The gradient of the query loss by the weights of the examples, [EXAMPLES]."""
    net, x, y, query_x, query_y = _setting()
    how = WAYS[way]
    if how is None:
        return _autograd(net, x[0], y[0], query_x[0], query_y[0], steps)
    backend, memory, copies = how
    found = fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (x, y),
        (query_x, query_y),
        loss="cross_entropy",
        lr=RATE,
        steps=steps,
        update_rule=fm.AdamW(BETAS, EPS, EPS_ROOT, DECAY),
        support_weights=torch.ones(1, EXAMPLES),
        memory=memory,
        memory_limit=None if copies is None else copies * _copy_bytes(net),
        backend=backend,
        wrt=("support_weights",),
    )
    return found.support_weights[0]


def _autograd(net: nn.Module, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor, steps: int) -> Tensor:
    b1, b2 = BETAS
    weights = torch.ones(EXAMPLES, requires_grad=True)
    names = [name for name, _ in net.named_parameters()]
    theta = list(net.parameters())
    m, v = [torch.zeros_like(value) for value in theta], [torch.zeros_like(value) for value in theta]
    for k in range(1, steps + 1):
        output = functional_call(net, dict(zip(names, theta, strict=True)), x)
        loss = (weights * F.cross_entropy(output, y, reduction="none")).mean()
        grads = torch.autograd.grad(loss, theta, create_graph=True)
        m = [b1 * a + (1 - b1) * g for a, g in zip(m, grads, strict=True)]
        v = [b2 * a + (1 - b2) * g * g for a, g in zip(v, grads, strict=True)]
        theta = [
            (1 - RATE * DECAY) * p - RATE * a / (1 - b1**k) / ((s / (1 - b2**k) + EPS_ROOT).sqrt() + EPS)
            for p, a, s in zip(theta, m, v, strict=True)
        ]
    output = functional_call(net, dict(zip(names, theta, strict=True)), query_x)
    return torch.autograd.grad(F.cross_entropy(output, query_y), weights)[0]


def _backend(way: str) -> str:
    """The one that runs it, "" for none of fastmeta's."""
    how = WAYS[way]
    if how is None or how[0] != "auto":
        return "" if how is None else how[0]
    net, *episode = _setting()
    rule = fm.AdamW(BETAS, EPS, EPS_ROOT, DECAY)
    maml = fm.MAML(net, loss="cross_entropy", inner_lr=RATE, inner_steps=5, update_rule=rule)
    return maml.explain(*episode).backend


def _kept(way: str, steps: int) -> tuple[float, float]:
    """(copies, times that each step is run), where both are known."""
    _, memory, most = WAYS[way] or ("", "", None)
    if memory == "recompute":
        return steps, 2
    if memory != "checkpoint":
        return math.nan, math.nan
    each = _copy_bytes(_setting()[0])
    slots = slots_for(steps, each, None if most is None else most * each)
    return slots, 1 + advances(steps, slots) / steps


def measure(way: str, steps: int, into: Path) -> None:
    """One run: (seconds, bytes, gradient) into a file."""
    gradient(way, 3)
    with machine.PeakMemory() as memory:
        begin = time.process_time()
        found = gradient(way, steps)
        seconds = time.process_time() - begin
    torch.save((seconds, memory.growth, found), into)


def measure_alone(way: str, steps: int, into: Path) -> None:
    """The same in a process of its own.

    Raises:
        RuntimeError: the run broke.
    """
    command = [sys.executable, __file__, "--one", way, str(steps), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        raise RuntimeError(f"{way} broke: {done.stderr.strip().splitlines()[-1:]}")


def run(
    steps: int, repeats: int, ways: tuple[str, ...], say: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """A row for each way.

    Args:
        steps: K.
        repeats: runs of each way, in turn.
        ways: names in `WAYS`, the first "recompute".
        say: told what goes on.

    Raises:
        RuntimeError: a run broke.
    """
    found: dict[str, list[tuple[float, float, Tensor]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "run.pt"
        for i in range(repeats):
            for way in ways:
                say(f"{way}, K = {steps}, run {i + 1} of {repeats}")
                measure_alone(way, steps, into)
                found[way].append(torch.load(into))
    base, facts = found[ways[0]], machine.facts()
    base_median = statistics.median(seconds for seconds, *_ in base)
    largest = base[0][2].abs().max()
    rows = []
    for way, runs in found.items():
        copies, step_runs = _kept(way, steps)
        seconds = [one[0] for one in runs]
        rows.append(
            Row(
                way,
                _backend(way),
                steps,
                copies,
                copies * _copy_bytes(_setting()[0]) / 2**20,
                step_runs,
                statistics.median(seconds),
                min(seconds),
                statistics.median(seconds) / base_median,
                statistics.median(one[1] for one in runs) / 2**20,
                max(((one[2] - base[0][2]).abs().max() / largest).item() for one in runs),
                facts,
            )
        )
    return rows


def _table(rows: list[Row]) -> Table:
    columns = "copies", "MiB of them", "a step is run", "median s", "min", "ratio", "peak MiB", "difference"
    table = Table("way", "backend", *columns, title=f"{rows[0].steps} steps of AdamW")
    for row in rows:
        numbers = (
            (row.copies, ".0f"),
            (row.copies_mib, ".1f"),
            (row.step_runs, ".1f"),
            (row.median_s, ".2f"),
            (row.min_s, ".2f"),
            (row.ratio, ".2f"),
            (row.peak_mib, ".0f"),
            (row.difference, ".0e"),
        )
        shown = ("" if math.isnan(value) else format(value, form) for value, form in numbers)
        table.add_row(row.way, row.backend, *shown)
    return table


@click.command()
@click.option("--steps", default=1000, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--way", "ways", type=click.Choice(list(WAYS)), multiple=True, help='Beside "recompute"; repeatable.'
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/long_unroll"), show_default=True)
@click.option("--one", type=(str, int, click.Path(path_type=Path)), default=None, hidden=True)
def main(
    steps: int, repeats: int, ways: tuple[str, ...], out: Path, one: tuple[str, int, Path] | None
) -> None:
    """Time a meta-gradient through a long unroll of AdamW, by what is kept of it."""
    if one is not None:
        machine.limit(1)
        measure(*one)
        return
    console = Console(width=130)
    chosen = ("recompute", *(way for way in ways or WAYS if way != "recompute"))
    with console.status("") as status:
        rows = run(steps, repeats, chosen, status.update)
    console.print(_table(rows))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "long_unroll.csv", rows)
    console.print(f"wrote {out / 'long_unroll.csv'}", markup=False)
    if not all(row.difference <= ALLOWED for row in rows):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
