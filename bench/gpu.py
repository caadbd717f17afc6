"""Everything that there is to run on a GPU, in one go: tests, verification, benchmark.
`make gpu OUT=folder`.

Says first what failed and why: each reason once, with how many tests had it. Writes to the folder:
a text for each stage, cuda.csv, and gpu.csv, a line for each case, precision and peer, also of what
was wrong or left out, and why. Prints a short table last.

Keeps to a budget of seconds. Tests run side by side, since what takes the time is compiling.
fastmeta is timed on all cases before its peers are. What does not fit in is named, and what hangs
or takes the process with it costs its own line alone.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import gpu_timing as timing
import torch
import triton
from gpu_timing import Row
from rich.console import Console
from rich.table import Table

from fastmeta import backends
from fastmeta.benchmark import machine

#: Seconds that one line of the table may take: a compiler that takes longer is stopped.
LIMIT = 120.0
#: Reasons of failures that are printed of one stage.
MOST_REASONS = 12
#: Seconds that tests have to sum up what they have found when their time is over.
GRACE = 10.0
TESTS = Path(__file__).parent.parent / "tests"
_ON_GPU = sorted(str(file) for file in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in file.read_text())
_TRITON = tuple(file for file in _ON_GPU if Path(file).name == "test_triton_gpu.py")
_OTHERS = tuple(file for file in _ON_GPU if file not in _TRITON)
_PYTEST = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--color=no")
_PARALLEL = ("-n", str(min(os.cpu_count() or 1, 16)), "--dist", "worksteal") if find_spec("xdist") else ()
_VERIFY = ("-m", "fastmeta", "verify", "--backend")
_OUT = "OUT"  # stands for the folder
#: What runs before the benchmark, each with its share of the time; without a GPU, that it can be
#: started.
STAGES = {
    "triton": (0.22, (*_PYTEST, *_PARALLEL, *_TRITON)),
    "others": (0.22, (*_PYTEST, *_PARALLEL, *_OTHERS)),
    "verify": (0.08, (*_VERIFY, "triton", "--dtype", "float64", "--case", "conv")),
    "cuda": (0.08, (str(TESTS.parent / "bench" / "cuda_meta_step.py"), "--quick", "--out", _OUT)),
}
DRY_STAGES = {
    "triton": (0.18, (*_PYTEST, "--collect-only", *_TRITON)),
    "others": (0.12, (*_PYTEST, "--collect-only", *_OTHERS)),
    "verify": (0.15, (*_VERIFY, "torch", "--dtype", "float64", "--case", "sigmoid_head")),
    "cuda": (0.15, (str(TESTS.parent / "bench" / "cuda_meta_step.py"), "--help")),
}

Job = tuple[str, str, str]


class Worker:
    """A process of `gpu_timing`, and what it says as it comes."""

    def __init__(self, jobs: list[Job], log: Path, command: tuple[str, ...]) -> None:
        self.log = log.open("a")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(jobs))
            self.process.stdin.close()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def stop(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def timed(jobs: list[Job], deadline: float, out: Path, say: Any, command: tuple[str, ...] = ()) -> list[Row]:
    """A row for every job, whatever happens to the processes that do them."""
    command = command or (sys.executable, str(Path(timing.__file__)))
    rows: list[Row] = []
    while jobs and time.monotonic() < deadline:
        worker, begun, some = Worker(jobs, out / "timing.txt", command), False, False
        try:
            while jobs:
                left = deadline - time.monotonic()
                line = worker.lines.get(timeout=max(min(LIMIT, left), 0.01))
                if line is None:
                    if begun or not some:  # else it gave up a device that a job had broken
                        said = f"its process ended with code {worker.process.wait()}, see timing.txt"
                        rows.append(_unfinished(jobs.pop(0), "broken", said))
                    break
                if "begin" in line:
                    say(" ".join(line["begin"]))
                    begun = True
                    continue
                begun, some = False, True
                jobs.pop(0)
                rows.append(Row(**line["row"]))
                _write(out / "gpu.csv", rows)
        except queue.Empty:
            if time.monotonic() < deadline or begun:
                rows.append(
                    _unfinished(jobs.pop(0), "stopped", f"it took more than {min(LIMIT, left):.0f} s")
                )
        finally:
            worker.stop()
    rows += [_unfinished(job, "left out", "the time was used up") for job in jobs]
    _compare(rows)
    _write(out / "gpu.csv", rows)
    return rows


def _unfinished(job: Job, status: str, reason: str) -> Row:
    case, precision, peer = job
    return Row(case, timing.PRECISIONS[precision], peer, status, reason)


def _compare(rows: list[Row]) -> None:
    ours = {(row.case, row.precision, row.peer): row for row in rows if row.peer in timing.OURS}
    for row in rows:
        nothing = Row(row.case, row.precision, "")
        triton_row, cuda_row = (ours.get((row.case, row.precision, peer), nothing) for peer in timing.OURS)
        row.ratio, row.ratio_cuda = row.median_ms / triton_row.median_ms, row.median_ms / cuda_row.median_ms
        row.per_device = row.median_ms / cuda_row.device_ms


def _logged(path: Path, seconds: float, arguments: tuple[str, ...]) -> tuple[bool, list[str]]:
    """Run a command of this Python with its output in a file.

    Returns:
        Whether all was well; how it ended, and below that what failed and why.
    """
    # hundreds of small plans are not worth tuning, and many processes at once not many threads each
    environment = {**os.environ, "FASTMETA_TUNE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command = [sys.executable, *arguments]
    with path.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            ended = f"exit code {process.wait(max(seconds, 1))}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest says what it has found so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = path.read_text(errors="replace").strip().splitlines()
    passed, failed = (_tests(lines, outcome) for outcome in ("PASSED", "FAILED|ERROR"))
    last = lines[-1].strip("= ") if lines else "no output"
    summary = f"{ended}, {len(passed)} passed, {len(failed)} failed; {last}"
    return ended == "exit code 0", [summary, *(f"  {said[:300]}" for said in _reasons(lines))]


def _tests(lines: list[str], outcome: str) -> set[str]:
    """The tests with an outcome, as pytest prints them, alone or side by side."""
    found = (re.search(rf"^(\S+::\S+) ({outcome})\b|\] ({outcome}) (\S+::\S+)", line) for line in lines)
    return {match[1] or match[4] for match in found if match}


def _reasons(lines: list[str]) -> list[str]:
    """What pytest's summary says of failures and skips: each reason once, the commonest first, and
    one of its tests."""
    failures: dict[str, list[str]] = {}
    for line in lines:
        if match := re.match(r"(?:FAILED|ERROR) (\S+)(?: - (.*))?$", line):
            failures.setdefault(re.sub(r"\d+", "#", match[2] or "")[:120], []).append(
                f"{match[2]} ({match[1]})"
            )
    common = sorted(failures.values(), key=len, reverse=True)
    said = [f"{len(several)} x {several[0]}" for several in common[:MOST_REASONS]]
    said += [f"and {len(common) - MOST_REASONS} other reasons"] if len(common) > MOST_REASONS else []
    skips = (re.match(r"SKIPPED \[(\d+)\] \S+: (.*)", line) for line in lines)
    return said + [f"skipped {match[1]} x {match[2]}" for match in skips if match]


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/gpu"))
@click.option("--seconds", default=450, help="Budget of the whole run.")
@click.option("--stage", "stages", multiple=True, type=click.Choice([*STAGES, "timing"]), help="These alone.")
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice(list(timing.PEERS)), help="Time these alone."
)
@click.option("--dry-run", is_flag=True, help="Without a GPU, on tiny cases: to see that all else works.")
def main(out: Path, seconds: int, stages: tuple[str, ...], peers: tuple[str, ...], dry_run: bool) -> None:
    """Test, verify and time the GPU backends."""
    if not torch.cuda.is_available() and not dry_run:
        raise click.ClickException("there is no CUDA device")
    out.mkdir(parents=True, exist_ok=True)
    (out / "timing.txt").write_text("")
    console = Console(width=170)
    begin = time.monotonic()
    failures = False
    for name in () if dry_run else ("cuda", "triton"):
        if reason := backends.get(name).missing():
            console.print(f"backend {name} cannot run here: {reason}", markup=False)
            failures = True
    for what, (share, arguments) in (DRY_STAGES if dry_run else STAGES).items():
        if stages and what not in stages:
            continue
        arguments = tuple(str(out) if argument == _OUT else argument for argument in arguments)
        fine, said = _logged(out / f"{what}.txt", share * seconds, arguments)
        failures |= not fine
        for line in said:
            console.print(f"{what}: {line}", markup=False, highlight=False)
    cases = timing.DRY if dry_run else timing.CASES
    pairs = [(case, peer) for peer in peers or timing.PEERS for case in cases if timing.suits(case, peer)]
    jobs = [(case, precision, peer) for case, peer in pairs for precision in timing.PRECISIONS]
    jobs = [] if stages and "timing" not in stages else jobs
    rows = timed(jobs, begin + seconds, out, lambda line: console.print(line, markup=False))
    for row in rows:
        if row.status not in ("timed", "missing", "left out"):
            console.print(f"{row.case} {row.precision} {row.peer}: {row.status} {row.reason}", markup=False)
    console.print(_table(rows))
    console.print(f"{time.monotonic() - begin:.0f} s; wrote {out / 'gpu.csv'}", markup=False)
    if failures or any(
        row.status in ("wrong", "broken", "stopped") for row in rows if row.peer in timing.OURS
    ):
        raise click.exceptions.Exit(1)


def _write(path: Path, rows: list[Row]) -> None:
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
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
    table = Table(title=torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
    headings = (
        "case",
        "precision",
        "peer",
        "median ms",
        "device ms",
        "to triton",
        "to cuda",
        "TFLOP/s",
        "roofline",
    )
    for heading in (*headings, "error", "allowed", "first s", "MiB", ""):
        table.add_column(heading)
    for row in rows:
        times = (f"{x:.3f}" for x in (row.median_ms, row.device_ms))
        rates = (f"{x:.2f}" for x in (row.ratio, row.ratio_cuda, row.tflops))
        errors = (f"{row.error:.1e}", f"{row.allowed:.1e}", f"{row.first_call_s:.1f}", f"{row.peak_mib:.0f}")
        note = "" if row.status == "timed" else f"{row.status} {row.reason}"[:40]
        table.add_row(
            row.case, row.precision, row.peer, *times, *rates, f"{row.roofline_share:.0%}", *errors, note
        )
    return table


if __name__ == "__main__":
    main()
