"""`kill -9` of `fastmeta train sinusoid` at random moments, resumed, compared with an uninterrupted
run.

    python tests/fuzz/kill_train.py --trials 100 --seed 0

A trial begins a run in an empty folder and kills it, once or twice, at a random moment after it was
started, importing included; then it lets the run come to its end. Metrics, weights, the optimiser's
state and the result must be those of a run that was left alone, bit for bit. Exit code 1 on any
fault.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

#: Iterations, a row of metrics every 7 and a checkpoint every 10: most moments fall into one or the
#: other.
ARGUMENTS = (
    "--tasks 3 --shots 4 --eval-tasks 6 --eval-steps 2 --threads 1 --iterations 400 --log-every 7 "
    "--checkpoint-every 10"
).split()

#: Starts the command in a folder with more arguments; returns the process's id.
Start = Callable[[Path, list[str]], int]


@dataclass
class Tally:
    """What came of the trials."""

    trials: int = 0
    kills: int = 0
    resumed: int = 0  # kills after which there was a checkpoint
    faults: list[str] = field(default_factory=list)


def by_command(out: Path, more: list[str]) -> int:
    """A process of its own, as a user starts it."""
    command = [sys.executable, "-m", "fastmeta", "train", "sinusoid", *ARGUMENTS, "--out", str(out), *more]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log).pid


def by_fork(out: Path, more: list[str]) -> int:
    """A copy of this process, which has PyTorch already: most moments are moments of training."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from click.testing import CliRunner

        from fastmeta.cli import main

        done = CliRunner().invoke(main, ["train", "sinusoid", *ARGUMENTS, "--out", str(out), *more])
        with open(out.with_suffix(".log"), "a") as log:
            log.write(f"{done.output}{done.exception or ''}\n")
        code = done.exit_code
    finally:
        os._exit(code)


def compare(whole: Path, out: Path) -> str:
    """What differs between two runs; empty if nothing does."""
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, out))
    if one["iteration"] != other["iteration"]:
        return f"iteration {other['iteration']} instead of {one['iteration']}"
    for name, tensor in one["maml"].items():
        if not torch.equal(tensor, other["maml"][name]):
            return f"weights {name} differ"
    for name, tensor in one["optimizer"]["state"][0].items():
        if not torch.equal(tensor, other["optimizer"]["state"][0][name]):
            return f"the optimiser's {name} differs"
    for name in ("metrics.csv", "result.csv"):
        if _rows(whole / name) != _rows(out / name):
            return f"{name} differs"
    return f"left behind: {left}" if (left := sorted(path.name for path in out.glob("*.new"))) else ""


def _rows(path: Path) -> list[list[str]]:
    """A CSV file without its times."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    timed = lines[0].index("seconds") if "seconds" in lines[0] else len(lines[0])
    return [line[:timed] for line in lines]


def between(out: Path) -> str:
    """What is wrong with the files right after a kill; empty if nothing is."""
    from fastmeta.cli.train import sealed

    path = out / "checkpoint.pt"
    if not path.exists():
        return ""
    try:
        sealed.check(path)
    except sealed.Damaged as error:
        return f"after a kill checkpoint.pt: {error}"
    done = torch.load(path, weights_only=True)["iteration"]
    logged = {row[0] for row in _rows(out / "metrics.csv")}
    lost = [str(at) for at in range(7, done + 1, 7) if str(at) not in logged]
    return f"after a kill at iteration {done} the rows {', '.join(lost)} are lost" if lost else ""


def trial(
    number: int, seed: int, whole: Path, times: tuple[float, float], start: Start, tally: Tally
) -> None:
    """Kill once or twice, then let it end; `times` are when a run begins to train, and when it
    ends."""
    choice = random.Random(f"{seed}-{number}")
    out = whole.with_name(f"trial-{number}")
    out.mkdir()
    moments: list[float] = []
    for _ in range(choice.randint(1, 2)):
        there = (out / "checkpoint.pt").exists()
        process = start(out, ["--resume"] if there else [])
        # Half of them at any moment, half while it trains.
        moments.append(choice.uniform(choice.choice((0, times[0])), 1.05 * times[1]))
        time.sleep(moments[-1])
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        tally.kills += 1
        tally.resumed += (out / "checkpoint.pt").exists()
        if fault := between(out):
            break
    else:
        there = (out / "checkpoint.pt").exists()
        _, status = os.waitpid(start(out, ["--resume"] if there else []), 0)
        code = os.waitstatus_to_exitcode(status)
        fault = (
            compare(whole, out) if code == 0 else f"exit code {code}: {_last_line(out.with_suffix('.log'))}"
        )
    tally.trials += 1
    if fault:
        shown = ", ".join(f"{moment:.3f}" for moment in moments)
        tally.faults.append(f"trial {number} (seed {seed}), killed after {shown} s: {fault}")
        print(tally.faults[-1], flush=True)
    else:
        shutil.rmtree(out)
        out.with_suffix(".log").unlink()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"


def run(trials: int, seed: int, start: Start = by_command) -> Tally:
    """All trials, in a folder that stays only where there were faults."""
    folder = Path(tempfile.mkdtemp(prefix="kill-train-"))
    whole, tally = folder / "whole", Tally()
    whole.mkdir()
    begun = time.perf_counter()
    process, training = start(whole, []), 0.0
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if not training and (whole / "metrics.csv").exists():
            training = time.perf_counter() - begun
        time.sleep(0.01)
    _, status = ended
    if status:
        raise RuntimeError(f"the run that is left alone failed: {_last_line(whole.with_suffix('.log'))}")
    times = training, time.perf_counter() - begun
    for number in range(trials):
        trial(number, seed, whole, times, start, tally)
    if not tally.faults:
        shutil.rmtree(folder)
    return tally


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fork", action="store_true", help="Fork this process instead of starting Python: faster."
    )
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    torch.set_num_threads(1)
    tally = run(given.trials, given.seed, by_fork if given.fork else by_command)
    print(
        f"{tally.trials} trials, {tally.kills} kills, {tally.resumed} of them with a checkpoint, "
        f"{len(tally.faults)} faults"
    )
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
