"""The steps of any module, batched over the tasks by vmap and compiled by PyTorch's compiler; on a
GPU all steps of a call are one CUDA graph.

docs/inductor-backend.md says what is compiled, and when.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.backends import _inputs, reference
from fastmeta.backends._autocast import autocast_dtype
from fastmeta.backends._compared import difference, varied
from fastmeta.backends._first_run import carries_state
from fastmeta.backends._precision import asked_for
from fastmeta.backends._random_state import preserved_for
from fastmeta.backends._traced import Kept
from fastmeta.backends.inductor.compile import CompileError, no_cpp_compiler, unsupported
from fastmeta.backends.inductor.pieces import Pieces, traced
from fastmeta.backends.inductor.run import Job
from fastmeta.backends.torch.chunks import cut
from fastmeta.backends.torch.tasks import output_shape
from fastmeta.inputs import mapped
from fastmeta.network.functional import isolated
from fastmeta.problem import Problem, Result, Scratch
from fastmeta.trace.record import UntraceableError
from fastmeta.trace.step import not_traced
from fastmeta.undisturbed import asynchronous

_DTYPES = (torch.float32, torch.float64)
#: Sorts of problems of one network that are kept.
_MOST_SORTS = 64
#: Tasks that the first call is compared on.
_COMPARED = 2
_kept: Kept[Pieces] = Kept(_MOST_SORTS)


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
        RuntimeError: the module has become one that cannot be run here.
    """
    _inputs.check_rates(problem)
    if problem.device.type == "cpu":
        with isolated(problem.device):
            _inputs.check_class_indices(_inputs.detached(problem), output_shape)
    found = _pieces(problem, wrt)
    if isinstance(found, str):
        raise RuntimeError(f"backend='inductor' cannot run this call: {found}")
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


def _unfit(problem: Problem, wrt: frozenset[str]) -> str:
    """Why a problem cannot be run, as far as shapes, dtypes and options say."""
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
            reason = _compared(p, wrt, found)
            return f"what was compiled differs from the module: {reason}" if reason else found
        except (UntraceableError, CompileError) as error:
            return str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if asynchronous(error):
                raise
            return not_traced(error)


def _compared(problem: Problem, wrt: frozenset[str], pieces: Pieces) -> str:
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


def _run(problem: Problem, wrt: frozenset[str], adapted: bool, pieces: Pieces) -> Result:
    scratch: Scratch = problem.scratch
    # static tensors outlive the call: made in inference mode, nothing could be copied into them
    with torch.inference_mode(False), torch.no_grad():
        job = scratch.get("inductor")
        if job is None or job.pieces is not pieces or (job.wrt, job.adapted) != (wrt, adapted):
            job = scratch["inductor"] = Job(problem, wrt, adapted, pieces)
        try:
            return job.run(problem)
        except RuntimeError as error:
            if "index out of bounds" in str(error):  # as compiled code for the CPU says it
                raise IndexError("an index is out of range: the network reads rows by it") from error
            raise
