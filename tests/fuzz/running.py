"""What the fuzzers have in common: seeds, child processes, reduction of failures, the report and
the command line.

Inputs are frozen dataclasses whose defaults are the simplest there is, unless they have a method
`simpler`. They are
numbered: input 17 of seed 3 is the same in a long run and alone (`--seed 3 --start 17 --calls 1`).
They are checked in a child process, so a crash or a hang is a fault like any other.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

#: An input may take so long, in seconds, with its reduction if it fails.
LIMIT = 120
#: A child checks so many inputs.
BATCH = 500
#: A child, and unless told otherwise the run, ends after so many faults.
MOST_FAULTS = 10

Check = Callable[[Any], "tuple[int, str]"]


@dataclass
class Report:
    """What a run has done.

    Args:
        calls: of the public interface.
        inputs: that were checked.
        faults: one text each: the reduced input and what was wrong.
    """

    calls: int = 0
    inputs: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(
    draw: Callable[[random.Random], Any],
    check: Check,
    calls: int,
    seed: int,
    start: int = 0,
    most_faults: int = MOST_FAULTS,
) -> Report:
    """Draw inputs and check them until there were enough calls, or too many faults.

    Args:
        draw: an input out of random numbers.
        check: input -> (calls made, what is wrong or "").
        calls: how many calls of the public interface to make, at least.
        seed: of the run.
        start: number of the first input.
        most_faults: the run ends after so many.
    """
    report, number, shown = Report(), start, time.monotonic()
    while report.calls < calls and len(report.faults) < most_faults:
        made, done, faults = _in_child(draw, check, seed, number, calls - report.calls)
        report.calls, report.inputs, number = report.calls + made, report.inputs + done, number + done
        report.faults += faults
        for fault in faults:
            print(fault, flush=True)
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(
                f"seed {seed}, input {number}: {report.calls} calls, {len(report.faults)} faults", flush=True
            )
    return report


def _in_child(
    draw: Callable[[random.Random], Any], check: Check, seed: int, start: int, calls: int
) -> tuple[int, int, list[str]]:
    """(calls, inputs, faults) of one batch."""
    progress = mmap.mmap(-1, 16)  # number of the input, calls made before it
    progress.write(struct.pack("qq", start, 0))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            answer = _batch(draw, check, seed, start, calls, progress)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(answer))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return pickle.loads(told)
    number, made = struct.unpack("qq", progress[:16])
    how = (
        f"signal {signal.Signals(os.WTERMSIG(status)).name}"
        if os.WIFSIGNALED(status)
        else f"exit {status >> 8}"
    )
    given = described(draw(_numbers(seed, number)))
    return (
        made + 1,
        number - start + 1,
        [f"--seed {seed} --start {number}: the process ended by {how}\n  {given}"],
    )


def _batch(
    draw: Callable[[random.Random], Any], check: Check, seed: int, start: int, calls: int, progress: mmap.mmap
) -> tuple[int, int, list[str]]:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process
    total, faults = 0, []
    for number in range(start, start + BATCH):
        progress[:16] = struct.pack("qq", number, total)
        signal.alarm(LIMIT)
        given = draw(_numbers(seed, number))
        made, wrong = check(given)
        total += made
        if wrong:
            small, why = reduced(given, check, wrong)
            faults.append(f"--seed {seed} --start {number}: {why}\n  {described(small)}")
        if total >= calls or len(faults) >= MOST_FAULTS:
            break
    signal.alarm(0)
    return total, number - start + 1, faults


def _numbers(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}-{number}")


def reduced(given: Any, check: Check, wrong: str) -> tuple[Any, str]:
    """The simplest input that still fails, and what is wrong with it."""
    changed = True
    while changed:
        changed = False
        for simpler in given.simpler() if hasattr(given, "simpler") else _with_defaults(given):
            _, still = check(simpler)
            if still:
                given, wrong, changed = simpler, still, True
                break
    return given, wrong


def _with_defaults(given: Any) -> Iterator[Any]:
    """`given` with one more of its fields at the default."""
    for entry in fields(given):
        if getattr(given, entry.name) != entry.default:
            yield replace(given, **{entry.name: entry.default})


def described(given: Any) -> str:
    """The fields that are not at their defaults."""
    parts = [
        f"{f.name}={getattr(given, f.name)!r}" for f in fields(given) if getattr(given, f.name) != f.default
    ]
    return f"{type(given).__name__}({', '.join(parts)})"


def main(what: str, draw: Callable[[random.Random], Any], check: Check) -> None:
    """The command line of a fuzzer; ends the process, with 1 where there was a fault.

    Args:
        what: one line for --help.
        draw, check: as in `fuzz`.
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # else threads that wait spin, for minutes where cores are shared
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument(
        "--calls", type=int, default=1000, help="calls of the public interface to make, at least"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--most-faults", type=int, default=MOST_FAULTS, help="end the run after so many")
    options = parser.parse_args()
    begun = time.monotonic()
    report = fuzz(draw, check, options.calls, options.seed, options.start, options.most_faults)
    seconds = time.monotonic() - begun
    print(
        f"seed {options.seed}: {report.calls} calls with {report.inputs} inputs in {seconds:.0f} s, "
        f"{len(report.faults)} faults"
    )
    sys.exit(bool(report.faults))
