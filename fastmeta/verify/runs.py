"""The runs behind a verdict: the float64 truth, PyTorch's own float32 error, and the backend
itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fastmeta import backends
from fastmeta.cases import Case
from fastmeta.problem import Problem, Result
from fastmeta.verify import rule
from fastmeta.verify.kinks import KinkDistance
from fastmeta.verify.permute import Permutation
from fastmeta.verify.problems import problem_of, wanted
from fastmeta.verify.quantities import Key, quantities


@dataclass(frozen=True, slots=True)
class Truth:
    """The float64 run of the reference."""

    tensors: dict[Key, Tensor]
    clear: bool  # every argument of a kinked function stayed away from its kink


@lru_cache(maxsize=256)
def truth(case: Case, seed: int) -> Truth:
    """The reference in float64, and whether it kept clear of all kinks."""
    problem = problem_of(case, torch.float64, seed)
    with KinkDistance(problem.loss, problem.query_loss) as kinks:
        result = _reference(problem, case)
    return Truth(quantities(result), kinks.smallest > rule.CLEAR)


@lru_cache(maxsize=256)
def _own_errors(case: Case, seed: int) -> dict[str, float]:
    problem = problem_of(case, torch.float32, seed)
    ref = truth(case, seed).tensors
    with without_onednn():
        plain = _reference(problem, case)
    permutation = Permutation(problem, seed)
    permuted = permutation.undo(problem, _reference(permutation.apply(problem), case))
    runs = [
        rule.errors(quantities(r), ref, torch.float32) for r in (_reference(problem, case), plain, permuted)
    ]
    return {name: max(run[name] for run in runs) for name in runs[0]}


def own_errors(case: Case, seed: int) -> dict[str, float]:
    """PyTorch's own float32 error of every quantity: the largest of three float32 runs of the
    reference.

    They are the default one, one without oneDNN, and one with examples and hidden units in another
    order.
    """
    return dict(_own_errors(case, seed))


def run(case: Case, backend: str, dtype: torch.dtype, seed: int) -> dict[Key, Tensor]:
    """The case on a backend whose workspace and outputs are full of NaN before the call, where it
    can do that."""
    module = backends.get(backend)
    problem = problem_of(case, dtype, seed, backends.device(backend))
    with poisoned(module):
        found = quantities(module.solve(problem, wanted(case, problem), case.operator == "inner_sgd"))
    return {key: tensor.cpu() for key, tensor in found.items()}


def _reference(problem: Problem, case: Case) -> Result:
    result: Result = backends.get("reference").solve(
        problem, wanted(case, problem), case.operator == "inner_sgd"
    )
    return result


@contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's other kernels on the CPU."""
    with warnings.catch_warnings():
        # PyTorch warns of a TF32 setting of other devices that nobody asked for.
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextmanager
def poisoned(module: ModuleType) -> Iterator[None]:
    """Workspace and outputs of a backend full of NaN before every call, where it can do that."""
    poison = getattr(module, "poison", None)
    if poison is None:
        yield
        return
    poison(True)
    try:
        yield
    finally:
        poison(False)
