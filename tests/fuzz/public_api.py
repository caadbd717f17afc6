"""Fuzzer of the public interface: random networks and options in float64 against a plain autograd
loop.

    python tests/fuzz/public_api.py --calls 100000 --seed 0

Prints a reduced input for every fault, and at the end the number of calls and of faults.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from building import Refused, data_of
from drawing import Spec, draw
from running import main
from solving import ours, truth
from torch import Tensor, nn

import fastmeta as fm

# Relative to the value itself, and to the largest of its sort: what a norm cancels is zero but for
# rounding. Where nothing else is left, rounding is that of data of size one.
RELATIVE, OF_LARGEST, ROUNDING = 1e-9, 1e-10, 1e-14


# Of float32: PyTorch's own error by the same loop, times this, plus a floor of some hundred
# roundings.
SINGLE_FACTOR, SINGLE_FLOOR = 10, 5e-5


# What cancels in float32 leaves some hundred roundings of its summands.
SINGLE_OF_LARGEST = 2e-5


# What is larger has diverged: in float32 its squares and fourth powers are about to overflow.
LARGEST = {"float32": 1e4, "float64": 1e12}


def entries(net: nn.Module) -> list[tuple[int, str, int]]:
    """Every attribute of every submodule by identity; gradients are none of them."""
    return [
        (id(module), key, id(value))
        for module in net.modules()
        for place in (vars(module), module._parameters, module._buffers, module._modules)
        for key, value in place.items()
    ]


def check(spec: Spec) -> tuple[int, str]:
    """(calls made, what is wrong)."""
    warnings.simplefilter("ignore")
    try:
        drawn = data_of(spec)
    except Refused:
        return 0, ""
    if spec.api == "adapt" and spec.per_step:
        return 0, ""
    if spec.api in ("task_gradient",) and spec.per_step:
        return 0, ""
    drawn64 = data_of(_double(spec)) if spec.dtype == "float32" else drawn
    want = truth(spec, drawn64, torch.float64)
    if not all(float(value.nan_to_num(0.0).norm()) < LARGEST[spec.dtype] for value in want.values()):
        return 0, ""  # diverged
    if any(bool(value.isnan().any()) for key, value in want.items() if not key.startswith("d ")):
        return 0, ""
    single = truth(spec, drawn64, torch.float32) if spec.dtype == "float32" else None
    torch.set_num_threads(spec.threads)
    before = entries(drawn.net), torch.get_rng_state()
    results = []
    try:
        for _ in range(2):  # the second is a cached plan's
            results.append(ours(spec, drawn))
    except Exception as error:
        if refused(spec, error):
            return len(results) + 1, ""
        return len(results) + 1, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    if entries(drawn.net) != before[0]:
        return 2, "the module has changed"
    if not torch.equal(torch.get_rng_state(), before[1]):
        return 2, "the random state has changed"
    first, second = results
    for key, got in first.items():
        if got is None:
            return 2, f"{key} is None"
        if not torch.equal(got.nan_to_num(nan=7.0), second[key].nan_to_num(nan=7.0)):
            return 2, f"{key}: another result the second time"
    for key, got in first.items():
        problem = _compare(key, got, want, single)
        if problem:
            return 2, problem
    missing = [key for key in want if key not in first and not _may_miss(spec, key)]
    return 2, f"{missing[0]} is missing" if missing else ""


def refused(spec: Spec, error: Exception) -> bool:
    """Whether a backend that was asked for by name says that it does not take this, or a limit is
    too low for the tasks that an engine runs at once."""
    if isinstance(error, fm.BackendUnavailable):
        return spec.backend in ("cpu", "machine")
    few = "`memory_limit` must be at least" in str(error) and spec.backend in ("auto", "cpu", "machine")
    return isinstance(error, ValueError) and few and spec.memory == "checkpoint"


def _double(spec: Spec) -> Spec:
    return replace(spec, dtype="float64")


def _compare(key: str, got: Tensor, want: dict[str, Tensor], single: dict[str, Tensor] | None) -> str:
    if key not in want:
        return "" if not float(got.norm()) else f"{key} is not among what the loop returns"
    expected = want[key]
    if got.shape != expected.shape:
        return f"{key} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    undefined = expected.isnan()
    if key.startswith("d ") and any(bool(v.isnan().any()) for k, v in want.items() if k.startswith("d ")):
        # the derivative of a root at zero; what is zero times that is left out by autograd alone
        undefined = undefined | got.isnan()
    if undefined.any():
        got, expected = got.masked_fill(undefined, 0), expected.masked_fill(undefined, 0)
    size, off = float(expected.norm()), float((got.double() - expected).norm())
    largest = max(float(value.nan_to_num(0.0).norm()) for name, value in want.items() if name[:2] == key[:2])
    allowed = RELATIVE * size + OF_LARGEST * largest + ROUNDING
    if single is not None:
        allowed = SINGLE_FACTOR * float(
            (single[key].double() - want[key]).nan_to_num(0.0).norm()
        ) + SINGLE_FLOOR * (size + 0.1)
        allowed += SINGLE_OF_LARGEST * largest
    return (
        ""
        if off <= allowed
        else f"{key} is off by {off:.1e}, its size is {size:.1e}, allowed is {allowed:.1e}"
    )


def _may_miss(spec: Spec, key: str) -> bool:
    """What the loop gives and a call does not: gradients that were not asked for, or of what is no
    leaf there."""
    if key.startswith(("d support", "d query")):
        return True
    if key.startswith("d lr"):
        return spec.api in ("MAML", "adapt", "task_gradient", "task_forward")
    return key.startswith("d params") and (spec.api in ("MAML", "adapt") or spec.frozen)


if __name__ == "__main__":
    main("Random networks and options against a plain autograd loop.", draw, check)
