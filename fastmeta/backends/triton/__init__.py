"""Triton kernels over all tasks, layer by layer, in one CUDA graph: for networks of any size on the
GPU."""

from __future__ import annotations

from math import prod

import torch

from fastmeta.backends import _hoisting
from fastmeta.backends._inputs import check_class_indices, check_rates
from fastmeta.backends._layers import refuses_layers, without_kernels
from fastmeta.backends._precision import exact as exact
from fastmeta.backends._rules import NAMED, refuses_rule
from fastmeta.losses import Loss
from fastmeta.problem import Problem, Result

try:
    import triton

    from fastmeta.backends.triton import run as runs

    _IMPORT_ERROR = ""
except ImportError as error:  # said by missing()
    _IMPORT_ERROR = str(error)

_DTYPES = (torch.float32, torch.float64)
#: Offsets within a task are 32 bits wide.
_MOST = 2**31


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU: tests set TRITON_INTERPRET=1."""
    return not _IMPORT_ERROR and bool(triton.knobs.runtime.interpret)


def device() -> str:
    """Where tensors must be."""
    return "cpu" if interpreting() else "cuda"


def missing() -> str:
    """Why this backend cannot run anything here, "" if it can."""
    if _IMPORT_ERROR:
        return f"Triton cannot be imported ({_IMPORT_ERROR})"
    if not torch.cuda.is_available() and not interpreting():
        return "there is no CUDA device"
    return ""


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
        return f"tensors are on {first.device}" + (
            ", and Triton's interpreter runs" if interpreting() else ""
        )
    if first.dtype not in _DTYPES or any(p.dtype != first.dtype for p in problem.params.values()):
        return f"parameters must all be float32 or all float64, got {first.dtype} first"
    if reason := without_kernels(program, runs.KINDS, runs.FUNCTIONS):
        return reason
    if reason := refuses_layers(problem):
        return reason
    if not any(name for layer in program.layers for name in layer.params):
        return "the output depends on no parameter"
    for batch, loss in ((problem.support, problem.loss), (problem.query, problem.query_loss)):
        if batch is None:
            continue
        if batch.x.dtype != first.dtype:
            return f"the network's input is {batch.x.dtype}"
        examples = batch.x.shape[2 if batch.per_step else 1]
        if examples * max(prod(program.value_shape(i)) for i in range(len(program.layers) + 1)) >= _MOST:
            return "a value of one task has 2^31 elements or more"
        if loss is not None and (reason := _refuses_loss(loss)):
            return reason
    return ""


def _refuses_loss(loss: Loss) -> str:
    return f"the loss {loss.function!r} is a function of its own" if loss.kind == "custom" else ""


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`.

    On a GPU nothing is waited for: a class index out of range, or a rate that is not finite, makes
    its task's results NaN there.

    Raises:
        ValueError: one of these, under the interpreter.
    """
    return _hoisting.solve(_solve, refuses, problem, wrt, adapted)


def _solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    # Static tensors outlive the call: made in inference mode, nothing could be copied into them
    # outside of it.
    with torch.inference_mode(False), torch.no_grad():
        check_rates(problem)
        if interpreting():
            check_class_indices(problem, lambda p: p.program.output_shape)  # type: ignore[union-attr]
        scratch = problem.scratch
        job = scratch.get("triton")
        if job is None or not job.fits(problem, wrt, adapted):
            job = scratch["triton"] = runs.Job(problem, wrt, adapted)
            runs.keep(scratch, job)
        else:
            runs.used(scratch, job)
        return job.run(problem)


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """What runs, in a few lines for `explain()`."""
    return _hoisting.describe(runs.describe, refuses, problem, wrt)


def poison(on: bool) -> None:
    """Fill scratch memory with NaN before every call, for tests."""
    runs.POISON = on
