"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize/run.py [pytest's arguments; none: what matters]

It builds the extension once more in build/sanitize, with the portable kernels alone, and runs tests
of the cpu backend and of the machine, and the fuzzer of the binding, against it. Any report ends
the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
TREE = BUILD / "tree"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
#: Layer kinds, losses, rates, more tasks than threads and fewer, bad input, forks.
TESTS = [
    f"tests/{name}.py"
    for name in (
        "algorithms/test_ops_meta_gradient",
        "algorithms/test_ops_rates",
        "backends/test_binding",
        "backends/test_determinism",
        "backends/test_machine_tables",
        "backends/test_native_rules",
        "backends/test_ordinary_tensors",
        "layers/test_conv2d",
        "layers/test_max_pool2d",
        "trace/test_epilogues",
        "trace/test_operators",
        "trace/test_program_words",
    )
]
FUZZED = 2000


def compiler_file(name: str) -> str:
    """Where the compiler keeps a library."""
    command = [*os.environ.get("CXX", "c++").split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build() -> None:
    """The package in `TREE`: links to the sources, and the extension of its own."""
    package = TREE / "fastmeta"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if link.is_symlink():
            link.unlink()
    for source in (ROOT / "fastmeta").iterdir():
        if source.suffix not in (".so", ".pyd") and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (package / "csrc").symlink_to(ROOT / "csrc")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        f"--build-lib={TREE}",
        f"--build-temp={BUILD / 'temp'}",
    ]
    environment = {
        **os.environ,
        "FASTMETA_BASE_ONLY": "1",
        "CXXFLAGS": FLAGS,
        "LDFLAGS": "-fsanitize=address,undefined",
    }
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def run(arguments: list[str]) -> int:
    """Python with these arguments in `TREE`, under the sanitizers; its exit status."""
    environment = {
        **os.environ,
        # a sanitizer has to be the first library there is, and wants to know of exceptions
        "LD_PRELOAD": f"{compiler_file('libasan.so')} {compiler_file('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192:"
        "abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(TREE),
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run([sys.executable, *arguments], cwd=TREE, env=environment).returncode


def main() -> int:
    """Build and run; 0 if nothing was found."""
    build()
    ours = f"c.__file__.startswith({str(TREE)!r})"
    check = f"import fastmeta._C as c; assert {ours} and c.instruction_sets() == ['base']"
    if run(["-c", check]):
        return 1
    given = sys.argv[1:]
    tests = [str(ROOT / test) if test.startswith("tests/") else test for test in given or TESTS]
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest += ["-c", str(ROOT / "pyproject.toml"), "-k", "not compile and not cuda and not triton"]
    if run([*pytest, *tests]):
        return 1
    return 0 if given else run([str(ROOT / "tests/fuzz/binding.py"), "--calls", str(FUZZED), "--seed", "1"])


if __name__ == "__main__":
    sys.exit(main())
