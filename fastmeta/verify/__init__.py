"""Every backend against the float64 reference, in value and in every gradient, over the case list.

Source: docs/architecture.md, "Correctness".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.cases.verification import VERIFICATION
from fastmeta.verify import rule, runs
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.rule import DTYPES, Row

__all__ = ["DTYPES", "SEEDS", "Row", "present", "verify", "verify_case"]

#: Seeds of a case with kinks, whose median error counts in float32.
SEEDS = 20


def present() -> tuple[str, ...]:
    """The backends that can run here, besides the reference itself and `inductor`, which would
    compile every case anew for ten seconds and more: that one has to be named."""
    others = ("reference", "inductor")
    return tuple(name for name in backends.NAMES if name not in others and not backends.get(name).missing())


def verify(
    cases: Iterable[Case] = VERIFICATION,
    names: Iterable[str] | None = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    seeds: int = SEEDS,
) -> Iterator[Row]:
    """Compare backends with the float64 reference.

    Args:
        cases: to run.
        names: of the backends; None: all that are present.
        dtypes: "float64", "float32".
        seeds: per case with kinks, in float32; 20 at least for a verdict that counts.

    Returns:
        Rows as they come, one a quantity, case, backend and dtype. A case that a backend refuses
        gives one row that is `skipped` and says why.
    """
    names = tuple(present() if names is None else names)
    dtypes = tuple(dtypes)
    for case in cases:
        for name in names:
            for dtype in dtypes:
                yield from verify_case(case, name, dtype, seeds)


def verify_case(case: Case, backend: str, dtype: str, seeds: int = SEEDS) -> list[Row]:
    """The rows of one case on one backend in one dtype; see `verify`."""
    problem = problem_of(case, DTYPES[dtype], 0, backends.device(backend))
    refusal = backends.why_not(backend, problem, wanted(case, problem))
    if refusal:
        return [Row(case.id, backend, dtype, "", math.nan, math.nan, math.nan, refusal, skipped=True)]
    try:
        if dtype == "float64":
            out = runs.run(case, backend, torch.float64, 0)
            return rule.float64_rows(
                case.id, backend, rule.errors(out, runs.truth(case, 0).tensors, torch.float64)
            )
        samples = [_sample(case, backend, seed) for seed in range(seeds if case.kinks else 1)]
        return rule.float32_rows(case.id, backend, samples)
    except Exception as error:  # a backend that breaks has failed this case; the others still count
        return [
            Row(case.id, backend, dtype, "", math.nan, math.nan, math.nan, f"{type(error).__name__}: {error}")
        ]


def _sample(case: Case, backend: str, seed: int) -> rule.Sample:
    known = runs.truth(case, seed)
    found = rule.errors(runs.run(case, backend, torch.float32, seed), known.tensors, torch.float32)
    return rule.Sample(found, runs.own_errors(case, seed), known.clear or not case.kinks)
