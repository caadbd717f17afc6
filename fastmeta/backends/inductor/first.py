"""The first call: what was compiled, against the module itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.backends import reference
from fastmeta.backends._compared import difference, varied
from fastmeta.backends.inductor.pieces import Pieces
from fastmeta.backends.inductor.run import Job
from fastmeta.backends.torch.chunks import cut
from fastmeta.inputs import mapped
from fastmeta.problem import Problem, Result

#: Tasks that are compared.
_COMPARED = 2


def compared(problem: Problem, wrt: frozenset[str], pieces: Pieces) -> str:
    """How what was compiled differs from the module itself on the first tasks, "" if it does not.

    All tasks run, the others with weights of zero: what was compiled is for this number of tasks.
    """
    worst = ""
    for seed in (0, 1):
        whole = _for_first_tasks(varied(problem, seed))
        some = cut(whole, 0, min(_COMPARED, problem.tasks))
        expected = reference.solve(some, wrt, True)
        with torch.no_grad():
            found = _of_first_tasks(Job(whole, wrt, True, pieces).run(whole), whole, some)
        worst = difference(found, expected, next(iter(problem.params.values())).dtype)
        if not worst:
            return ""
    return worst


def _for_first_tasks(problem: Problem) -> Problem:
    """The same problem, in whose J the first tasks alone are."""
    first = next(iter(problem.params.values()))
    shares = (torch.arange(problem.tasks, device=first.device) < _COMPARED).to(first.dtype)

    def share(tensor: Tensor) -> Tensor:
        return tensor * shares.reshape(-1, *[1] * (tensor.dim() - 1))

    cotangents = problem.adapted_grad
    return replace(
        problem,
        task_weights=shares if problem.task_weights is None else problem.task_weights * shares,
        output_grad=mapped(lambda leaf: None if leaf is None else share(leaf), problem.output_grad),
        adapted_grad=None
        if cotangents is None
        else {name: share(value) for name, value in cotangents.items()},
    )


def _of_first_tasks(result: Result, whole: Problem, some: Problem) -> Result:
    """What an answer says of the first tasks."""
    tasks, grads = some.tasks, result.grads

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:tasks]

    if grads.params is not None:
        grads.params = {
            name: value[:tasks] if name in whole.per_task else value for name, value in grads.params.items()
        }
    if grads.lr is not None:
        grads.lr = {
            name: value[:, :tasks] if value.shape[1] > 1 else value for name, value in grads.lr.items()
        }
    for role in ("support", "query"):
        for name in ("x", "y", "weights"):
            setattr(grads, f"{role}_{name}", mapped(part, getattr(grads, f"{role}_{name}")))
    adapted = (
        None if result.adapted is None else {name: value[:tasks] for name, value in result.adapted.items()}
    )
    return Result(part(result.task_losses), mapped(part, result.output), adapted, grads)
