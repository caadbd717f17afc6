"""The steps of any module, batched over the tasks by vmap and compiled by PyTorch's compiler; on a
GPU all steps of a call are one CUDA graph.

docs/inductor-backend.md says what is compiled, and when.
"""

from __future__ import annotations

from weakref import ref

import torch

from fastmeta.backends import _inputs
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._precision import asked_for
from fastmeta.backends._random_state import preserved_for
from fastmeta.backends._rules import NAMED, refuses_rule
from fastmeta.backends._traced import Kept
from fastmeta.backends.inductor.compile import CompileError, no_cpp_compiler, unsupported
from fastmeta.backends.inductor.first import compared
from fastmeta.backends.inductor.pieces import Pieces, traced
from fastmeta.backends.inductor.run import Job
from fastmeta.backends.torch.tasks import output_shape
from fastmeta.bounded import Bounded
from fastmeta.errors import BackendUnavailable
from fastmeta.inputs import mapped
from fastmeta.network.functional import isolated
from fastmeta.problem import Problem, Result, Scratch
from fastmeta.trace.record import UntraceableError
from fastmeta.trace.step import not_traced
from fastmeta.undisturbed import asynchronous

_DTYPES = (torch.float32, torch.float64)
#: Sorts of problems of one network that are kept.
_MOST_SORTS = 64
#: Jobs with static tensors, and graphs, that are kept, of all networks.
_MOST_JOBS = 64
_kept: Kept[Pieces] = Kept(_MOST_SORTS)


def _give_back(kept: ref[Scratch]) -> None:
    scratch = kept()
    if scratch is not None:
        scratch.pop("inductor", None)


_jobs: Bounded[int, ref[Scratch]] = Bounded(_MOST_JOBS, dropped=_give_back)


def missing() -> str:
    """Why this backend cannot run anything here, "" if it can."""
    return unsupported() or ("" if torch.cuda.is_available() else no_cpp_compiler())


def refuses(problem: Problem, wrt: frozenset[str]) -> str:
    """Why this backend cannot run `problem`, "" if it can: the module is traced and compiled, and
    compared with itself, once."""
    reason = _unfit(problem, wrt)
    if reason:
        return reason
    found = _pieces(problem, wrt)
    return found if isinstance(found, str) else ""


def solve(problem: Problem, wrt: frozenset[str], adapted: bool) -> Result:
    """Answer `problem`.

    On a GPU nothing is waited for: a class index out of range, or a rate that is not finite, makes
    its task's results NaN there.

    Raises:
        ValueError: one of these, on the CPU.
        IndexError: an index that the module reads rows by is out of range, on the CPU.
        BackendUnavailable: the module or a loss has become one that cannot be run here.
    """
    _inputs.check_rates(problem)
    if problem.device.type == "cpu" and _reads_classes(problem):
        with isolated(problem.device):
            _inputs.check_class_indices(_inputs.detached(problem), output_shape)
    found = _pieces(problem, wrt)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend='inductor' cannot run this call: {found}")
    return _run(problem, wrt, adapted, found)


def describe(problem: Problem, wrt: frozenset[str]) -> list[str]:
    """What was compiled, in a few lines for `explain()`."""
    found = _pieces(problem, wrt)
    if isinstance(found, str):
        return [found]
    pieces = found.compiled()
    lines = [
        f"compiled: {name}, {piece.operators} operators, {piece.seconds:.1f} s"
        for name, piece in pieces.items()
    ]
    if problem.steps and problem.order == "second":
        lines.append("memory: recompute; the Hessian-vector product runs its step again")
    if problem.device.type == "cuda":
        job = problem.scratch.get("inductor")
        why = "" if job is None else job.why_no_graph
        lines.append(f"launched one by one: {why}" if why else "one CUDA graph from the second call on")
    return lines


def _reads_classes(problem: Problem) -> bool:
    pairs = ((problem.loss, problem.support), (problem.query_loss, problem.query))
    return any(
        loss is not None and batch is not None and batch.y is not None and loss.needs_class_indices(batch.y)
        for loss, batch in pairs
    )


def _unfit(problem: Problem, wrt: frozenset[str]) -> str:
    """Why a problem cannot be run, as far as shapes, dtypes and options say."""
    if reason := refuses_rule(problem, NAMED):
        return reason
    first = next(iter(problem.params.values()), None)
    if first is None:
        return "the network has no parameters"
    if first.device.type not in ("cpu", "cuda"):
        return f"tensors are on {first.device}"
    if first.device.type == "cpu" and (reason := no_cpp_compiler()):
        return reason
    if first.dtype not in _DTYPES or any(p.dtype != first.dtype for p in problem.params.values()):
        return f"parameters must all be float32 or all float64, got {first.dtype} first"
    if problem.third:
        return "a third derivative is wanted"
    if not _inputs.runs(problem):
        return "nothing is run"
    if problem.task_chunk is not None and problem.task_chunk < problem.tasks:
        return f"task_chunk={problem.task_chunk}, and all tasks run side by side here"
    if problem.memory == "store":
        return "memory='store', and every step is run again here"
    if autocast_dtype(first.device) is not None:
        return "autocast is active"
    for loss in (problem.loss, problem.query_loss):
        if loss is not None and loss.learned:
            return f"`{loss.learned}` of the loss {loss.kind} requires grad"
    return ""


def _pieces(problem: Problem, wrt: frozenset[str]) -> Pieces | str:
    """What was compiled for problems like this one, or why nothing can be."""
    more = _more(problem)
    found = _kept.find(problem, wrt, more, lambda: _first(problem, wrt))
    if isinstance(found, Pieces) and not found.buffers.same(problem.net):
        _kept.forget(problem, wrt, more)
        found = _kept.find(problem, wrt, more, lambda: _first(problem, wrt))
    return found


def _more(problem: Problem) -> object:
    """What compiled code depends on, besides what traces of one task do."""
    weights = [
        None if tensor is None else (tensor.dtype, tensor.device)
        for loss in (problem.loss, problem.query_loss)
        if loss is not None
        for tensor in (loss.weight, loss.pos_weight)
    ]
    cotangents = [] if problem.output_grad is None else _given(problem)
    return (
        (problem.tasks, problem.per_task, problem.device, asked_for(), torch.get_num_threads()),
        (tuple(weights), tuple(cotangents)),
    )


def _given(problem: Problem) -> list[bool]:
    """Which leaves of the output have a cotangent."""
    found: list[bool] = []
    mapped(lambda leaf: found.append(leaf is not None), problem.output_grad)
    return found


def _first(problem: Problem, wrt: frozenset[str]) -> Pieces | str:
    """The pieces, compiled and compared, or why there are none."""
    with isolated(problem.device), preserved_for(problem):
        try:
            p = _inputs.detached(problem)
            if p.steps and (state := carries_state(p)):
                return f"the network carries `{state}` over from pass to pass"
            found = traced(p, wrt)
            reason = compared(p, wrt, found)
            return f"what was compiled differs from the module: {reason}" if reason else found
        except (UntraceableError, CompileError) as error:
            return str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if asynchronous(error):
                raise
            return not_traced(error)


def _run(problem: Problem, wrt: frozenset[str], adapted: bool, pieces: Pieces) -> Result:
    scratch: Scratch = problem.scratch
    # static tensors outlive the call: made in inference mode, nothing could be copied into them
    with torch.inference_mode(False), torch.no_grad():
        job = scratch.get("inductor")
        if job is None or job.pieces is not pieces or (job.wrt, job.adapted) != (wrt, adapted):
            job = scratch["inductor"] = Job(problem, wrt, adapted, pieces)
            key = id(scratch)
            _jobs.put(key, ref(scratch, lambda _: _jobs.drop(key)))
        else:
            _jobs.used(id(scratch))
        try:
            return job.run(problem)
        except RuntimeError as error:
            if "index out of bounds" in str(error):  # as compiled code for the CPU says it
                raise IndexError("an index is out of range: the network reads rows by it") from error
            raise
