"""Whether a captured program computes what its module computes: asked once for each program and
shapes."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import torch

from fastmeta.backends import reference
from fastmeta.errors import CaptureError
from fastmeta.problem import Batch, Problem

# Far above rounding, far below what a wrong layer does.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def check_capture(backend: ModuleType, problem: Problem) -> None:
    """Compare the forward pass of one task, on the backend and by the module itself.

    Args:
        backend: the one that is going to run `problem`.
        problem: has a program.

    Raises:
        CaptureError: they differ.
    """
    one = _forward_of_one_task(problem)
    # what TF32 rounds away would look like a wrong layer
    with getattr(backend, "exact", nullcontext)():
        want = reference.solve(one, frozenset(), False).output
        got = backend.solve(one, frozenset(), False).output
    if want is None or got is None or want.shape != got.shape:
        raise CaptureError(
            f"the captured network returns {_shape(got)} for one task, the module {_shape(want)}"
        )
    finite = want.isfinite()
    got_finite, want_finite = got[finite].double(), want[finite].double()
    scale = (
        max(float(want_finite.abs().max()), 1.0) if finite.any() else 1.0
    )  # squares of enormous numbers overflow
    size = (want_finite / scale).norm().clamp_min(torch.finfo(want.dtype).eps / scale)
    error = ((got_finite - want_finite) / scale).norm() / size
    if not error <= _TOLERANCE[want.dtype] or not torch.equal(got.isfinite(), finite):
        raise CaptureError(
            f"the captured network does not compute what the module does: relative difference {error:.1e} "
            "on the first task; backend='torch' runs the module itself"
        )


def _forward_of_one_task(problem: Problem) -> Problem:
    batch = problem.query or problem.support
    if batch is None:
        raise ValueError("a problem needs a support or a query set")
    x = batch.x[:1, 0] if batch.per_step else batch.x[:1]  # [1, N, *in]
    params = {name: value[0] if name in problem.per_task else value for name, value in problem.params.items()}
    return Problem(
        net=problem.net,
        params=params,
        per_task=frozenset(),
        tasks=1,
        steps=0,
        query=Batch(x),
        batch_stats=problem.batch_stats,
        program=problem.program,
    )


def _shape(output: torch.Tensor | None) -> str:
    return "nothing" if output is None else str(tuple(output.shape))
