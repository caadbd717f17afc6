"""The machine and what runs on it: names for the rows, peaks, memory, and a limit on the cores."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastmeta import backends
from fastmeta.version import __version__


def limit(threads: int) -> None:
    """Keep this process, and every thread that it starts from now on, to `threads` cores.

    XLA knows no other way: it starts one thread for each core that the process may use.

    Raises:
        ValueError: there are fewer cores.
    """
    check_threads(threads)
    cores = usable_cores()
    if hasattr(os, "sched_setaffinity") and threads < len(cores):
        os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)


def check_threads(threads: int) -> None:
    """Let pass a number of cores that there are.

    Raises:
        ValueError: there are fewer.
    """
    cores = len(usable_cores())
    if not 1 <= threads <= cores:
        raise ValueError(f"bench: `threads` must be 1 to {cores} (the cores of this machine), got {threads}")


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def twice_differentiable() -> None:
    """Keep PyTorch, from now on, from fused attention: it has no double backward."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def device() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set that the C++ engine chose, "" without it."""
    if backends.get("cpu").missing():
        return ""
    from fastmeta import _C

    return str(_C.instruction_set())


def fma_peak(dtype: str, threads: int) -> float:
    """Multiply-adds at full speed, in GFLOP/s, measured now; nan without the C++ engine."""
    if backends.get("cpu").missing():
        return float("nan")
    from fastmeta import _C

    return float(_C.fma_peak(dtype, threads))


def cache_bandwidth(size: int, threads: int) -> float:
    """Reading `size` bytes a thread again and again, in GB/s, measured now; nan without the C++
    engine."""
    if backends.get("cpu").missing():
        return float("nan")
    from fastmeta import _C

    return float(_C.cache_bandwidth(size, threads))


def facts() -> dict[str, str]:
    """What every row says of machine and versions."""
    return {
        "device": device(),
        "isa": isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmeta": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """The commit of the source tree that the package lies in, with a `+` if files differ; ""
    outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    with suppress(OSError, subprocess.CalledProcessError):
        return _git(root, "rev-parse", "--short", "HEAD") + (
            "+" if _git(root, "status", "--porcelain", "-uno") else ""
        )
    return ""


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()


class PeakMemory:
    """Context: the high water of the resident set above its level before, in bytes; nan where the
    system tells not.

    Memory that the process already holds and only uses again is not seen.
    """

    growth = float("nan")

    def __enter__(self) -> PeakMemory:
        self._before = float("nan")
        # Linux: writing 5 sets the high water mark back to the present level.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.growth = max(0.0, _status("VmHWM") - self._before)


class OtherWork:
    """Context: how many cores other programs kept busy meanwhile, on average; nan where the system
    tells not.

    A library whose threads spin for each other loses a time slice whenever one of them is not
    running: with a core taken away, times of PyTorch's CPU operators grow a hundredfold.
    """

    cores = float("nan")

    def __enter__(self) -> OtherWork:
        self._before = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, wall = (after - before for after, before in zip(_clocks(), self._before, strict=True))
        self.cores = max(0.0, (busy - own) / wall)


def _clocks() -> tuple[float, float, float]:
    """Seconds that all cores have worked, that this process has, and of the clock on the wall."""
    busy = float("nan")
    with suppress(OSError, ValueError):
        fields = [float(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return busy, time.process_time(), time.perf_counter()


def _status(field: str) -> float:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    return float("nan")
