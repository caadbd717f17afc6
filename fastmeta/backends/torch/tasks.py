"""All tasks of a problem, evaluated side by side: by vmap where that is right, else in a loop, with
the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite

import torch
from torch import Tensor

from fastmeta.backends import _inputs
from fastmeta.backends._random_state import preserved_for
from fastmeta.backends._sweep import stack
from fastmeta.backends._twice import NotTwiceDifferentiableError, check_twice
from fastmeta.backends.torch.chunks import cut
from fastmeta.backends.torch.evaluation import Evaluation
from fastmeta.bounded import Known
from fastmeta.inputs import Form, flatten, leaves_of, signature
from fastmeta.network.functional import own
from fastmeta.problem import Batch, Problem
from fastmeta.undisturbed import asynchronous

#: Sorts of problems of one network that something is remembered of.
_MOST_SORTS = 1024
#: Largest relative difference between vmap and the loop that rounding explains.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}

_loops: Known[int, str] = Known(_MOST_SORTS)
_graphs: Known[tuple[int, bool], float] = Known(_MOST_SORTS)
_stored: Known[int, bool] = Known(_MOST_SORTS)
_twice: Known[tuple[int, bool], bool] = Known(_MOST_SORTS)
_shapes: Known[int, tuple[int, ...]] = Known(_MOST_SORTS)


def step_of(batch: Batch, step: int) -> Batch:
    """What inner step `step` sees of a support set."""
    if not batch.per_step:
        return batch
    return replace(_inputs.each(batch, lambda tensor: tensor[:, step]), per_step=False)


def why_loop(problem: Problem) -> str:
    """Why the tasks of `problem` run one after the other; "" if vmap runs them.

    Decided once per network, training flags, losses and shapes, and remembered: on two tasks, vmap
    must run and must agree with the loop in value, gradient and Hessian-vector product. Draws
    nothing from the random state. To be called inside `isolated`, with the tensors of `problem`
    detached.
    """
    if problem.autocast is not None:
        return "under vmap PyTorch's autocast passes over linear layers"
    key = _key(problem)
    reason = _loops.get(problem.net, key)
    if reason is None:
        reason = _compare(problem)
        if reason == "" and problem.steps and _form(problem.query) not in (None, _form(problem.support)):
            reason = _compare(replace(problem, steps=0))  # the query sets may take another way
        if reason is not None:
            _loops.put(problem.net, key, reason)
    return reason or ""


def remember_loop(problem: Problem, reason: str) -> None:
    """Have tasks like those of `problem` run in a loop from now on; `reason` says why."""
    _loops.put(problem.net, _key(problem), reason)


def remember_to_store(problem: Problem) -> None:
    """Keep the graphs of all steps from now on where "auto" decides: a step of `problem` cannot be
    run again."""
    _stored.put(problem.net, _key(problem), True)


def must_store(problem: Problem) -> bool:
    """Whether `remember_to_store` was told of problems like this one."""
    return problem.memory == "auto" and bool(_stored) and _stored.get(problem.net, _key(problem)) is not None


def check_second_order(
    problem: Problem, vectorised: bool, losses: Tensor, gradients: Sequence[Tensor]
) -> None:
    """`check_twice`, once for problems like this one; `losses` and `gradients` are of one inner
    step."""
    key = (_key(problem), vectorised)
    if _twice.get(problem.net, key) is None:
        check_twice(losses, gradients)
        _twice.put(problem.net, key, True)


def graph_bytes(problem: Problem, vectorised: bool) -> float:
    """What the graph of one task's gradient at one inner step holds, in bytes.

    Measured once per network, training flags, losses and shapes, on one or two tasks, and
    remembered. Draws nothing from the random state. To be called inside `isolated`, with the
    tensors of `problem` detached.
    """
    key = (_key(problem), vectorised)
    size = _graphs.get(problem.net, key)
    if size is None:
        sample = cut(problem, 0, 2 if vectorised else 1)
        held: dict[int, int] = {}  # address -> size: the same storage is saved many times
        unknown: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            try:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # one of torch.func's own has no memory to look at
                unknown.append(tensor.numel() * tensor.element_size())
            return tensor

        try:
            with preserved_for(sample), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                _probe(sample, vectorised)
            size = (sum(held.values()) + sum(unknown)) / sample.tasks
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            size = inf  # torch.func's transforms inside the forward allow no hooks: nothing can be measured
        _graphs.put(problem.net, key, size)
    return size


def output_shape(problem: Problem) -> tuple[int, ...]:
    """Shape of the network's output for one example, from the layer program or one remembered run
    of one task."""
    if problem.program is not None:
        return problem.program.output_shape
    key = _key(problem)
    shape = _shapes.get(problem.net, key)
    return shape if shape is not None else _shapes.put(problem.net, key, _inputs.output_shape(problem))


def _key(problem: Problem) -> int:
    """Everything that vmap's being right may depend on. A hash, so that nothing is kept alive."""
    batch = _inputs.any_batch(problem)
    return hash(
        (
            tuple(module.training for module in problem.net.modules()),
            tuple(None if loss is None else loss.key for loss in (problem.loss, problem.query_loss)),
            tuple((name, value.shape, value.dtype) for name, value in problem.params.items()),
            tuple([signature(tree, skip=1) for tree in (batch.x, batch.y, batch.weights)]),
            _form(problem.query),
            (problem.per_task, frozenset(problem.rates), problem.steps > 0, batch.per_step),
            (problem.order, problem.batch_stats, problem.device, problem.autocast),
        )
    )


def _form(batch: Batch | None) -> Form | None:
    """The form of a set's inputs, None without a set."""
    return None if batch is None else flatten(batch.x)[1]


def _compare(problem: Problem) -> str | None:
    """What is wrong with vmap on the first two tasks, "" if nothing is; None if nothing can be said
    (NaN)."""
    pair = cut(problem, 0, 2)
    reason = ""
    with preserved_for(pair) as before:
        try:
            vectorised = _probe(pair, vectorised=True)
        except (torch.OutOfMemoryError, NotTwiceDifferentiableError):
            raise
        except Exception as error:
            if asynchronous(error):
                raise
            reason = failure(error)
        drawn = before.anew()
        if not reason and (outside := before.drawn_outside_torch(drawn)):
            return drawn_once(outside)
        if not reason and not drawn.same_as(before):
            return ""  # vmap draws other masks than the loop, there is nothing to compare
        before.restore()
        looped = _probe(pair, vectorised=False)  # an error of the caller's own comes out here
    if reason:
        return reason
    for what, found, expected in zip(
        ("output", "gradient", "Hessian-vector product"), vectorised, looped, strict=True
    ):
        size, off = float(expected.norm()), float((found - expected).norm())
        if not isfinite(size):
            return None
        if not off <= _TOLERANCE.get(expected.dtype, 0.05) * size:
            return f"the {what} by vmap was off by {off / size if size else inf:.1e} (relative)"
    return ""


def _probe(problem: Problem, vectorised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradient and Hessian-vector product of all tasks at theta_0, each in one vector."""
    second = problem.steps > 0 and problem.order == "second"
    names = list(problem.rates) if problem.steps else list(problem.params)
    theta = {name: own(stack(problem, name), requires_grad=True) for name in names}
    sets = _inputs.any_batch(problem)
    batch, loss = step_of(sets, 0), problem.query_loss if sets is problem.query else problem.loss
    losses, output = Evaluation(
        problem=problem,
        params={**problem.params, **theta},
        stacked=problem.per_task | theta.keys(),
        batch=batch,
        loss=loss,
        vectorised=vectorised,
    ).run()
    generator = torch.Generator("cpu").manual_seed(0)
    objective = losses.sum()
    for leaf in _inputs.differentiable(output):
        objective = objective + (leaf * _random_like(leaf, generator)).sum()
    leaves = list(theta.values())
    gradient = _inputs.gradients([objective], leaves, create_graph=second)
    directions = [_random_like(leaf, generator) for leaf in leaves]
    if second:
        check_twice(losses, gradient)
    product = _inputs.gradients(gradient, leaves, directions) if second else []
    return _flat([leaf.to(losses) for leaf in leaves_of(output)]), _flat(gradient), _flat(product)


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return (
        torch.cat([tensor.detach().flatten() for tensor in tensors])
        if tensors
        else torch.zeros(0, device="cpu")
    )


def drawn_once(generator: str) -> str:
    """Why a forward that draws from something else than torch runs in a loop."""
    return f"the forward draws from {generator}, which vmap would do once for all tasks"


def failure(error: Exception) -> str:
    """Why tasks run in a loop after `error` under vmap."""
    message = str(error).strip() or "no message"
    return f"vmap failed with {type(error).__name__}: {message.splitlines()[0]}"
