"""A whole meta-step in one launch: one thread block takes a task from theta_0 to lambda_0 without
leaving the chip.

For networks whose parameters and values fit into shared memory; csrc/cuda holds the kernels, which
are compiled at run time for one network, its shapes and options.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from fastmeta.backends import _hoisting
from fastmeta.backends._layers import refuses_layers, without_kernels
from fastmeta.backends._losses import refuses_loss
from fastmeta.backends._precision import exact as exact
from fastmeta.backends._rules import NAMED, NUMBERS, refuses_rule, refuses_unread
from fastmeta.backends.cpu.plan import used_params
from fastmeta.backends.cuda import compile as compiler
from fastmeta.backends.cuda import launch as launches
from fastmeta.backends.cuda import run as runs
from fastmeta.backends.cuda.tables import Plan
from fastmeta.layers.registry import KINDS
from fastmeta.problem import Problem, Result

_DTYPES = (torch.float32, torch.float64)
#: What one task may take of global memory beside its shared memory.
_WORKSPACE_AT_MOST = 64 << 20
#: A kernel takes its arguments by value: 4 KiB on every driver.
_WORDS_AT_MOST = 500


def device() -> str:
    """Where tensors must be."""
    return "cpu" if launches.emulated_threads() else "cuda"


def missing() -> str:
    """Why this backend cannot run anything here, "" if it can."""
    if launches.emulated_threads():
        return "" if compiler.host_compiler() else "FASTMETA_CUDA_EMULATE needs a C++ compiler"
    if not torch.cuda.is_available():
        return "there is no CUDA device" if torch.version.cuda else "this build of PyTorch has no CUDA"
    return compiler.missing_compiler()


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`, "" if it can; reads shapes, dtypes and options
    only."""
    if reason := refuses_rule(problem, NAMED):
        return reason
    program = problem.program
    if program is None:
        return f"the network was not captured: {problem.refused}"
    first = next(iter(problem.params.values()))
    if first.device.type != device():
        return f"tensors are on {first.device}"
    if first.device.type == "cuda" and (reason := _refuses_device(first.device)):
        return reason
    if first.dtype not in _DTYPES or any(p.dtype != first.dtype for p in problem.params.values()):
        return f"parameters must all be float32 or all float64, got {first.dtype} first"
    if reason := without_kernels(program, *_known()):
        return reason
    if reason := refuses_layers(problem):
        return reason
    read = used_params(program)
    if not read:
        return "the output depends on no parameter"
    if reason := refuses_unread(problem, read):
        return reason
    for batch, loss in ((problem.support, problem.loss), (problem.query, problem.query_loss)):
        if batch is not None and batch.x.dtype != first.dtype:
            return f"the network's input is {batch.x.dtype}"
        if loss is not None and (reason := refuses_loss(loss)):
            return reason
    return _refuses_size(problem, wrt)


@lru_cache(maxsize=1)
def _known() -> tuple[frozenset[str], frozenset[str]]:
    """The layer kinds that have a file of CUDA kernels, and the element-wise functions of the list
    `FM_FUNCTIONS` in csrc/shared/types.h."""
    csrc = compiler.source_folder()
    kinds = frozenset(kind for kind in KINDS if (csrc / "cuda" / "layers" / f"{kind}.h").exists())
    rows = (csrc / "shared" / "types.h").read_text().partition("#define FM_FUNCTIONS(X)")[2]
    return kinds, frozenset(re.findall(r"X\((\w+), ", rows.partition("\n\n")[0]))


def _refuses_device(device: torch.device) -> str:
    """Older ones have no TF32 and no bfloat16."""
    have = torch.cuda.get_device_capability(device)
    return f"compute capability {have[0]}.{have[1]}: the kernels need 8.0" if have < (8, 0) else ""


def _refuses_size(problem: Problem, wrt: frozenset[str]) -> str:
    """What does not fit on the chip, or nearly."""
    plan = runs.make_plan(problem, wrt)
    words = 24 + 6 * len(plan.params) + plan.steps + plan.rule.general * (len(NUMBERS) + 1)
    if words > _WORDS_AT_MOST:
        return (
            f"{len(plan.params)} parameters and {plan.steps} steps do not go into the arguments of a kernel"
        )
    spilled = plan.workspace * plan.itemsize
    if spilled > _WORKSPACE_AT_MOST:
        return (
            f"a task needs {spilled / 2**20:.0f} MiB beside the "
            f"{plan.ranks} x {plan.shared_bytes / 1024:.0f} KiB of shared memory that it can have; "
            f"at most {_WORKSPACE_AT_MOST >> 20} MiB are worth it here"
        )
    return ""


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem` without waiting for the device.

    No value is looked at: a class index out of range or a rate that is not finite makes the result
    NaN.
    """
    return _hoisting.solve(_solve, refuses, problem, wrt, adapted)


def _solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    scratch = problem.scratch
    job = scratch.get("cuda")
    if job is None or not job.fits(wrt, adapted):
        job = scratch["cuda"] = runs.Job(problem, wrt, adapted)
    return job.run(problem)


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """What runs, in a few lines for `explain()`."""
    return _hoisting.describe(_describe, refuses, problem, wrt)


def _describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    plan = runs.make_plan(problem, wrt)
    first = next(iter(problem.params.values()))
    kinds = " ".join(layer.function or layer.kind for layer in problem.program.layers)  # type: ignore[union-attr]
    moved = sorted({area.group for area in plan.areas.values() if area.space == "global" and area.size})
    lines = [
        f"kernels: {kinds}",
        f"products: {_products(plan)}",
        f"{_crew(plan)} a task, memory: {plan.memory}",
    ]
    if moved:
        lines.append(
            f"in global memory, {plan.workspace * plan.itemsize / 1024:.0f} KiB a task: {', '.join(moved)}"
        )
        if moved != ["checkpoints"] and launches.chip(first.device).cluster == 1:
            lines.append(
                "blocks of this device cannot share their memory: clusters need compute capability 9.0"
            )
    if launches.emulated_threads():
        lines.append(f"EMULATED on the CPU, blocks of {launches.emulated_threads()} threads: for tests alone")
    return lines


def _crew(plan: Plan) -> str:
    blocks = "one block" if plan.ranks == 1 else f"a cluster of {plan.ranks} blocks"
    return f"{blocks} of {plan.threads} threads and {plan.shared_bytes / 1024:.0f} KiB of shared memory"


_SAID = {
    "split": "operands split into two numbers of TF32, accurate to float32",
    "tf32": "operands rounded to TF32 (ten bits), as torch.set_float32_matmul_precision('high') allows",
    "bf16": "operands rounded to bfloat16, as torch.set_float32_matmul_precision('medium') allows",
}


def _products(plan: Plan) -> str:
    """How the linear layers multiply."""
    linear = [layer for layer in plan.layers if layer.kind == "linear"]
    wide = [layer for layer in linear if layer.multiply != "fma"]
    plain = f"{'float32' if plan.itemsize == 4 else 'float64'} multiply-adds"
    if not wide:
        return f"{plain}, no tensor cores"
    shapes = {f"{plan.params[layer.weight].cols}-{plan.params[layer.weight].rows}": None for layer in wide}
    rest = f"; others: {plain}" if len(wide) < len(linear) else ""
    return f"tensor cores for layers {' '.join(shapes)}, {_SAID[wide[0].multiply]}{rest}"


def workspace_bytes(problem: Problem, wrt: frozenset[str]) -> int:
    """Bytes of memory that one running task takes, on the chip and beside it."""
    plan = runs.make_plan(problem, wrt)
    return plan.ranks * plan.shared_bytes + plan.workspace * plan.itemsize


def parameter_set_bytes(problem: Problem) -> int:
    """Bytes of one set of parameters."""
    plan = runs.make_plan(problem, frozenset())
    return plan.ranks * (plan.frozen + plan.set) * plan.itemsize


def poison(on: bool) -> None:
    """Fill workspaces and outputs with NaN before every call, for tests; emulated shared memory
    always is."""
    runs.POISON = on
