"""When to keep theta and the state of the rule, and when to run inner steps again: the schedule of
memory="checkpoint".

With c places for (theta, state), the way back over K steps runs the fewest steps again when their
places are chosen as binomial coefficients say: with beta(c, r) = C(c + r, c), and beta(c, r - 1) <
K <= beta(c, r), no step is run more than r times, and r K - beta(c + 1, r - 1) steps are run in
all.

Source: Griewank, Walther, "Algorithm 799: revolve" (2000), theorem 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, isqrt
from typing import NamedTuple

from fastmeta.backends._random_state import preserved_for
from fastmeta.inputs import leaves_of
from fastmeta.problem import Problem

#: The actions. `at` is the number of a step, theta_at where it begins.
SAVE, RESTORE, ADVANCE, BACK = "save", "restore", "advance", "back"


#: In the order of ActionKind in csrc/cpu/checkpoints.h.
_KINDS = (SAVE, RESTORE, ADVANCE, BACK)


class Action(NamedTuple):
    """What is to be done next; "now" is the (theta, state) at hand, at first those of step 0.

    - save: keep now, which is of step `at`, in place `to`, whatever is there;
    - restore: now is what place `to` keeps, of step `at`;
    - advance: run steps `at` .. `to` - 1, without a graph: now is of step `to`;
    - back: run step `at`, now's, and go back over it (`to` is `at`). There is no now after that,
      but for the first of these, of step K - 1, before whose way back theta_K is made.
    """

    kind: str
    at: int
    to: int


def copy_bytes(p: Problem, tasks: int) -> int:
    """What one copy of the adapted parameters and the state of the rule takes, in bytes.

    Args:
        p: the problem.
        tasks: how many tasks run at once.
    """
    first = {name: p.params[name][0] if name in p.per_task else p.params[name] for name in p.rates}
    with preserved_for(p):  # a rule of the user's own may draw its first state
        state = [] if p.rule is None else leaves_of(p.rule.init({n: v.detach() for n, v in first.items()}))
    return tasks * sum(tensor.numel() * tensor.element_size() for tensor in (*first.values(), *state))


def slots_for(steps: int, copy_bytes: int, limit: int | None) -> int:
    """How many copies of (theta, state) are kept: about the root of K, or what fits.

    Args:
        steps: K.
        copy_bytes: what one takes.
        limit: bytes that all of them may take; None: any.

    Raises:
        ValueError: not even one fits.
    """
    wanted = max(1, isqrt(steps))
    if limit is None:
        return wanted
    fit = limit // max(copy_bytes, 1)
    if fit < 1:
        raise ValueError(
            f"`memory_limit` must be at least {copy_bytes} bytes, one copy of the adapted parameters and the "
            f"state of the update rule of all tasks that run at once, got {limit}"
        )
    return min(wanted, fit)


def advances(steps: int, slots: int) -> int:
    """How many steps the schedule runs without a graph, the first way forward included; the K
    steps that are run with one, on the way back, are not counted."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    r = _repeats(steps, slots)
    return r * steps - comb(slots + r, r - 1)


def schedule(steps: int, slots: int) -> Iterator[Action]:
    """The actions for K steps, in order.

    Args:
        steps: K, at least 0.
        slots: places, at least 1; they have the numbers from 0.
    """
    if steps < 1:
        return
    yield Action(SAVE, 0, 0)
    # (first step, last step + 1, the place that keeps the first, whether now is of the first)
    pending = [(0, steps, 0, True)]
    while pending:
        start, stop, place, here = pending.pop()
        if not here:
            yield Action(RESTORE, start, place)
        length, free = stop - start, slots - place
        if length == 1:
            yield Action(BACK, start, start)
            continue
        middle = start + _first_part(length, free)
        yield Action(ADVANCE, start, middle)
        pending.append((start, middle, place, False))
        if stop - middle == 1:
            yield Action(BACK, middle, middle)
            continue
        yield Action(SAVE, middle, place + 1)
        pending.append((middle, stop, place + 1, True))


def described(p: Problem, copy_bytes: int) -> list[tuple[int, int, int]]:
    """The schedule of a problem as the C++ engines read it, (kind, at, to) of each action.

    Args:
        p: the problem.
        copy_bytes: what one copy takes.

    Raises:
        ValueError: not even one fits `memory_limit`.
    """
    slots = slots_for(p.steps, copy_bytes, p.memory_limit)
    return [(_KINDS.index(kind), at, to) for kind, at, to in schedule(p.steps, slots)]


def run_again(p: Problem, copy_bytes: int) -> float:
    """How many times each inner step is run besides that on the way back, on average; `copy_bytes`:
    what one copy takes."""
    return advances(p.steps, slots_for(p.steps, copy_bytes, p.memory_limit)) / p.steps


def said(p: Problem, each: int) -> str:
    """What is kept and what it costs, for `explain()`.

    Args:
        p: the problem.
        each: what one copy takes, in bytes.
    """
    slots, again = slots_for(p.steps, each, p.memory_limit), run_again(p, each)
    return (
        f"memory: {slots} copies of the adapted parameters and the state of the update rule, "
        f"{slots * each / 1024:.0f} KiB, in place of {p.steps}; each inner step is run {1 + again:.1f} "
        'times on average, 2 times with "recompute"'
    )


def _repeats(steps: int, slots: int) -> int:
    """r: the least with C(slots + r, slots) >= steps."""
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r


def _first_part(length: int, slots: int) -> int:
    """How many steps to advance before the next copy, where `slots` places are there for these
    steps, that of the first among them: the most of those that are best."""
    if slots == 1:
        return length - 1
    r = _repeats(length, slots)
    return min(comb(slots + r - 1, slots), length - comb(slots + r - 2, slots - 1))
