"""From generated source to something that runs: NVRTC for a GPU, the system's C++ compiler to stand
in for one.

Both results are kept on disk (`_disk_cache`) under a key of everything they are made of: source,
headers, architecture or compiler, and versions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fastmeta
from fastmeta.backends import _disk_cache

_PACKAGE = Path(fastmeta.__file__).parent

#: What the kernels are written in, everywhere. No fast-math: NaN and infinity must work.
_STANDARD = "c++17"
#: Of the stand-in. It is compiled anew for every network and runs for a moment: so not optimised.
_FLAGS = f"-std={_STANDARD} -O0 -g0 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing".split()
_FLAGS += "-Wno-unknown-pragmas -DFASTMETA_EMULATE".split()


def source_folder() -> Path:
    """csrc, in the source tree or as installed."""
    tree = _PACKAGE.parent / "csrc"
    return tree if (tree / "cuda").is_dir() else _PACKAGE / "csrc"


@lru_cache(maxsize=1)
def _headers_digest() -> str:
    """Of all files that a generated source includes."""
    csrc = source_folder()
    files = [file for folder in ("cuda", "shared") for file in sorted((csrc / folder).rglob("*.[hi]*"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _cached(key: tuple[object, ...], suffix: str) -> Path:
    return _disk_cache.path((_headers_digest(), *key), suffix)


# ---- for a GPU


@lru_cache(maxsize=1)
def missing_compiler() -> str:
    """Why nothing can be compiled for a GPU here, "" if it can."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings, or the library itself
        return f"NVIDIA's cuda-bindings with NVRTC are not installed ({error}); pip install 'fastmeta[cuda]'"
    return ""


def cubin(source: str, architecture: str) -> bytes:
    """Machine code for one architecture.

    Args:
        source: of `cuda_plan.source`.
        architecture: such as "sm_90a".

    Raises:
        RuntimeError: NVRTC did not compile it; the message holds what it said.
    """
    target = _cached(("cubin", source, architecture, _version()), ".cubin")
    with suppress(OSError):  # nothing there yet, or nothing that may be read
        return target.read_bytes()
    code, _ = compile_for(source, architecture)
    try:
        _disk_cache.write(target, code)
    except OSError as error:
        warnings.warn(f"fastmeta: machine code cannot be kept in {target}: {error}", stacklevel=2)
    return code


def compile_for(source: str, architecture: str) -> tuple[bytes, str]:
    """Machine code and the compiler's report on registers, stack and spills; never cached.

    Raises:
        RuntimeError: NVRTC did not compile it; the message holds what it said.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", f"--std={_STANDARD}", f"-I{source_folder() / 'cuda'}"]
    options += ["--device-as-default-execution-space", "--ptxas-options=-v"]
    made, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    _check(nvrtc, made)
    try:
        (done,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
        if done != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC did not compile a kernel for {architecture}: {done.name}\n{log}")
        return _read(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(nvrtc: Any, code: Any) -> None:
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {code.name}")


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    """What there is of a program, by the end of the name of the function that gets it."""
    found, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, found)
    content = bytearray(size)
    _check(nvrtc, *getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return bytes(content)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the compiler says that a kernel takes."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, of the deepest of its functions
    spills: int  # bytes stored and loaded for want of registers, in all functions


def resources(report: str) -> Resources:
    """The larger of the two kernels, from the report of `compile_for`.

    Raises:
        ValueError: the report does not say.
    """
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", report)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not registers or not frames:
        raise ValueError(f"no resources in the compiler's report: {report!r}")
    return Resources(
        max(registers), max(int(stack) for stack, _, _ in frames), sum(int(a) + int(b) for _, a, b in frames)
    )


def _version() -> str:
    """Of the compiler."""
    from cuda.bindings import nvrtc

    found, *numbers = nvrtc.nvrtcVersion()
    _check(nvrtc, found)
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        with suppress(metadata.PackageNotFoundError):
            numbers.append(metadata.version(name))
    return f"nvrtc {numbers}"


# ---- to stand in for one


def host_compiler() -> list[str]:
    """The C++ compiler as a command, [] if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else []
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


@lru_cache(maxsize=1)
def _host_version() -> str:
    return subprocess.run([*host_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=512)
def emulated(source: str) -> ctypes.CDLL:
    """The kernels of a generated source as ordinary C++, loaded.

    Raises:
        RuntimeError: the compiler failed; the message holds what it said.
    """
    target = _cached(("host", source, *_FLAGS, _host_version()), ".so")
    if not target.exists():
        build_host(source, [*_FLAGS, "-shared"], target)
    return ctypes.CDLL(str(target))


@lru_cache(maxsize=1)
def emulator() -> ctypes.CDLL:
    """What runs them: blocks, threads and barriers."""
    source = (source_folder() / "cuda" / "emulate.cpp").read_text()
    target = _cached(("emulator", source, *_FLAGS, _host_version()), ".so")
    if not target.exists():
        build_host(source, [*_FLAGS, "-shared", "-pthread"], target)
    library = ctypes.CDLL(str(target))
    library.fastmeta_emulate.argtypes = (
        [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3 + [ctypes.c_int64, ctypes.c_int]
    )
    library.fastmeta_emulate.restype = None
    return library


def build_host(source: str, flags: list[str], target: Path) -> None:
    """Compile and link one source with the system's compiler.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    csrc = source_folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        command = [*host_compiler(), *flags, f"-I{csrc / 'cuda'}", "-x", "c++", "-"]
        done = subprocess.run([*command, "-o", str(made)], input=source, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
        os.replace(made, target)
