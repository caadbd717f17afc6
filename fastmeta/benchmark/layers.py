"""The cases of one layer kind on the clock, beside an earlier commit or an earlier measurement."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch

from fastmeta import backends
from fastmeta.benchmark import machine
from fastmeta.benchmark.peers import Prepared
from fastmeta.benchmark.timing import Protocol, measure
from fastmeta.cases import Case
from fastmeta.errors import BackendUnavailable
from fastmeta.layers.registry import KINDS
from fastmeta.problem import Problem, Scratch
from fastmeta.verify import verify_case
from fastmeta.verify.problems import problem_of, wanted

Say = Callable[[str], None]
#: Tasks of every case: enough to keep the threads busy.
TASKS = 64


@dataclass(slots=True)
class LayerRow:
    """One case of a kind and its times in milliseconds, nan where there are none."""

    kind: str
    case: str
    what: str  # "forward": losses and outputs alone; "gradient": with every gradient of the case
    backend: str = ""
    status: str = "timed"  # "timed" | "wrong" | "missing"
    reason: str = ""  # why it was not timed
    tasks: int = 0
    threads: int = 0
    calls: int = 0
    median_ms: float = math.nan
    min_ms: float = math.nan
    base_median_ms: float = math.nan
    base_min_ms: float = math.nan
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What a row of another measurement must share with it to be compared."""
        return self.kind, self.case, self.what, self.backend, str(self.tasks), str(self.threads)

    @property
    def ratio(self) -> float:
        """Of the medians, this one over the base."""
        return self.median_ms / self.base_median_ms

    @property
    def ratio_of_minima(self) -> float:
        """Of the fastest calls, this one over the base."""
        return self.min_ms / self.base_min_ms


def run(
    kinds: Sequence[str],
    *,
    backend: str = "auto",
    tasks: int = TASKS,
    threads: int = 2,
    protocol: Protocol | None = None,
    say: Say = lambda _: None,
) -> list[LayerRow]:
    """Time the cases of some layer kinds in float32, each checked in float64 first.

    Args:
        kinds: names in `fastmeta.layers.registry.KINDS`.
        backend: a name of `fastmeta.backends.NAMES`, or "auto".
        tasks: of every case.
        threads: cores that this process keeps to, from now on.
        protocol: of the clock; None: the usual one.
        say: told what goes on.

    Returns:
        Two rows a case, "forward" and "gradient".

    Raises:
        ValueError: more threads than cores, or no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"bench: no layer kind is called {kind!r}; there are {', '.join(KINDS)}")
    machine.limit(threads)
    facts = machine.facts()
    rows = []
    for kind in kinds:
        for case in KINDS[kind].cases():
            say(case.id)
            for row in _timed(kind, case, backend, tasks, protocol or Protocol()):
                row.tasks, row.threads, row.facts = tasks, threads, facts
                rows.append(row)
    return rows


def _timed(kind: str, case: Case, backend: str, tasks: int, protocol: Protocol) -> list[LayerRow]:
    forward, gradient = LayerRow(kind, case.id, "forward"), LayerRow(kind, case.id, "gradient")
    rows = [forward, gradient]
    device = backends.device(backend) if backend != "auto" else _device()
    problem = problem_of(replace(case, tasks=tasks), torch.float32, 0, device)
    wrt = wanted(case, problem)
    try:
        module = backends.select(backend, problem, wrt)
    except BackendUnavailable as error:
        return [replace(row, status="missing", reason=str(error)) for row in rows]
    name = module.__name__.rpartition(".")[2]
    wrong = [row for row in verify_case(case, name, "float64", seeds=1) if not row.passed]
    if wrong:
        return [replace(row, backend=name, status="wrong", reason=str(wrong[0])) for row in rows]
    calls = {
        "forward": _call(module, replace(problem, scratch=Scratch()), frozenset(), case),
        "gradient": _call(module, problem, wrt, case),
    }
    for call in calls.values():
        call.step()  # whatever is planned or compiled
    times = measure(calls, protocol)
    for row in rows:
        found = times[row.what]
        row.backend, row.calls = name, len(found.total)
        row.median_ms, row.min_ms = 1e3 * found.median, 1e3 * min(found.total)
    return rows


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _call(module: ModuleType, problem: Problem, wrt: frozenset[str], case: Case) -> Prepared:
    on_gpu = next(iter(problem.params.values())).is_cuda

    def step() -> None:
        module.solve(problem, wrt, case.operator == "inner_sgd")
        if on_gpu:
            torch.cuda.synchronize()

    return Prepared(step, lambda _: {})


def compare(rows: Iterable[LayerRow], base: Iterable[LayerRow]) -> None:
    """Note in each row what the same was in an earlier measurement.

    Raises:
        ValueError: they have nothing in common.
    """
    known = {row.key: row for row in base if row.status == "timed"}
    found = False
    for row in rows:
        before = known.get(row.key)
        if before is not None and row.status == "timed":
            row.base_median_ms, row.base_min_ms, found = before.median_ms, before.min_ms, True
    if not found:
        raise ValueError("bench: the base has no row of the same case, backend, tasks and threads")


def read_csv(path: Path) -> list[LayerRow]:
    """The rows that `fastmeta.benchmark.write_csv` has written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        return [
            LayerRow(
                line["kind"],
                line["case"],
                line["what"],
                line["backend"],
                line["status"],
                line["reason"],
                int(line["tasks"]),
                int(line["threads"]),
                int(line["calls"]),
                float(line["median_ms"] or math.nan),
                float(line["min_ms"] or math.nan),
            )
            for line in lines
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bench: {path} is no file of `fastmeta bench --layer`: {error!r}") from error


@contextmanager
def tree_of(commit: str, say: Say = lambda _: None) -> Iterator[Path]:
    """A work tree of a commit of the repository that the package lies in, its extension built, for
    as long as the context lasts.

    Raises:
        ValueError: there is no repository, no such commit, or it cannot be built.
    """
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="fastmeta-base-") as folder:
        tree = Path(folder) / "tree"
        _command("git", "-C", str(root), "worktree", "add", "--detach", str(tree), commit)
        try:
            say(f"building {commit}")
            _command(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
            installed = tree / "fastmeta" / "kernels"  # where Python looks for the Triton kernels
            if not installed.exists():
                installed.symlink_to(tree / "kernels")
            yield tree
        finally:
            _command("git", "-C", str(root), "worktree", "remove", "--force", str(tree))


def run_in(tree: Path, arguments: Sequence[str]) -> list[LayerRow]:
    """The rows of `fastmeta bench` with these arguments in a work tree.

    Raises:
        ValueError: the command failed there.
    """
    out = tree.parent / "out"
    command = (sys.executable, "-m", "fastmeta", "bench", *arguments, "--out", str(out))
    _command(*command, cwd=tree)
    return read_csv(out / "layers.csv")


def _command(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"bench: `{' '.join(command)}` failed: {said[-1] if said else done.returncode}")
