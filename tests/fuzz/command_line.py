"""Fuzzer of the command line: random, hostile and contradictory arguments and files, in one process.

    python tests/fuzz/command_line.py --calls 20000 --seed 0

Every call must end with exit code 0, or with one sentence on stderr and exit code 1 or 2: no traceback, no hang, no
signal handler, open file or temporary file left behind. What would run long is replaced: peers are not timed, and
training behaves as if Ctrl-C came after three iterations. Prints every fault with the fewest arguments that show it.
Exit code 1 on any fault.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from zipfile import ZipFile

import torch
from click.testing import CliRunner, Result

from fastmeta.backends import NAMES as BACKENDS
from fastmeta.benchmark import PEERS, engine, inner_memory, orders
from fastmeta.benchmark import machine as bench_machine
from fastmeta.cases import WORKLOADS
from fastmeta.cli import main as fastmeta
from fastmeta.cli.train import interrupt, plots
from fastmeta.verify import Row as Verified

#: Seconds that a call may take.
LIMIT = 20
INTERRUPTED = 130

NUMBERS = (
    "0", "1", "2", "3", "-1", "-0", "1.5", "nan", "inf", "-inf", "1e308", "1e-400", "1e30", "2147483647", "2147483648",
    "4294967295", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000, "0x10", "1_0",
    "٣", "½", "", " ", " 2 ", "two", "1,2", "\n", "--", "-", "0.01", "1e-3", "True",
)  # fmt: skip
WORDS = (
    "",
    " ",
    "nonsense",
    "ü",
    "\udcff",
    "a\nb",
    "[bold]x",
    "[/red]",
    "\\[",
    "%s%n",
    "a" * 300,
    "\0",
    "*",
    "\x1b[2J",
)
#: Names of what stands in the folder of the fuzzer, and of what does not.
PATHS = (
    "new", "new/deep/er", "file", "file/below", "folder", "run", "damaged", "torn", "foreign", "dangling", "loop",
    "/dev/null", "/dev/full", "/dev/null/x", "/proc/version", "/proc/self/mem", "/proc/nowhere", "pipe", "ünï",
    "\udcff", "[bold]", "[/red]", "a\nb", " ", "", ".", "..", "-", "--out", "~", "x" * 300, "x/" * 3000, "\0",
    "new\0er", "$HOME", "full-of-folders", "locked", "omniglot", "no-zips", "broken-zips",
)  # fmt: skip
SINUSOID = ("--shots", "--inner-lr", "--inner-steps", "--tasks", "--eval-tasks", "--eval-steps")
OMNIGLOT = (
    "--width", "--ways", "--shots", "--query", "--inner-lr", "--inner-steps", "--tasks", "--eval-episodes",
    "--eval-query", "--eval-steps",
)  # fmt: skip
RUN = ("--iterations", "--outer-lr", "--seed", "--log-every", "--checkpoint-every", "--threads")
FLAGS = (
    "--resume",
    "--overwrite",
    "--first-order",
    "--tensorboard",
    "--quick",
    "--all",
    "--list",
    "--help",
    "-h",
    "-V",
)
COMMANDS = (
    ("info",), ("verify",), ("bench",), ("cost",), ("train",), ("train", "sinusoid"), ("train", "omniglot"), (),
    ("nonsense",),
)  # fmt: skip
WEIGHTS = (1, 2, 2, 2, 1, 12, 6, 1, 1)
#: Small enough to run.
TINY_SINUSOID = "--tasks 2 --shots 2 --eval-tasks 2 --eval-steps 1 --iterations 2 --log-every 1".split()
TINY_OMNIGLOT = (
    "--ways 2 --query 1 --tasks 1 --eval-episodes 2 --eval-query 1 --eval-steps 1 --iterations 2 --model conv4-strided "
    "--width 2 --inner-steps 1 --data omniglot"
).split()


def draw(choice: random.Random) -> list[str]:
    """The arguments of a call."""
    command = list(choice.choices(COMMANDS, WEIGHTS)[0])
    arguments = [*command]
    if command == ["train", "sinusoid"] and choice.random() < 0.8:
        arguments += TINY_SINUSOID
    if command == ["train", "omniglot"] and choice.random() < 0.8:
        arguments += TINY_OMNIGLOT
    if command[:1] == ["train"] and choice.random() < 0.9:
        arguments += ["--out", choice.choice(PATHS)]
    for _ in range(choice.choice((0, 0, 1, 1, 1, 2, 2, 3, 5))):
        arguments += _option(command, choice)
    if choice.random() < 0.03:
        choice.shuffle(arguments)
    return arguments


def _option(command: list[str], choice: random.Random) -> list[str]:
    name = command[-1] if command else ""
    if choice.random() < 0.15:
        return [choice.choice((*FLAGS, *WORDS, "--", "-x", "--no-such", "=", "--out=", "--seed="))]
    if choice.random() < 0.35:
        return [choice.choice(FLAGS)]
    if choice.random() < 0.2:
        return ["--out", choice.choice(PATHS)]
    if name == "verify":
        values = {
            "--backend": (*BACKENDS, *WORDS),
            "--dtype": ("float32", "float64", *WORDS),
            "--case": (*WORDS, "sine"),
        }
    elif name == "bench":
        values = {
            "--workload": (*WORKLOADS, *WORDS),
            "--peers": (*PEERS, ",", ",,", *WORDS),
            **dict.fromkeys(("--tasks", "--shots", "--steps", "--threads"), (*NUMBERS, "4", "5", "10")),
        }
    elif name == "cost":
        values = {"--workload": (*WORKLOADS, *WORDS), "--steps": NUMBERS, "--threads": NUMBERS}
    elif name == "omniglot":
        values = {
            **dict.fromkeys((*OMNIGLOT, *RUN), NUMBERS),
            "--model": ("mlp", "mlp-bn", "conv4", "conv4-strided", *WORDS),
            "--data": PATHS,
            "--backend": ("auto", *BACKENDS, *WORDS),
        }
    else:
        values = {**dict.fromkeys((*SINUSOID, *RUN), NUMBERS), "--backend": ("auto", *BACKENDS, *WORDS)}
    option = choice.choice(list(values))
    value = choice.choice(values[option])
    return [f"{option}={value}"] if choice.random() < 0.2 else [option, value]


class TooLong(BaseException):
    """A call took longer than it may."""


def _too_long(number: int, frame: object) -> None:
    raise TooLong


class Soon(interrupt.Interrupt):
    """Ctrl-C after three iterations: what was asked for may be two thousand million of them."""

    def __init__(self) -> None:
        self._left = 3
        super().__init__()

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether to stop."""
        self._left -= 1
        return self._left < 0 or self._asked

    @requested.setter
    def requested(self, asked: bool) -> None:
        self._asked = asked


@contextmanager
def light() -> Iterator[None]:
    """Replace what takes long and is not the command line's."""
    verified = Verified("made-up", "torch", "float64", "params", 0.0, 0.0, 1e-9, "", False)
    peak = inner_memory.MemoryRow("made-up", "store", 1, 1.0, 1.0)
    with ExitStack() as stack:

        def put(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        put(sys.modules["fastmeta.cli.verify"], "run_case", lambda case, backend, dtype: [verified])
        put(sys.modules["fastmeta.cli.train.loop"], "Interrupt", Soon)
        put(plots, "_figure", lambda *given, **options: None)
        put(engine, "_check", lambda workload, case, name, threads: (_missing(workload, case.id, name), None))
        put(engine, "measure", lambda prepared, protocol: {})
        put(bench_machine, "fma_peak", lambda dtype, threads: 1.0)
        put(bench_machine, "limit", bench_machine.check_threads)
        put(bench_machine, "facts", lambda: {"device": "made-up"})
        put(inner_memory, "run", lambda *given, **options: [peak])
        put(orders, "_rows", lambda *given: [])
        yield


def _missing(workload: str, case: str, name: str) -> engine.Row:
    row = engine.Row(workload, case, name)
    row.status, row.reason = "missing", "made up"
    return row


def furnish(root: Path) -> None:
    """The folder that the calls run in."""
    (root / "file").write_text("dear diary\n")
    (root / "folder").mkdir()
    (root / "ünï").mkdir()
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe")
    for name in ("run", "damaged", "torn", "foreign"):
        done = call(["train", "sinusoid", *TINY_SINUSOID, "--checkpoint-every", "1", "--out", str(root / name)])
        if done.exit_code:
            raise RuntimeError(f"the run that the fuzzer begins with failed: {done.output}")
    (root / "damaged" / "checkpoint.pt").write_bytes(b"PK\x05\x06" * 100)
    (root / "torn" / "metrics.csv").write_bytes((root / "torn" / "metrics.csv").read_bytes()[:-3])
    (root / "foreign" / "metrics.csv").write_text("name,age\n")
    for name in ("metrics.csv", "checkpoint.pt", "bench.csv", "memory.csv"):
        (root / "full-of-folders" / name).mkdir(parents=True)
    (root / "locked").mkdir()
    (root / "locked" / "lock").mkdir()
    _drawings(root)


def _drawings(root: Path) -> None:
    """A small made-up Omniglot, one that is none, and one whose drawings are broken."""
    from PIL import Image

    for name in ("omniglot", "no-zips", "broken-zips"):
        (root / name).mkdir()
    alphabets = {"small1": ("Balinese", "Early_Aramaic", "Korean"), "small2": ("Greek", "Latin")}
    for part, names in alphabets.items():
        (root / "no-zips" / f"images_background_{part}.zip").write_text("no zip file")
        files = [root / folder / f"images_background_{part}.zip" for folder in ("omniglot", "broken-zips")]
        with ZipFile(files[0], "w") as right, ZipFile(files[1], "w") as broken:
            for alphabet in names:
                for drawing in range(4):
                    path = f"{part}/{alphabet}/character01/{drawing:04}.png"
                    with right.open(path, "w") as file:
                        Image.new("1", (105, 105), drawing % 2).save(file, "png")
                    broken.writestr(path, b"\x89PNG\r\n\x1a\n" + bytes(40))


def call(arguments: list[str]) -> Result:
    """Run the command line in this process."""
    return CliRunner(env={"FASTMETA_DATA": "omniglot", "COLUMNS": "100"}).invoke(fastmeta, arguments)


@contextmanager
def furnished() -> Iterator[Path]:
    """The process in a fresh copy of the fuzzer's folder; everything light."""
    before = Path.cwd()
    threads, handler = torch.get_num_threads(), signal.signal(signal.SIGALRM, _too_long)
    root = Path(tempfile.mkdtemp(prefix="command-line-"))
    torch.set_num_threads(1)
    try:
        with light():
            (root / "model").mkdir()
            furnish(root / "model")
            (root / "work").mkdir()
            os.chdir(root / "work")
            yield root
    finally:
        os.chdir(before)
        shutil.rmtree(root, ignore_errors=True)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGALRM, handler)


@dataclass
class Report:
    """What a run of the fuzzer has done."""

    calls: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def fault(arguments: list[str], root: Path, report: Report | None = None) -> str:
    """What is wrong with a call; empty if nothing is. Its exit code is counted in `report`."""
    work = root / "work" / "here"
    if not work.exists():
        shutil.copytree(root / "model", work, symlinks=True, copy_function=_copy, ignore=shutil.ignore_patterns("pipe"))
        if hasattr(os, "mkfifo"):
            os.mkfifo(work / "pipe")
    os.chdir(work)
    before = _names()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    descriptors = _descriptors()
    signal.alarm(LIMIT)
    try:
        done = call(arguments)
    except TooLong:
        return f"took longer than {LIMIT} s"
    finally:
        signal.alarm(0)
        os.chdir(work)
        after = _names()
        os.chdir(root)
    if isinstance(done.exception, TooLong):
        return f"took longer than {LIMIT} s"
    if handlers != [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]:
        return "signal handlers were left behind"
    if _descriptors() > descriptors:
        return "files were left open"
    torch.set_num_threads(1)
    if report is not None:
        report.codes[done.exit_code] = report.codes.get(done.exit_code, 0) + 1
    if left := list(work.rglob("*.new")):
        return f"left behind {left[0].name}"
    # What was refused as it was asked for has changed nothing, and the next call may have the same folder.
    if done.exit_code != 2:
        shutil.rmtree(work)
    elif before != after and not after - before <= {"lock"}:
        return f"a refused call left {sorted(after ^ before)}"
    return _said(done)


def _names() -> set[str]:
    return {entry.name for entry in os.scandir(".")}


def _copy(source: str, target: str) -> None:
    # Links are faster than copies, and every file is written anew, never in place; but a lock is.
    if source.endswith("lock"):
        return
    os.link(source, target)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _said(done: Result) -> str:
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        if isinstance(done.exception, OSError) and done.exception.errno == errno.EPIPE:
            return ""
        where = traceback.extract_tb(done.exception.__traceback__)[-1]
        words = str(done.exception)[:200]
        return f"{type(done.exception).__name__} in {Path(where.filename).name}:{where.lineno}: {words}"
    if done.exit_code not in (0, 1, 2, INTERRUPTED):
        return f"exit code {done.exit_code}"
    if "Traceback" in done.output:
        return "a traceback was printed"
    if done.exit_code in (1, 2) and "Usage: " not in done.stdout:
        sentences = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        if len(sentences) != 1 and "Usage: " not in done.stderr:
            return f"exit code {done.exit_code} with {len(sentences)} sentences: {done.stderr[-200:]!r}"
    return ""


def reduced(arguments: list[str], root: Path) -> list[str]:
    """The fewest of the arguments that still show a fault."""
    changed = True
    while changed:
        changed = False
        for width in (2, 1):
            for at in range(len(arguments) - width, -1, -1):
                fewer = arguments[:at] + arguments[at + width :]
                if fault(fewer, root):
                    arguments, changed = fewer, True
                    break
    return arguments


def fuzz(calls: int, seed: int, start: int = 0, most_faults: int = 20) -> Report:
    """Make so many calls, or fewer if there are too many faults; call 17 of a seed is the same whatever `start` is."""
    report, shown = Report(), time.monotonic()
    with furnished() as root:
        for number in range(start, start + calls):
            arguments = draw(random.Random(f"{seed}-{number}"))
            report.calls += 1
            if wrong := fault(arguments, root, report):
                small = reduced(arguments, root)
                report.faults.append(
                    f"--seed {seed} --start {number}: {fault(small, root) or wrong}\n  fastmeta {small}"
                )
                print(report.faults[-1].encode("ascii", "backslashreplace").decode(), flush=True)
                if len(report.faults) >= most_faults:
                    break
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"seed {seed}: {report.calls} calls, {len(report.faults)} faults", flush=True)
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    begun = time.monotonic()
    report = fuzz(given.calls, given.seed, given.start)
    seconds = time.monotonic() - begun
    print(f"seed {given.seed}: {report.calls} calls in {seconds:.0f} s, {len(report.faults)} faults")
    print("exit codes " + ", ".join(f"{code}: {count}" for code, count in sorted(report.codes.items())))
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
