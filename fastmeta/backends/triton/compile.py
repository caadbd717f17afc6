"""Recorded launches compiled: for the GPU that is there, many at a time, or for any other, to see
what they take."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmeta.kernels.launch import Launch, named

#: Bytes of shared memory that one block may have, by compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes, for one block of threads or one thread."""

    kernel: str
    capability: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread that went to memory for want of registers
    shared: int  # bytes of a block

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and the shared memory is there."""
        return self.spilled == 0 and self.shared <= SHARED[self.capability]


#: Where an argument stands in a kernel's list of arguments, and then in tuples of tuples.
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What decides about the machine code of a launch: hashable, so that each is compiled once."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]  # by argument: its type, or a NamedTuple of types
    constants: tuple[tuple[Path, Any], ...]
    aligned: tuple[Path, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def types(self) -> dict[str, str]:
        """By argument, and member of one: "end.out"."""
        return dict(named(dict(self.signature)))

    def known(self) -> dict[str, Any]:
        """The constants by name, and by that of a member: "end.out", "FINISH.mode"."""
        names = {path: self._name(path) for path, _ in self.constants}
        return dict(named({names[path]: value for path, value in self.constants}))

    def _name(self, path: Path) -> str:
        name, types = self.signature[path[0]]
        for index in path[1:]:
            name, types = f"{name}.{types._fields[index]}", types[index]
        return name


def source(launch: Launch) -> Source:
    """Specialise a launch as Triton does at run time: 1 is a constant, multiples of 16 are known to
    be such; of members of NamedTuples always."""
    constants: list[tuple[Path, Any]] = []
    aligned: list[Path] = []

    def typed(value: Any, path: Path, known: bool) -> Any:
        if isinstance(value, tuple):
            types = (typed(member, (*path, i), True) for i, member in enumerate(value))
            return type(value)(*types)
        if value is None or (known and isinstance(value, int) and value == 1):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(path)
            return _TYPES[value.dtype]
        if known and value % 16 == 0:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = []
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants.append(((i,), value))
            signature.append((parameter.name, "constexpr"))
        else:
            signature.append((parameter.name, typed(value, (i,), not parameter.do_not_specialize)))
    return Source(
        launch.kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(launch.options.items())
    )


def sources(launches: Iterable[Launch]) -> list[Source]:
    """The different ones of some launches, in their order."""
    return list(dict.fromkeys(source(launch) for launch in launches))


#: Signatures that this process can launch.
_launchable: set[tuple[Any, ...]] = set()


def compile_together(launches: Iterable[Launch]) -> None:
    """Compile launches for the current device in threads, or take them from Triton's own cache;
    what does not compile raises when it is launched."""
    different = {source(launch): launch for launch in launches}
    with ThreadPoolExecutor() as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            made = [
                one.kernel.warmup(grid=(one.programs,), **one.arguments, **one.options)
                for one in different.values()
            ]
        # Triton 3.6 builds a C program to launch each signature, when it is launched first: that
        # takes longer than to compile the kernel, and would be one after the other.
        new: dict[tuple[Any, ...], Any] = {}
        for one, future in zip(different, made, strict=True):
            kernel = future.kernel if hasattr(future, "finalize_compile") else future
            signature = tuple(kind for _, kind in one.signature)
            if kernel is not None and signature not in _launchable:
                new[signature] = kernel
        _launchable.update(new)
        list(pool.map(_make_launcher, new.values()))


def _make_launcher(kernel: Any) -> None:
    """Have what launches a kernel built and kept in Triton's cache."""
    with suppress(Exception):  # said when it is launched
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


def compile_source(one: Source, capability: int) -> Usage:
    """Compile for compute capability 80, 90 or 100 with the tools in Triton's own package, past its
    cache."""
    attributes = {path: [["tt.divisibility", 16]] for path in one.aligned}
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        redirect_stdout(said),
    ):
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        compiled = triton.compile(
            ASTSource(one.kernel, dict(one.signature), dict(one.constants), attributes),
            target=GPUTarget("cuda", capability, 32),
            options=dict(one.options),
        )
    registers, spilled = _resources(said.getvalue())
    return Usage(one.kernel.__name__, capability, registers, spilled, compiled.metadata.shared)


def _resources(said: str) -> tuple[int, int]:
    """(registers, bytes spilled) of the one kernel that the assembler speaks of."""
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"the assembler said nothing of registers: {said!r}")
    return int(registers[1]), int(spilled[1]) + int(spilled[2])
