"""Fuzzer of the command line: random, hostile and contradictory arguments and files, many calls a
process.

    python tests/fuzz/command_line.py --calls 20000 --seed 0

Every call must end with exit code 0, or with one sentence on stderr and exit code 1 or 2: no
traceback, no hang, no
signal handler, open file or temporary file left behind. What would run long is replaced: peers are
not timed, and training behaves as if Ctrl-C came after three iterations. A call that hangs ends its
process, which first prints where all threads are. Prints every fault with the fewest arguments that
show it. Exit code 1 on any fault.
"""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from zipfile import ZipFile

import running
import torch
from click.testing import CliRunner, Result

from fastmeta.backends import NAMES as BACKENDS
from fastmeta.benchmark import PEERS, engine, inner_memory, orders
from fastmeta.benchmark import machine as bench_machine
from fastmeta.cases.workloads import WORKLOADS
from fastmeta.cli import main as fastmeta
from fastmeta.cli.train import interrupt, plots
from fastmeta.verify import Row as Verified

#: Seconds that a call may take.
LIMIT = 20
INTERRUPTED = 130

NUMBERS = (
    "0", "1", "2", "3", "-1", "-0", "1.5", "nan", "inf", "-inf", "1e308", "1e-400", "1e30", "2147483647",
    "2147483648",
    "4294967295", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000,
    "0x10",
    "1_0",
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
    "new", "new/deep/er", "file", "file/below", "folder", "run", "damaged", "torn", "foreign", "dangling",
    "loop",
    "/dev/null", "/dev/full", "/dev/null/x", "/proc/version", "/proc/self/mem", "/proc/nowhere", "pipe",
    "ünï",
    "\udcff", "[bold]", "[/red]", "a\nb", " ", "", ".", "..", "-", "--out", "~", "x" * 300, "x/" * 3000, "\0",
    "new\0er", "$HOME", "full-of-folders", "locked", "omniglot", "no-zips", "broken-zips",
)  # fmt: skip
SINUSOID = ("--shots", "--inner-lr", "--inner-steps", "--tasks", "--eval-tasks", "--eval-steps")
OMNIGLOT = (
    "--width", "--ways", "--shots", "--query", "--inner-lr", "--inner-steps", "--tasks", "--eval-episodes",
    "--eval-query", "--eval-steps",
)  # fmt: skip
RUN = ("--iterations", "--outer-lr", "--seed", "--log-every", "--checkpoint-every", "--threads")
ENDLESS = ("--eval-steps", "--eval-episodes")
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
    ("info",), ("verify",), ("bench",), ("cost",), ("train",), ("train", "sinusoid"), ("train", "omniglot"),
    (), ("nonsense",),
)  # fmt: skip
WEIGHTS = (1, 2, 2, 2, 1, 12, 6, 1, 1)
#: Small enough to run.
TINY_SINUSOID = "--tasks 2 --shots 2 --eval-tasks 2 --eval-steps 1 --iterations 2 --log-every 1".split()
TINY_OMNIGLOT = (
    "--ways 2 --query 1 --tasks 1 --eval-episodes 2 --eval-query 1 --eval-steps 1 --iterations 2 --model "
    "conv4-strided --width 2 --inner-steps 1 --data omniglot"
).split()


@dataclass(frozen=True)
class Spec:
    """One call."""

    arguments: tuple[str, ...] = ()

    def simpler(self) -> Iterator[Spec]:
        """The call without two or one of its arguments."""
        for width in (2, 1):
            for at in range(len(self.arguments) - width, -1, -1):
                yield Spec(self.arguments[:at] + self.arguments[at + width :])


def draw(choice: random.Random) -> Spec:
    """A random call."""
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
    return Spec(tuple(arguments))


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
    # So many steps or episodes of testing are no fault: they take as long as they take.
    allowed = [value for value in values[option] if not (option in ENDLESS and value == "2147483647")]
    value = choice.choice(allowed)
    return [f"{option}={value}"] if choice.random() < 0.2 else [option, value]


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
        done = call(
            ["train", "sinusoid", *TINY_SINUSOID, "--checkpoint-every", "1", "--out", str(root / name)]
        )
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
def furnished() -> Iterator[None]:
    """The fuzzer's folder while it runs; everything light."""
    global _root
    before, threads = Path.cwd(), torch.get_num_threads()
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # a busy disk takes seconds for every fsync
    _root = Path(tempfile.mkdtemp(prefix="command-line-", dir=memory))
    torch.set_num_threads(1)
    _codes[:] = bytes(len(_codes))
    try:
        with light():
            (_root / "model").mkdir()
            furnish(_root / "model")
            (_root / "work").mkdir()
            yield
    finally:
        os.chdir(before)
        shutil.rmtree(_root, ignore_errors=True)
        torch.set_num_threads(threads)


#: The folder that is furnished, and the process that has last worked in it.
_root = Path()
_worker = 0
#: How often a call has ended with each exit code, eight bytes each; shared by the fuzzer's
#: processes.
_codes = mmap.mmap(-1, 8 * 256)


def codes() -> dict[int, int]:
    """How often a call has ended with each exit code."""
    counts = struct.unpack("256Q", _codes[:])
    return {code: count for code, count in enumerate(counts) if count}


def check(spec: Spec) -> tuple[int, str]:
    """(1, what is wrong with a call)."""
    global _worker
    work = _root / "work" / "here"
    if _worker != os.getpid():  # the one before may have died in the middle
        _worker = os.getpid()
        shutil.rmtree(work, ignore_errors=True)
    return 1, fault([*spec.arguments], work).encode("ascii", "backslashreplace").decode()


def fault(arguments: list[str], work: Path) -> str:
    """What is wrong with a call; empty if nothing is."""
    if not work.exists():
        shutil.copytree(
            _root / "model", work, symlinks=True, copy_function=_copy, ignore=shutil.ignore_patterns("pipe")
        )
        if hasattr(os, "mkfifo"):
            os.mkfifo(work / "pipe")
    os.chdir(work)
    before = _names()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    descriptors = _descriptors()
    # by a thread of its own in C: a handler of Python's does not run while C++ waits, and what it
    # raises can be lost
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
    try:
        done = call(arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.chdir(work)
        after = _names()
        os.chdir(_root)
    if handlers != [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]:
        return "signal handlers were left behind"
    if _descriptors() > descriptors:
        return "files were left open"
    torch.set_num_threads(1)
    at = 8 * (done.exit_code & 255)
    _codes[at : at + 8] = struct.pack("Q", struct.unpack("Q", _codes[at : at + 8])[0] + 1)
    if left := list(work.rglob("*.new")):
        return f"left behind {left[0].name}"
    # What was refused as it was asked for has changed nothing, and the next call may have the same
    # folder.
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


def fuzz(calls: int, seed: int) -> running.Report:
    """Make so many calls, or fewer if there are too many faults."""
    with furnished():
        return running.fuzz(draw, check, calls, seed)


if __name__ == "__main__":
    try:
        with furnished():
            running.main(__doc__.splitlines()[0], draw, check)
    finally:
        print("exit codes " + ", ".join(f"{code}: {count}" for code, count in codes().items()))
