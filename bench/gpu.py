"""Everything that there is to run on a GPU, in one go: tests, verification, benchmark. `make gpu OUT=folder`.

Writes to the folder: tests.txt, verify.txt, gpu.csv (a line for each case, peer and precision, also of what was wrong
or left out, and why). Prints a short table last. Keeps to a budget of seconds: what does not fit in is named.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastmeta.benchmark import cost, machine
from fastmeta.benchmark.peers import Prepared
from fastmeta.benchmark.peers.jax_peers import JaxVmap
from fastmeta.benchmark.peers.ours import MetaGradientPeer
from fastmeta.benchmark.peers.torch_func import TorchCompile, TorchFunc
from fastmeta.cases import WORKLOADS, Case
from fastmeta.models import Siren
from fastmeta.verify import rule
from fastmeta.verify.quantities import relative_error

_SIREN = Case("siren", partial(Siren, (2, 256, 256, 256, 3)), (2,), 16, 1024, 1024, 3, "mse", lr=0.01, wrt_inputs=False)
#: Workload, number of tasks, number of inner steps, queries.
_CHOSEN = (("omniglot", 32, 1, 75), ("miniimagenet", 4, 5, 75), ("mlp", 32, 5, 75), ("sinusoid", 1024, 5, 10))
CASES = [_SIREN] + [
    next(c for c in WORKLOADS[name] if (c.tasks, c.steps, c.queries) == (tasks, steps, queries))
    for name, tasks, steps, queries in _CHOSEN
]
CASES.insert(0, CASES.pop(1))
PRECISIONS = {"highest": "float32", "high": "tf32"}
SEEDS = 3  # a case with kinks is judged by the median of so many
CALLS = 30


class Graphed:
    """A peer's step captured in a CUDA graph."""

    def __init__(self, peer: Any) -> None:
        self.peer, self.name = peer, f"{peer.name}+graph"

    def missing(self) -> str:
        return str(self.peer.missing())

    def version(self) -> str:
        return str(self.peer.version())

    def prepare(self, case: Case, made: Any) -> Prepared:
        inner = self.peer.prepare(case, made)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                inner.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = inner.step()

        def step() -> Any:
            graph.replay()
            return out

        return Prepared(step, inner.gradient)


PEERS: tuple[Any, ...] = (
    MetaGradientPeer("fastmeta-triton", "triton"),
    MetaGradientPeer("fastmeta-cuda", "cuda"),
    TorchFunc(),
    Graphed(TorchFunc()),
    TorchCompile(),
    Graphed(TorchCompile()),
    JaxVmap(),
)


@dataclass(slots=True)
class Row:
    """One peer on one case."""

    case: str
    peer: str
    precision: str
    status: str = "timed"  # "timed" | "wrong" | "broken" | "left out" | "missing"
    reason: str = ""
    error: float = float("nan")  # of the meta-gradient against float64
    allowed: float = float("nan")
    first_call_s: float = float("nan")
    median_ms: float = float("nan")
    min_ms: float = float("nan")
    p20_ms: float = float("nan")
    p80_ms: float = float("nan")
    ratio: float = float("nan")  # to fastmeta-triton
    tflops: float = float("nan")
    peak_mib: float = float("nan")
    peer_version: str = ""


def truth(case: Case, seed: int) -> dict[Any, Tensor]:
    """The meta-gradient in float64, by the torch backend on the GPU."""
    peer = MetaGradientPeer("", "torch").prepare(case, case.build(torch.float64, seed).to("cuda"))
    return _named(peer.gradient(peer.step()))


def _named(gradients: dict[str, Tensor]) -> dict[Any, Tensor]:
    return {("d_params", name): value.detach().double().cpu() for name, value in gradients.items()}


def judge(row: Row, outs: list[dict[Any, Tensor]], refs: list[dict[Any, Tensor]], own: list[float]) -> bool:
    """Fill in the error; whether it is within twice PyTorch's own."""
    row.error = statistics.median(relative_error(o, r, list(r)) for o, r in zip(outs, refs, strict=True))
    row.allowed = rule.FACTOR * statistics.median(own) + rule.FLOOR
    return row.error <= row.allowed


def clock(step: Callable[[], Any]) -> list[float]:
    """Milliseconds of calls, each finished before the next begins; the first three are dropped."""
    times = []
    for i in range(CALLS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def measure(case: Case, precision: str, deadline: float, say: Callable[[str], None]) -> list[Row]:
    """All peers on one case in one precision."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    seeds = range(SEEDS if case.kinks else 1)
    refs = [truth(case, seed) for seed in seeds]
    plain = TorchFunc()
    own = []
    for seed, ref in zip(seeds, refs, strict=True):
        prepared = plain.prepare(case, case.build(torch.float32, seed).to("cuda"))
        own.append(relative_error(_named(prepared.gradient(prepared.step())), ref, list(ref)))
    rows = []
    for peer in PEERS:
        row = Row(case.id, peer.name, PRECISIONS[precision], peer_version=peer.version())
        rows.append(row)
        row.reason = peer.missing()
        if row.reason:
            row.status = "missing"
        elif time.monotonic() > deadline:
            row.status, row.reason = "left out", "the time was used up"
        else:
            say(f"{case.id} {row.precision}: {peer.name}")
            _measure_peer(row, peer, case, refs, own)
    ours = rows[0]
    for row in rows:
        row.ratio = row.median_ms / ours.median_ms
    return rows


def _measure_peer(row: Row, peer: Any, case: Case, refs: list[dict[Any, Tensor]], own: list[float]) -> None:
    try:
        torch.cuda.reset_peak_memory_stats()
        outs, first = [], None
        for seed in range(len(refs)):
            start = time.perf_counter()
            prepared = peer.prepare(case, case.build(torch.float32, seed).to("cuda"))
            out = prepared.step()
            torch.cuda.synchronize()
            if first is None:
                first, row.first_call_s = prepared, time.perf_counter() - start
            outs.append(_named(prepared.gradient(out)))
        if not judge(row, outs, refs, own):
            row.status = "wrong"
            return
        times = clock(first.step)  # type: ignore[union-attr]
        row.median_ms, row.min_ms = statistics.median(times), times[0]
        row.p20_ms, row.p80_ms = times[len(times) // 5], times[4 * len(times) // 5]
        row.tflops = cost.flops(case) / row.median_ms / 1e9
        row.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    except Exception as error:  # a peer that breaks is reported; the others still count
        row.status, row.reason = "broken", f"{type(error).__name__}: {str(error)[:300]}"


def _logged(path: Path, seconds: float, *command: str) -> str:
    """Run a command with its output in a file; its last line, or what went wrong."""
    with path.open("w") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s, see {path.name}"
    lines = path.read_text().strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/gpu"))
@click.option("--seconds", default=450, help="Budget of the whole run.")
def main(out: Path, seconds: int) -> None:
    """Test, verify and time the GPU backends."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=150)
    begin = time.monotonic()
    deadline = begin + seconds
    said = {
        "tests": ("tests.txt", 0.3, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20")),
        "verify": (
            "verify.txt",
            0.2,
            ("-m", "fastmeta", "verify", "--backend", "triton", "--dtype", "float64", "--case", "conv"),
        ),
    }
    results = {
        what: _logged(out / name, share * seconds, sys.executable, *arguments)
        for what, (name, share, arguments) in said.items()
    }
    rows: list[Row] = []
    for case in CASES:
        for precision in PRECISIONS:
            rows += measure(case, precision, deadline - 30, console.print)
            _write(out / "gpu.csv", rows)
    console.print(_table(rows))
    for what, result in results.items():
        console.print(f"{what}: {result}")
    console.print(f"{time.monotonic() - begin:.0f} s; wrote {out / 'gpu.csv'}")


def _write(path: Path, rows: list[Row]) -> None:
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *facts])
        writer.writeheader()
        writer.writerows({**asdict(row), **facts} for row in rows)


def _table(rows: list[Row]) -> Table:
    table = Table(title=torch.cuda.get_device_name())
    for heading in ("case", "precision", "peer", "median ms", "ratio", "TFLOP/s", "error", "allowed", "first s", ""):
        table.add_column(heading)
    for row in rows:
        numbers = (f"{row.median_ms:.3f}", f"{row.ratio:.2f}", f"{row.tflops:.2f}", f"{row.error:.1e}")
        note = "" if row.status == "timed" else f"{row.status} {row.reason}"[:40]
        rest = (f"{row.allowed:.1e}", f"{row.first_call_s:.1f}", note)
        table.add_row(row.case, row.precision, row.peer, *numbers, *rest)
    return table


if __name__ == "__main__":
    main()
