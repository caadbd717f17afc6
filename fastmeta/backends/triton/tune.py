"""The quickest of a product's choices on this GPU, timed once and kept in a file.

All choices of a launch give the same bits (`kernels/tile_choice.py` says why), and on the GPU they
are compared: a choice that gives others is discarded, like one that spills or does not compile. So
tuning changes times, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from fastmeta.backends import _disk_cache
from fastmeta.backends.triton.compile import compile_together, source
from fastmeta.kernels.launch import Launch

#: Only products that together make up this share of a plan's multiply-adds are worth the time that
#: compiling takes.
SHARE = 0.9
#: What another choice must gain over the first one: less is noise.
_GAIN = 0.03
#: What kernels with choices write.
_WRITTEN = (
    "out",
    "end.out",
    "end.pre",
    "end.curve",
    "weight.to.at",
    "bias.to.at",
    "parts",
    "sums.partials",
)


class Timer(Protocol):
    """What times launches."""

    def prepare(self, launches: list[Launch]) -> None:
        """Compile what will be timed."""

    def time(self, launch: Launch, first: Launch) -> float:
        """Milliseconds of a launch; infinite where it is not to be chosen instead of `first`."""


@dataclass(frozen=True, slots=True)
class Report:
    """What tuning did, for `explain()`."""

    off: str = ""  # why nothing was tuned
    found: int = 0  # sorts of products whose choice was in the file
    timed: int = 0
    missing: int = 0  # neither, as yet
    file: str = ""

    def __str__(self) -> str:
        if self.off:
            return f"tuning: off, {self.off}"
        said = [f"{self.found} from {self.file}"] if self.found else []
        said += [f"{self.timed} timed by this process"] if self.timed else []
        said += [f"{self.missing} to be timed at the first call"] if self.missing else []
        return f"tuning: sorts of products: {', '.join(said) or 'none'}"


def off(device: torch.device) -> str:
    """Why nothing is to be tuned now, "" if it is."""
    if device.type != "cuda":
        return "there is no GPU to time on"
    if os.environ.get("FASTMETA_TUNE") == "0":
        return "FASTMETA_TUNE=0"
    if torch.cuda.is_current_stream_capturing():
        return "the plan was made while a CUDA graph was captured"
    return ""


def file_for(device: torch.device) -> Path:
    """Where the choices for a device are kept."""
    return place(torch.cuda.get_device_name(device), triton.__version__, torch.__version__)


def place(*facts: str) -> Path:
    """Where the choices are kept that were made with a device, a version of Triton and one of
    PyTorch."""
    return _disk_cache.path(("tuned", *facts), ".json")


def key(launch: Launch) -> str:
    """Of what decides how long a launch takes: source, constants, signature, sizes, and of what
    there is to choose."""
    made, sizes = source(launch), [(n, v) for n, v in launch.values().items() if isinstance(v, int)]
    parts = (
        made.kernel.__module__,
        made.kernel.cache_key,
        made.signature,
        made.constants,
        made.aligned,
        made.options,
    )
    return _disk_cache.digest((*parts, sizes, launch.programs, launch.choices))


def heavy(launches: list[Launch]) -> dict[str, Launch]:
    """By key, one of each sort with choices, the heaviest first, until they make up SHARE of the
    work."""
    sorts: dict[str, Launch] = {}
    work: dict[str, int] = {}
    for launch in launches:
        if launch.choices:
            name = key(launch)
            sorts.setdefault(name, launch)
            work[name] = work.get(name, 0) + launch.work
    chosen, seen, total = {}, 0, sum(work.values())
    for name in sorted(work, key=lambda name: -work[name]):
        if seen >= SHARE * total:
            break
        chosen[name], seen = sorts[name], seen + work[name]
    return chosen


def tune(launches: list[Launch], timer: Timer, file: Path) -> tuple[list[Launch], Report]:
    """The launches with the quickest choice each: from the file, or else timed now and written
    there."""
    known, sorts = _read(file), heavy(launches)
    tried = {name: _tried(one) for name, one in sorts.items() if not _valid(known.get(name), one)}
    timer.prepare([one for several in tried.values() for one in several])
    new = {name: _timed(sorts[name], several, timer) for name, several in tried.items()}
    if new:
        _write(file, new)
    chosen = {name: (new.get(name) or known[name])["chosen"] for name in sorts}
    report = Report(found=len(sorts) - len(new), timed=len(new), file=str(file))
    return [
        _apply(launch, chosen.get(key(launch), 0)) if launch.choices else launch for launch in launches
    ], report


def look(launches: list[Launch], file: Path) -> Report:
    """What `tune` would find, without timing anything."""
    known, sorts = _read(file), heavy(launches)
    found = sum(_valid(known.get(name), launch) for name, launch in sorts.items())
    return Report(found=found, missing=len(sorts) - found, file=str(file))


def _apply(launch: Launch, index: int) -> Launch:
    """Choice 0 is the launch as it is."""
    return replace(launch, choices=()) if index == 0 else launch.chosen(launch.choices[index - 1])


def _tried(launch: Launch) -> list[Launch]:
    return [_apply(launch, index) for index in range(len(launch.choices) + 1)]


def _timed(launch: Launch, tried: list[Launch], timer: Timer) -> dict[str, Any]:
    times = [timer.time(one, tried[0]) for one in tried]
    best = min(range(len(times)), key=times.__getitem__)
    if not times[best] < (1 - _GAIN) * times[0]:
        best = 0
    tiles = dict(launch.choices[best - 1].tiles) if best else {}
    said = {"tiles": tiles, "warps": tried[best].warps, "stages": tried[best].stages}
    kernel = f"{launch.kernel.__module__}.{launch.kernel.__name__}"
    return {"chosen": best, "kernel": kernel, **said, "ms": [t if math.isfinite(t) else None for t in times]}


# ---- the file


def _valid(entry: Any, launch: Launch) -> bool:
    return entry is not None and 0 <= entry["chosen"] <= len(launch.choices)


def _read(file: Path) -> dict[str, Any]:
    """Entries by key; none where there is no such file, or something else in it."""
    try:
        entries = json.loads(file.read_text())
        if not all(isinstance(entry["chosen"], int) for entry in entries.values()):
            raise TypeError("a choice is not a number")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"fastmeta: {file} cannot be read and is made anew: {type(error).__name__}: {error}", stacklevel=2
        )
        return {}
    return entries


def _write(file: Path, new: dict[str, Any]) -> None:
    """Add entries. Of two processes at once one may lose its own, and times them again another
    time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was read
        entries = _read(file) | new
    try:
        _disk_cache.write(file, json.dumps(entries, indent=1).encode())
    except OSError as error:
        warnings.warn(f"fastmeta: choices of tiles cannot be kept in {file}: {error}", stacklevel=2)


# ---- the timer


class OnDevice:
    """Times launches on the current device, on random numbers in the plan's own memory: before
    anything is in it."""

    def prepare(self, launches: list[Launch]) -> None:
        """Compile them in threads."""
        compile_together(launches)

    def time(self, launch: Launch, first: Launch) -> float:
        """Milliseconds; infinite if it does not compile, spills, or has other bits."""
        if launch is not first:
            try:
                expected = _outputs(first)
                if launch.run().n_spills or not _same(_outputs(launch), expected):
                    return math.inf
            except (
                triton.TritonError,
                RuntimeError,
            ):  # it does not compile, or the device has not what it takes
                return math.inf
        return float(do_bench(launch.run, warmup=2, rep=10, return_mode="min"))


def _outputs(launch: Launch) -> dict[str, Tensor]:
    """What it writes when all its memory was filled with the same numbers before."""
    generator: torch.Generator | None = None
    values = launch.values()
    for tensor in values.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if generator is None:
                generator = torch.Generator(tensor.device).manual_seed(0)
            tensor.normal_(generator=generator)
    launch.run()
    return {n: values[n].clone() for n in _WRITTEN if isinstance(values.get(n), Tensor)}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    as_bits = {8: torch.int64, 4: torch.int32}
    return all(
        torch.equal(a[n].view(as_bits[a[n].element_size()]), b[n].view(as_bits[b[n].element_size()]))
        for n in a
    )
