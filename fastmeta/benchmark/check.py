"""The gate before the clock: a peer whose meta-gradient is wrong is not timed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastmeta.benchmark.peers import Prepared
from fastmeta.cases import Case
from fastmeta.verify import rule, runs
from fastmeta.verify.quantities import relative_error

_GROUP = "d_params"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The error of a meta-gradient against the float64 reference and what is allowed."""

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the error is within what is allowed; nan is not."""
        return self.error <= self.allowed


def seeds(case: Case) -> range:
    """The seeds a case is judged on. With kinks the median of several counts; many tasks average by
    themselves, and the reference takes a second for every hundred of them. Images have so many
    pixels that every third seed of any float32 run falls on the other side of some kink."""
    if not case.kinks or case.tasks > 32:
        return range(1)
    return range(20 if len(case.input_shape) == 3 else 3)


def judge(case: Case, prepared: dict[int, Prepared], outs: dict[int, object]) -> Verdict:
    """Compare what a peer's first steps returned with the reference, under the rule of
    verification.

    Args:
        case: what was run.
        prepared, outs: by seed, see `seeds`.
    """
    errors, own = [], []
    for seed, peer in prepared.items():
        ref = {key: value for key, value in runs.truth(case, seed).tensors.items() if key[0] == _GROUP}
        out: dict[tuple[str, str], Tensor] = {
            (_GROUP, name): value.detach().to(torch.float64)
            for name, value in peer.gradient(outs[seed]).items()
        }
        errors.append(relative_error(out, ref, list(ref)))
        own.append(runs.own_errors(case, seed)[_GROUP])
    return Verdict(median(errors), rule.FACTOR * median(own) + rule.FLOOR)
