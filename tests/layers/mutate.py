"""Plants a sign error in each function of each layer kind: do the tests of layers find it?

    python tests/layers/mutate.py [--backend cpu] [--backend triton] [--backend cuda] [--kind mul]

In a copy of the sources one function of one kind is given the wrong sign: the result of `forward`
or `tangent` is negated; `backward` and `tangent_backward` work on a negated gradient of the output,
to which they are linear, so that all that they make is negated. Then the examples of the kind are
verified as `fastmeta verify --layer` does. `cpu` is built once, with the portable kernels alone,
`cuda` is emulated, `triton` interpreted. Prints a table, and ends with 1 if an error was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FUNCTIONS = ("forward", "backward", "tangent", "tangent_backward")
BACKENDS = ("cpu", "triton", "cuda")


def replaced(path: Path, *pairs: tuple[str, str]) -> None:
    """Replace texts in a file, each of which must be there."""
    text = path.read_text()
    for old, new in pairs:
        if old not in text:
            raise SystemExit(f"{path.name} has changed, adapt {Path(__file__).name}: there is no {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def build_cpu(folder: Path) -> None:
    """The package in `folder`, with an extension whose functions can be told to be wrong."""
    tree = folder / "cpu"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastmeta", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    calls = {name: "*layer" if "backward" in name else "layer" for name in FUNCTIONS}
    more = {name: ", sinks" if "backward" in name else "" for name in FUNCTIONS}
    replaced(
        tree / "csrc" / "cpu" / "layers.h",
        ('#include "pass.h"\n', '#include "pass.h"\n#include "mutate.h"\n'),
        *(
            (
                f"kind::Functions::{name}(pass, {calls[name]}{more[name]});",
                f'flipped(pass, {calls[name]}, #kind, "{name}", '
                f"[&] {{ kind::Functions::{name}(pass, {calls[name]}{more[name]}); }});",
            )
            for name in FUNCTIONS
        ),
    )
    shutil.copy(HERE / "mutate_cpu.h", tree / "csrc" / "cpu" / "mutate.h")
    environment = {**os.environ, "FASTMETA_BASE_ONLY": "1", "CXXFLAGS": "-O1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def mutated_cuda(folder: Path, kind: str, function: str) -> Path:
    """A copy of csrc in which a function of the CUDA kernels is wrong."""
    csrc = folder / f"cuda-{kind}-{function}"
    shutil.copytree(ROOT / "csrc", csrc)
    defined = f"#define MUTATED_KIND {kind}\n#define MUTATED_FUNCTION {FUNCTIONS.index(function)}\n"
    (csrc / "cuda" / "mutate.h").write_text(defined + (HERE / "mutate_cuda.h").read_text())
    call = "Functions<L>::template "
    back, tangent = "<X, INPUT>(pass, turn);", "<X, INPUT>(pass, along, turn);"
    calls = {  # in walks.h -> which function it is
        f"{call}forward<X>(pass);": 0,
        f"turn = {call}backward_input{back}": 1,
        f"{call}tangent<X>(pass, along);": 2,
        f"turn = {call}tangent_backward_input{tangent}": 3,
    }
    pairs = [(text, f"flipped<L, {number}, X>(pass, [&] {{ {text} }});") for text, number in calls.items()]
    for number, name in ((1, "backward_params"), (3, "tangent_backward_params")):
        text = f"{call}{name}<X>(pass, sink, turn);"
        wrapped = f"flipped<L, {number}, X>(pass, [&] {{ turn = {text} }});"
        pairs.append((f"return {text}", f"{wrapped}\n  return turn;"))
    included = ('#include "sink.h"\n', '#include "sink.h"\n#include "mutate.h"\n')
    replaced(csrc / "cuda" / "walks.h", included, *pairs)
    return csrc


@contextmanager
def mutated(folder: Path, backend: str, kind: str, function: str) -> Iterator[None]:
    """A wrong function of a backend, in this process; none where `function` is ""."""
    if not function:
        yield
    elif backend == "cpu":
        os.environ["FASTMETA_MUTATE"] = f"{kind} {function}"
        yield
        del os.environ["FASTMETA_MUTATE"]
    elif backend == "triton":
        from mutated_triton import flipped

        with flipped(kind, function):
            yield
    else:
        from fastmeta.backends.cuda import compile as compiler

        known = (compiler._headers_digest, compiler.emulated)
        csrc = mutated_cuda(folder, kind, function)
        with mock.patch.object(compiler, "source_folder", return_value=csrc):
            for cache in known:
                cache.cache_clear()
            yield
        for cache in known:
            cache.cache_clear()


def verdict(backend: str, kind: str) -> str:
    """What the examples of a kind say: "" if nothing is wrong, else what is."""
    from fastmeta.verify.layer import few, verify_example

    ran = 0
    for example in few(kind):
        rows = verify_example(kind, example, backend, "float64")
        ran += not rows[0].skipped
        wrong = [row for row in rows if not row.skipped and not row.passed]
        if wrong:
            return wrong[0].quantity or wrong[0].note[:200]
    return "" if ran else "no kernels"


def inside(folder: Path, backend: str, kinds: list[str]) -> int:
    """All mutants of one backend, in this process; how many were missed."""
    import torch

    torch.set_num_threads(1)
    missed = 0
    for kind in kinds:
        said = []
        for function in ("", *FUNCTIONS):
            with mutated(folder, backend, kind, function):
                said.append(verdict(backend, kind))
            if not function and said[0]:
                break
        whole, found = said[0], said[1:]
        missed += sum(not one for one in found) + (whole not in ("", "no kernels"))
        cells = [one[:25] or "MISSED" for one in found] or [whole]
        print(f"{kind:12} {backend:8}", *(f"{cell:26}" for cell in cells), flush=True)
    return missed


def table(backends: list[str], kinds: list[str]) -> int:
    """Run all mutants and print what found each; how many were missed."""
    more = {"triton": {"TRITON_INTERPRET": "1"}, "cuda": {"FASTMETA_CUDA_EMULATE": "1"}}
    print(f"{'kind':12} {'backend':8}", *(f"{function:26}" for function in FUNCTIONS), flush=True)
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_cpu(folder)
        for backend in backends:
            environment = {**os.environ, **more.get(backend, {}), "XDG_CACHE_HOME": str(folder / "cache")}
            environment["PYTHONPATH"] = f"{folder / 'cpu'}:{HERE}"
            command = [sys.executable, __file__, "--inside", name, "--backend", backend]
            command += [word for kind in kinds for word in ("--kind", kind)]
            missed += subprocess.run(command, env=environment).returncode
    print(f"{missed} missed")
    return missed


def main() -> int:
    """The command line."""
    from fastmeta.layers.registry import KINDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="Only this one; repeatable.")
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="Only this one; repeatable.")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    backends, kinds = given.backend or [*BACKENDS], given.kind or [*KINDS]
    if given.inside:
        return inside(given.inside, backends[0], kinds)
    return 1 if table(backends, kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
