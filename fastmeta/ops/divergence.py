"""Tasks that diverged: counted, named, and left out where that is asked for.

A shared gradient is a sum over tasks, so that one task of NaN makes all of it NaN, and a weight of
zero does not help: zero times NaN is NaN. Nothing is done about that beforehand. Where a loss or a
gradient turns out not to be finite, it
is computed again without the tasks at fault: that costs only then.

Which tasks are left out: those of weight zero, which contribute nothing whatever they hold, and
count in the mean as always. With "skip" also those of any other weight that diverged, and the mean
is over the others: of T tasks S of which are skipped, sum(task_weights * task_losses) / (T - S)
over the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fastmeta.inputs import leaves_of
from fastmeta.ops.plan import Call, mean_loss
from fastmeta.ops.some_tasks import DATA, scatter, select
from fastmeta.problem import Result

_CHOICES = ("raise", "skip", "keep")


class Attempt(Protocol):
    """The answer for some tasks."""

    @property
    def task_losses(self) -> Tensor:
        """[n]."""

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients are."""


A = TypeVar("A", bound=Attempt)


@dataclass(slots=True)
class Rest(Generic[A]):
    """What is left of T tasks.

    Args:
        tasks: [n] int64, their numbers.
        answer: for them; None where there are none, and all others have weight zero.
        counted: tasks that the mean is over: T less those skipped.
        skipped: the numbers of those.
    """

    tasks: Tensor
    answer: A | None
    counted: int
    skipped: list[int]

    @property
    def scale(self) -> float:
        """What makes the mean over `tasks` that over those counted."""
        return len(self.tasks) / self.counted


def check_choice(who: str, on_divergence: object) -> None:
    """Check `on_divergence=`.

    Raises:
        ValueError: no such choice.
    """
    if not isinstance(on_divergence, str) or on_divergence not in _CHOICES:
        raise ValueError(f"{who}: `on_divergence` must be 'raise', 'skip' or 'keep', got {on_divergence!r}")


def looked_for(on_divergence: str, on_cpu: bool, weights: Tensor | None) -> bool:
    """Whether gradients are to be looked at: "skip" says so, and so do weights of zero, which are
    read.

    On an accelerator, where reading anything would wait for it, only "skip" does.
    """
    if on_divergence == "skip":
        return True
    return weights is not None and on_cpu and 0.0 in weights.tolist()


def leave_out(
    who: str, on_divergence: str, first: A, weights: Tensor | None, again: Callable[[Tensor], A]
) -> Rest[A] | None:
    """Compute again without the tasks at fault, if there are any.

    Args:
        who: the algorithm, for messages.
        on_divergence: with "skip" tasks that diverged are left out; without it those of weight zero
            alone.
        first: the answer for all tasks.
        weights: [T] or None.
        again: the answer for the tasks with these numbers.

    Returns:
        None: the first answer stands.

    Raises:
        FloatingPointError: all tasks diverged that have a weight.

    Warns:
        RuntimeWarning: counts and names the tasks that are skipped.
    """
    if first.finite:
        return None
    number, device = len(first.task_losses), first.task_losses.device
    zero = set() if weights is None else set((weights.detach() == 0).nonzero().flatten().tolist())
    left = [task for task in range(number) if task not in zero]
    if on_divergence != "skip":
        if not zero:
            return None
        at = torch.tensor(left, dtype=torch.int64, device=device)
        return Rest(at, again(at) if left else None, number, [])
    skipped: list[int] = []
    answer: A | None = first if not zero else None
    at = torch.tensor(left, dtype=torch.int64, device=device)
    while left and not (answer := again(at) if answer is None else answer).finite:
        fine = answer.task_losses.isfinite().tolist()
        if all(fine):  # a gradient overflowed
            fine = [again(at[i : i + 1]).finite for i in range(len(left))]
        if all(fine):  # a sum did, of which every term is finite: that is not one task's fault
            break
        skipped += [task for task, good in zip(left, fine, strict=True) if not good]
        left = [task for task, good in zip(left, fine, strict=True) if good]
        at, answer = torch.tensor(left, dtype=torch.int64, device=device), None
    if skipped:
        warn_of_skipped(who, sorted(skipped), number, bool(left))
    return Rest(at, answer if left else None, number - len(skipped), sorted(skipped))


@dataclass(slots=True)
class Gone:
    """Tasks that are left out of sums over tasks, where every task's own term is known."""

    tasks: Tensor  # [T] bool
    counted: int  # tasks that the mean is over

    def without(self, terms: Tensor) -> Tensor:
        """[T, ...] with zeros in place of their terms: zero times NaN would be NaN."""
        return terms.masked_fill(self.tasks.reshape(-1, *[1] * (terms.dim() - 1)), 0)

    def mean(self, task_losses: Tensor, weights: Tensor | None) -> Tensor:
        """The loss, ()."""
        kept = self.without(task_losses)
        return (kept if weights is None else kept * weights.detach()).sum() / self.counted


def left_out(who: str, on_divergence: str, values: Iterable[Tensor], weights: Tensor | None) -> Gone | None:
    """The tasks that contribute nothing, as `leave_out` says, where nothing has to be computed
    again; reads values.

    Args:
        who, on_divergence, weights: as of `leave_out`.
        values: tensors [T, ...]; a task diverged if one of its numbers is not finite.

    Returns:
        None: all contribute.

    Raises:
        FloatingPointError: all tasks diverged that have a weight.

    Warns:
        RuntimeWarning: counts and names the tasks that are skipped.
    """
    bad = ~torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in values]).all(0)  # [T]
    zero = torch.zeros_like(bad) if weights is None else weights.detach() == 0
    skipped = (bad & ~zero).nonzero().flatten().tolist() if on_divergence == "skip" else []
    out = bad if on_divergence == "skip" else bad & zero
    if not out.any():
        return None
    if skipped:
        warn_of_skipped(who, skipped, len(bad), bool((~bad & ~zero).any()))
    return Gone(out, len(bad) - len(skipped))


def warn_of_skipped(who: str, skipped: list[int], number: int, some_left: bool) -> None:
    """Count and name tasks that are left out.

    Args:
        who: the algorithm, for messages.
        skipped: their numbers.
        number: T.
        some_left: whether any other has a weight.

    Raises:
        FloatingPointError: none has.

    Warns:
        RuntimeWarning: otherwise.
    """
    if not some_left:
        raise FloatingPointError(f"{who}: {_count(skipped, number)} diverged, none is left: {named(skipped)}")
    warnings.warn(
        f"{who}: {_count(skipped, number)} diverged, left out of the loss and its gradient: {named(skipped)}",
        RuntimeWarning,
        stacklevel=2,
    )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are; reads them."""
    sums = [tensor.sum() for tensor in tensors]
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum() if sums else 0.0
    # a sum may overflow where all of its terms are finite
    return isfinite(total) or all(bool(tensor.isfinite().all()) for tensor in tensors)


@dataclass(slots=True)
class Settled:
    """An answer in which no task is at fault, as far as that was asked for."""

    result: Result
    loss: Tensor  # ()
    rest: Rest[Any] | None = None

    def by_task_weights(self) -> Tensor:
        """The gradient of the loss by the weights of tasks, [T]: zero where a task is skipped."""
        losses = cast(Tensor, self.result.task_losses)
        if self.rest is None:
            return losses / losses.shape[0]
        found = torch.where(losses.isfinite(), losses / self.rest.counted, 0)
        found[self.rest.skipped] = 0
        return found


def _just_so(solve: Callable[[], Result]) -> Result:
    return solve()


def settled(
    who: str,
    on_divergence: str,
    call: Call,
    result: Result,
    run: Callable[[Callable[[], Result]], Result] = _just_so,
) -> Settled:
    """The answer to a call with its loss, without the tasks that are to be left out.

    Args:
        who, on_divergence: as of `leave_out`.
        call, result: the call and its answer.
        run: runs what solves it again.
    """
    problem = call.problem
    loss = mean_loss(result, problem.task_weights)
    if not looked_for(on_divergence, loss.is_cpu, problem.task_weights):
        return Settled(result, loss)

    def again(tasks: Tensor) -> _Solved:
        part = select(problem, tasks)

        found = run(lambda: call.plan.backend.solve(part, call.wrt, False))
        return _Solved(found, mean_loss(found, part.task_weights))

    with torch.no_grad():
        rest = leave_out(who, on_divergence, _Solved(result, loss), problem.task_weights, again)
        if rest is None:
            return Settled(result, loss)
        part = rest.answer
        found = scatter(problem, result, rest.tasks, None if part is None else part.result, rest.scale)
        return Settled(found, torch.zeros_like(loss) if part is None else part.loss * rest.scale, rest)


@dataclass(slots=True)
class _Solved:
    result: Result
    loss: Tensor

    @property
    def task_losses(self) -> Tensor:
        return cast(Tensor, self.result.task_losses)

    @property
    def finite(self) -> bool:
        if self.loss.is_cpu and not isfinite(self.loss.item()):
            return False
        grads = self.result.grads
        found = [leaf for field in (*DATA, "flat_params") for leaf in leaves_of(getattr(grads, field))]
        found += [gradient for _, gradient in grads.captured or ()]
        if grads.flat_params is None:
            found += (grads.params or {}).values()
        found += [*(grads.lr or {}).values(), *(grads.rule or {}).values()]
        return all_finite(found if self.loss.is_cpu else [self.loss, *found])


def check_diverged(who: str, what: str, values: Iterable[Tensor], weights: Tensor | None = None) -> None:
    """Refuse tasks whose values are not finite; reads them.

    Args:
        who: the algorithm, for messages.
        what: the values, for messages.
        values: tensors [T, ...].
        weights: [T]; tasks of weight zero may hold anything.

    Raises:
        FloatingPointError: counts and names the tasks.
    """
    finite = torch.stack([value.reshape(len(value), -1).isfinite().all(1) for value in values]).all(0)  # [T]
    if weights is not None:
        finite |= weights.detach() == 0
    if not finite.all():
        tasks = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{who}: {_count(tasks, len(finite))} diverged, their {what} not finite: {named(tasks)}"
        )


def named(tasks: list[int]) -> str:
    """Tasks by their numbers, those beyond sixteen as their count."""
    rest = f" and {len(tasks) - 16} more" if len(tasks) > 16 else ""
    return f"task{'s' * (len(tasks) > 1)} {', '.join(map(str, tasks[:16]))}{rest}"


def _count(tasks: list[int], of: int) -> str:
    return f"{len(tasks)} of {of} tasks"
