"""Builds fastmeta and its C++ extension `fastmeta._C`.

    python setup.py build_ext --inplace     rebuild what changed, put the extension into the tree
    FASTMETA_NO_EXT=1 pip install .         install without a compiler

Metadata lives in pyproject.toml. CXX, CXXFLAGS and LDFLAGS are honoured.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ("csrc/bindings.cpp", "csrc/cpu/**/*.cpp")
# FASTMETA_BASE_ONLY=1 leaves out the kernels for special instruction sets: a quick build, for
# sanitizers.
X86 = platform.machine().lower() in ("x86_64", "amd64") and os.environ.get("FASTMETA_BASE_ONLY", "0") in (
    "",
    "0",
)

# NaN and infinity must work, so no -ffast-math; the flags below change neither. SLP would read two
# adjacent arguments with one wide load just after they were stored one by one, which stalls until
# all earlier stores have retired.
FLAGS = """-std=c++17 -O3 -g0 -fPIC -pthread -fvisibility=hidden -ffp-contract=fast -fno-math-errno
           -fno-trapping-math -fno-tree-slp-vectorize -Wall -Wextra""".split()

# By the end of a file's stem; the variant that runs is chosen at load time, hence never
# -march=native.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512".split(),
}

PROBE = """
#include <charconv>
#include <string_view>
#if __cplusplus < 201703L || (defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 9)
#error "too old"
#endif
typedef float f32x8 __attribute__((vector_size(32)));
typedef int i32x8 __attribute__((vector_size(32)));
template <class T> T probe(T a, T b) {
  if constexpr (sizeof(T) == 32)
    return a * b + __builtin_convertvector(__builtin_convertvector(a, i32x8), f32x8);
  return a;
}
int main() { return static_cast<int>(probe(f32x8{}, f32x8{})[0]); }
"""


class CompilerError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""


def find_compiler() -> list[str]:
    """The C++ compiler as a command, checked to be able to build the extension."""
    advice = (
        "fastmeta needs g++ >= 9 or clang >= 9 (C++17); "
        "set CXX, or FASTMETA_NO_EXT=1 to install without the extension"
    )
    named = shlex.split(os.environ.get("CXX", ""))
    found = [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if named and not shutil.which(named[0]):
        raise CompilerError(f"error: CXX={named[0]} is not a program on this machine: {advice}.")
    if not (named or found):
        raise CompilerError(f"error: no C++ compiler found: {advice}.")
    candidates = [named] if named else found
    for command in candidates:
        if probe(command):
            return command
    raise CompilerError(
        f"error: the C++ compiler {' '.join(candidates[0])} is too old or does not work: {advice}."
    )


def probe(command: list[str]) -> bool:
    """Whether the compiler knows C++17 and the vector extensions."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        run = [*command, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(run, capture_output=True).returncode == 0


def isa_flags(source: str) -> list[str] | None:
    """The instruction-set flags of one file; None if it cannot be built for this machine."""
    for suffix, flags in ISA_FLAGS.items():
        if Path(source).stem.endswith(suffix):
            return flags if X86 else None
    return []


def up_to_date(target: Path, command: list[str], inputs: list[str]) -> bool:
    """Whether `target` was made by this very command from inputs that are not younger."""
    record = target.with_suffix(".cmd")
    if not target.exists() or not record.exists() or record.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime_ns
    return all(os.path.exists(name) and os.stat(name).st_mtime_ns <= made for name in inputs)


def run_compiler(target: Path, command: list[str]) -> None:
    """Run the command that makes `target`, and remember it."""
    print("building", os.path.relpath(target, ROOT), flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.time_ns()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise CompilerError(
            f"error: could not build {target.name}, see the messages above: {shlex.join(command)}"
        )
    os.utime(target, ns=(started, started))  # older than a source that was edited meanwhile
    target.with_suffix(".cmd").write_text(shlex.join(command))


def read_dependencies(path: Path) -> list[str]:
    """The files named by a compiler's dependency file (-MMD)."""
    if not path.exists():
        return [str(path)]  # missing, hence never up to date
    words = shlex.split(path.read_text().replace("\\\n", " "))
    return [str(ROOT / word) for word in words[1:]]


class BuildExt(build_ext):
    """Compiles each source with its own instruction set, all in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        generated = Path(self.build_temp).resolve() / "generated"
        runpy.run_path(str(ROOT / "csrc" / "layer_kinds.py"))["write"](generated)
        include = [
            f"-I{ROOT / 'csrc'}",
            f"-I{generated}",
            f"-isystem{pybind11.get_include()}",
            f"-isystem{sysconfig.get_path('include')}",
        ]
        flags = [*FLAGS, *(["-DFASTMETA_X86=1"] if X86 else []), *include]
        flags += shlex.split(os.environ.get("CXXFLAGS", "")) + shlex.split(os.environ.get("ARCHFLAGS", ""))
        jobs = [(source, own) for source in ext.sources if (own := isa_flags(source)) is not None]

        def compile_one(job: tuple[str, list[str]]) -> str:
            source, own = job
            made = Path(self.build_temp).resolve() / Path(source).with_suffix(".o")
            depends = made.with_suffix(".d")
            command = [*compiler, *flags, *own, "-MMD", "-MF", str(depends), "-c", source, "-o", str(made)]
            if not up_to_date(made, command, read_dependencies(depends)):
                run_compiler(made, command)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        library = Path(self.build_temp).resolve() / target.name
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        link = [*compiler, *shared, "-pthread", *objects, *shlex.split(os.environ.get("LDFLAGS", ""))]
        link += [*shlex.split(os.environ.get("ARCHFLAGS", "")), "-o", str(library)]
        if not up_to_date(library, link, objects):
            run_compiler(library, link)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def extensions() -> list[Extension]:
    """The extension, unless the user does without."""
    if os.environ.get("FASTMETA_NO_EXT", "0") not in ("", "0"):
        return []
    sources = sorted(str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern))
    return [Extension("fastmeta._C", sources)]


# Folders with what the cuda backend compiles at run time: package data, below fastmeta/csrc.
CUDA_SOURCES = ("cuda", "cuda/families", "cuda/layers", "shared", "shared/update_rules")
DATA = {f"fastmeta.csrc.{folder.replace('/', '.')}": f"csrc/{folder}" for folder in CUDA_SOURCES}
KERNELS = {"fastmeta.kernels": "kernels", "fastmeta.kernels.update_rules": "kernels/update_rules"}

setup(
    packages=[*find_packages(include=["fastmeta", "fastmeta.*"]), *KERNELS, *DATA],
    package_dir={"fastmeta": "fastmeta", **KERNELS, **DATA},
    package_data={package: ["*.h", "*.inl", "emulate.cpp"] for package in DATA},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
