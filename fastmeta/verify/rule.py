"""The rule that every backend is held to: docs/architecture.md, "Correctness"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastmeta.verify.quantities import Key, groups, relative_error

DTYPES = {"float64": torch.float64, "float32": torch.float32}

#: Relative tolerance in float64, for every tensor of every case.
FLOAT64 = 1e-9

#: In float32 an error may be this many times PyTorch's own...
FACTOR = 2.0

#: ...plus this much. PyTorch's own error is the largest of three samples of a rounding error, and
#: for a sum of a few numbers all three may happen to be exactly rounded, or alike. Two more
#: roundings of the result and of one
#: operand, half an eps each, on either side: 4 eps are two units in the last place of any order of
#: summation.
FLOOR = 4 * torch.finfo(torch.float32).eps

#: In float32 a tensor of fewer numbers is judged together with the others of its group (all
#: parameters, all rates): three samples of the rounding error of one number do not bound a fourth.
#: In float64 every tensor stands alone.
FEW = 16

#: A case with kinks is judged by itself only if its float64 run stays this far away from all of
#: them.
CLEAR = 1e-4


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one quantity of one case on one backend."""

    case: str
    backend: str
    dtype: str
    quantity: str
    error: float  # ||out - ref|| / ||ref||
    own: float  # PyTorch's own float32 error, nan in float64
    allowed: float
    note: str = ""  # of a skipped or failed row: why
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed; nan is not."""
        return self.skipped or self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "skipped" if self.skipped else "passed" if self.passed else "FAILED"
        error = f"error {self.error:.2e}, allowed {self.allowed:.2e}, PyTorch's own {self.own:.2e}"
        return f"{verdict} {self.case} {self.backend} {self.dtype} {self.quantity}: {self.note or error}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One seed of a case in float32: the errors of a backend and of PyTorch by quantity."""

    errors: dict[str, float]
    own: dict[str, float]
    clear: bool  # no kink nearby


def judged(ref: dict[Key, Tensor], dtype: torch.dtype) -> dict[str, list[Key]]:
    """What is judged as one vector: name -> tensors."""
    whole = groups(ref)
    if dtype == torch.float64:
        return {_name(key): [key] for key in ref}
    # A group is judged as a whole, and so is each of its larger tensors.
    alone = {_name(key): [key] for key in ref if key[1] and ref[key].numel() >= FEW}
    return {**whole, **alone}


def errors(out: dict[Key, Tensor], ref: dict[Key, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The error of everything that is judged. A tensor that the reference does not have is an error
    too."""
    found = {name: relative_error(out, ref, keys) for name, keys in judged(ref, dtype).items()}
    found.update({f"{_name(key)} (not in the reference)": math.inf for key in out if key not in ref})
    return found


def float64_rows(case: str, backend: str, found: dict[str, float]) -> list[Row]:
    """One row a tensor: its error is at most 1e-9."""
    return [Row(case, backend, "float64", name, error, math.nan, FLOAT64) for name, error in found.items()]


def float32_rows(case: str, backend: str, samples: list[Sample]) -> list[Row]:
    """One row a quantity: the first sample if no kink is near, and the median of all if there are
    several."""
    rows = []
    for name in samples[0].errors:
        if samples[0].clear:
            own = samples[0].own.get(name, 0.0)
            rows.append(_float32(case, backend, name, samples[0].errors[name], own))
        if len(samples) > 1:
            error = median(sample.errors.get(name, math.inf) for sample in samples)
            own = median(sample.own.get(name, 0.0) for sample in samples)
            rows.append(_float32(case, backend, f"{name}, median of {len(samples)}", error, own))
    return rows


def _float32(case: str, backend: str, quantity: str, error: float, own: float) -> Row:
    return Row(case, backend, "float32", quantity, error, own, FACTOR * own + FLOOR)


def _name(key: Key) -> str:
    return f"{key[0]} {key[1]}".strip()
