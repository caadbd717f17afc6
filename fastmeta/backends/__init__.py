"""The registry of backends: which are present, which can run a problem, and why the others cannot.

A backend is a module or package of this package with three functions:

    missing() -> str                      why it cannot run anything here, "" if it can
    refuses(problem, wrt) -> str          why it cannot run this problem, "" if it can
    solve(problem, wrt, adapted) -> Result

and, where it does not run on the CPU, a fourth:

    device() -> str                       where it runs, as PyTorch calls it

A backend may have more:

    yields(problem, wrt) -> str           why "auto" had better take a later one, "" if not
    cost(problem, wrt) -> dict[str, int]  multiply-adds by memory mode, for `explain`

`wrt` is a frozenset of names from `fastmeta.problem.DIFFERENTIABLE`: the gradients wanted.
`adapted` says whether `Result.adapted` is wanted. `refuses` reads shapes, dtypes and options only,
never values.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fastmeta.errors import BackendUnavailable
from fastmeta.problem import Problem

#: All backends. `inductor`, which compiles for a long time, and `reference` are never chosen by
#: "auto".
NAMES = ("cpu", "machine", "cuda", "triton", "inductor", "torch", "reference")
#: What "auto" tries, in this order, by the device of the parameters.
_AUTO = {"cpu": ("cpu", "machine", "torch"), "cuda": ("cuda", "triton", "torch")}


def get(name: str) -> ModuleType:
    """The backend called `name`.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return import_module(f"fastmeta.backends.{name}")


def device(name: str) -> str:
    """Where tensors must be for backend `name`, as PyTorch calls it."""
    module = get(name)
    return str(module.device()) if hasattr(module, "device") else "cpu"


def why_not(name: str, problem: Problem, wrt: frozenset[str]) -> str:
    """Why backend `name` cannot run this problem; "" if it can."""
    backend = get(name)
    return backend.missing() or backend.refuses(problem, wrt)


def candidates(problem: Problem) -> tuple[str, ...]:
    """What "auto" tries for the device of this problem, fastest first."""
    return _AUTO.get(next(iter(problem.params.values())).device.type, ("torch",))


def select(name: str, problem: Problem, wrt: frozenset[str]) -> ModuleType:
    """The backend that runs this problem: the one named, or the fastest that can.

    Raises:
        BackendUnavailable: the backend named cannot run it, or none can.
    """
    if name != "auto":
        reason = why_not(name, problem, wrt)
        if reason:
            raise BackendUnavailable(f"backend={name!r} cannot run this call: {reason}")
        return get(name)
    reasons = []
    for candidate in candidates(problem):
        backend = get(candidate)
        reason = why_not(candidate, problem, wrt)
        if not reason and hasattr(backend, "yields"):
            reason = backend.yields(problem, wrt)
        if not reason:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailable("no backend can run this call; " + "; ".join(reasons))
