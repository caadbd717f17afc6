"""One inner step of an update rule on whole sets of parameters [T, P], and its adjoint: of any rule
with a name but plain SGD with momentum, which is in `sgd.py`.

The arithmetic is in `kernels/update_rules`; `Place.slots` is the `index` of `sgd.py`. A program
takes a block of one task's elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit
from fastmeta.kernels.launch import Recorder, blocks
from fastmeta.kernels.passes import Operand
from fastmeta.kernels.update_rules import adagrad, adam, lion, rmsprop, sgd
from fastmeta.kernels.update_rules.clip import along, clamped, factor, total
from fastmeta.kernels.update_rules.numbers import (
    CLIP_NORM,
    CLIP_VALUE,
    START,
    Form,
    add,
    number,
    root,
)

#: Elements of a program: of more, the adjoints in float64 would not go into registers.
BLOCK = 512


class States(NamedTuple):
    """The parts of the state [T, P], None behind the last."""

    first: Tensor | None
    second: Tensor | None
    third: Tensor | None


def states(parts: Sequence[Tensor] = ()) -> States:
    """As many as there are."""
    return States(*(*parts, None, None, None)[:3])


class Place(NamedTuple):
    """What step and adjoint read of one inner step."""

    theta: Operand  # of a task [P]
    gradient: Tensor  # [T, P], as it is
    squares: Tensor | None  # [T, blocks], of the clamped gradient; where it is clipped by its norm
    rates: Operand  # of a task [L]
    slots: Tensor  # [P], as `index` of sgd.py
    row: Tensor  # [ROW], of the numbers
    before: States


@jit
def _load_state(place: Place, at, mask, row, FORM: tl.constexpr):
    """The state before the step: after others, or where there were none."""
    a = tl.zeros_like(at).to(place.gradient.dtype.element_ty)
    b = a
    c = a
    if FORM.first:
        if FORM.kind == "adagrad":
            a += number(row, START)
    else:
        if FORM.states > 0:
            a = tl.load(place.before.first + at, mask=mask, other=0.0)
        if FORM.states > 1:
            b = tl.load(place.before.second + at, mask=mask, other=0.0)
        if FORM.states > 2:
            c = tl.load(place.before.third + at, mask=mask, other=0.0)
    return a, b, c


@jit
def _store_state(to: States, at, mask, a, b, c):
    if to.first is not None:
        tl.store(to.first + at, a, mask=mask)
    if to.second is not None:
        tl.store(to.second + at, b, mask=mask)
    if to.third is not None:
        tl.store(to.third + at, c, mask=mask)


@jit
def _load_element(place: Place, task, e, at, slot, mask, count, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """theta, the clipped gradient and the rate."""
    theta = tl.load(place.theta.at + task * place.theta.stride + e, mask=mask, other=0.0)
    g = clamped(tl.load(place.gradient + at, mask=mask, other=0.0), place.row, FORM)
    if FORM.clip_norm:
        g *= factor(root(total(place.squares, task, count, BLOCK)), place.row)
    alpha = tl.load(place.rates.at + task * place.rates.stride + slot, mask=mask, other=0.0)
    return theta, g, alpha


@jit
def rule_step(
    place: Place,
    out,  # [T, P], the next theta
    after: States,
    P,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out, after = the rule's step."""
    count = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // count).to(tl.int64)
    e = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(place.slots + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    theta, g, alpha = _load_element(place, task, e, at, slot, mask, count, FORM, BLOCK)
    a, b, c = _load_state(place, at, mask, place.row, FORM)
    if FORM.kind == "sgd":
        theta, a, b, c = sgd.step(theta, g, alpha, a, b, c, place.row, FORM)
    elif FORM.kind == "adam" or FORM.kind == "adamw":
        theta, a, b, c = adam.step(theta, g, alpha, a, b, c, place.row, FORM)
    elif FORM.kind == "rmsprop":
        theta, a, b, c = rmsprop.step(theta, g, alpha, a, b, c, place.row, FORM)
    elif FORM.kind == "adagrad":
        theta, a, b, c = adagrad.step(theta, g, alpha, a, b, c, place.row, FORM)
    else:
        tl.static_assert(FORM.kind == "lion", "step: no such rule")
        theta, a, b, c = lion.step(theta, g, alpha, a, b, c, place.row, FORM)
    tl.store(out + at, theta, mask=mask)
    _store_state(after, at, mask, a, b, c)


@jit
def rule_back(
    place: Place,
    lam,  # [T, P], dJ/dtheta', becomes dJ/dtheta but for what passes through the gradient
    mbar: States,  # dJ/dstate', becomes dJ/dstate
    v,  # [T, P], dJ/dg, zero where nothing is adapted, of the clipped gradient; or None
    by_rate,  # [T, P], dJ/dalpha of each element; or None
    parts,  # [T blocks, ...], dJ/dnumber; None where none is wanted
    dots,  # [T, blocks], <v, g1>; or None
    P,
    COLUMNS,  # of parts
    LAST: tl.constexpr,  # of all steps: dJ/dstate' is zero
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rule's adjoint, up to where its gradient was clipped."""
    count = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // count).to(tl.int64)
    e = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(place.slots + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    row = place.row
    theta, g, alpha = _load_element(place, task, e, at, slot, mask, count, FORM, BLOCK)
    a, b, c = _load_state(place, at, mask, row, FORM)
    bar = tl.load(lam + at, mask=mask, other=0.0)
    to_a = tl.zeros_like(bar)
    to_b = to_a
    to_c = to_a
    if not LAST:
        if FORM.states > 0:
            to_a = tl.load(mbar.first + at, mask=mask, other=0.0)
        if FORM.states > 1:
            to_b = tl.load(mbar.second + at, mask=mask, other=0.0)
        if FORM.states > 2:
            to_c = tl.load(mbar.third + at, mask=mask, other=0.0)
    own = parts if FORM.learned == 0 else parts + tl.program_id(0).to(tl.int64) * COLUMNS
    if FORM.kind == "sgd":
        bar, to_g, rate, to_a, to_b, to_c = sgd.back(
            theta, g, alpha, a, b, c, bar, to_a, to_b, to_c, row, own, mask, FORM
        )
    elif FORM.kind == "adam" or FORM.kind == "adamw":
        bar, to_g, rate, to_a, to_b, to_c = adam.back(
            theta, g, alpha, a, b, c, bar, to_a, to_b, to_c, row, own, mask, FORM
        )
    elif FORM.kind == "rmsprop":
        bar, to_g, rate, to_a, to_b, to_c = rmsprop.back(
            theta, g, alpha, a, b, c, bar, to_a, to_b, to_c, row, own, mask, FORM
        )
    elif FORM.kind == "adagrad":
        bar, to_g, rate, to_a, to_b, to_c = adagrad.back(
            theta, g, alpha, a, b, c, bar, to_a, to_b, to_c, row, own, mask, FORM
        )
    else:
        tl.static_assert(FORM.kind == "lion", "back: no such rule")
        bar, to_g, rate, to_a, to_b, to_c = lion.back(
            theta, g, alpha, a, b, c, bar, to_a, to_b, to_c, row, own, mask, FORM
        )
    tl.store(lam + at, bar, mask=mask)
    _store_state(mbar, at, mask, to_a, to_b, to_c)
    if v is not None:
        to_g = tl.where(mask, to_g, 0.0)
        tl.store(v + at, to_g, mask=e < P)
    if by_rate is not None:
        tl.store(by_rate + at, rate, mask=mask)
    if dots is not None:
        g1 = clamped(tl.load(place.gradient + at, mask=mask, other=0.0), row, FORM)
        tl.store(dots + tl.program_id(0), tl.sum(tl.where(mask, to_g * g1, 0.0), axis=0))


@jit
def clip_squares(
    place: Place,
    out,  # [T, blocks]
    P,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sums of g1^2 over each block."""
    count = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // count).to(tl.int64)
    e = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    mask = tl.load(place.slots + e, mask=e < P, other=-1) >= 0
    g1 = clamped(tl.load(place.gradient + task * P + e, mask=mask, other=0.0), place.row, FORM)
    tl.store(out + tl.program_id(0), tl.sum(g1 * g1, axis=0))


@jit
def clip_back(
    place: Place,
    v,  # [T, P], dJ/dg2, becomes dJ/dg
    dots,  # [T, blocks], <dJ/dg2, g1>; or None
    parts,  # [T blocks, ...], dJ/dnumber; None where none is wanted
    P,
    COLUMNS,  # of parts
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The adjoint of clipping."""
    count = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // count).to(tl.int64)
    e = tl.program_id(0) % count * BLOCK + tl.arange(0, BLOCK)
    mask = tl.load(place.slots + e, mask=e < P, other=-1) >= 0
    at = task * P + e
    row = place.row
    own = parts if FORM.learned == 0 else parts + tl.program_id(0).to(tl.int64) * COLUMNS
    g = tl.load(place.gradient + at, mask=mask, other=0.0)
    to_g = tl.load(v + at, mask=mask, other=0.0)
    if FORM.clip_norm:
        norm = root(total(place.squares, task, count, BLOCK))
        dot = total(dots, task, count, BLOCK)
        to_g = factor(norm, row) * to_g + along(norm, dot, row) * clamped(g, row, FORM)
        if (tl.constexpr(FORM.learned) >> CLIP_NORM) & 1:
            most = number(row, CLIP_NORM)
            clips = (tl.program_id(0) % count == 0) & (most / (norm + 1e-6) <= 1.0)
            tl.store(own + CLIP_NORM, tl.where(clips, dot / (norm + 1e-6), 0.0))
    if FORM.clip_value:
        most = number(row, CLIP_VALUE)
        above = tl.where(g > most, to_g, 0.0)
        below = tl.where(g < -most, to_g, 0.0)
        add(own, above - below, mask, CLIP_VALUE, FORM)
        to_g = tl.where(g > most, 0.0, tl.where(g < -most, 0.0, to_g))
    tl.store(v + at, tl.where(mask, to_g, 0.0), mask=e < P)


def emit_step(
    emit: Recorder, tasks: int, place: Place, out: Tensor, after: Sequence[Tensor], form: Form
) -> None:
    """out [T, P], after = the step; with clipping by the norm `place.squares` is written before."""
    size = place.slots.numel()
    programs = tasks * blocks(size, BLOCK)
    if place.squares is not None:
        emit(clip_squares, programs, place=place, out=place.squares, P=size, FORM=form, BLOCK=BLOCK)
    emit(rule_step, programs, place=place, out=out, after=states(after), P=size, FORM=form, BLOCK=BLOCK)


def emit_back(
    emit: Recorder,
    tasks: int,
    place: Place,
    lam: Tensor,
    mbar: Sequence[Tensor],
    v: Tensor | None,
    by_rate: Tensor | None,
    parts: Tensor | None,
    dots: Tensor | None,
    last: bool,
    form: Form,
) -> None:
    """The adjoint of `emit_step`.

    Args:
        place: as of the step.
        lam: [T, P], dJ/dtheta', becomes dJ/dtheta but for what passes through the gradient.
        mbar: parts of the state [T, P], dJ/dstate', become dJ/dstate; not read if `last`.
        v: [T, P], becomes dJ/dg; None: not wanted.
        by_rate: [T, P], becomes dJ/dalpha of each element; None: not wanted.
        parts: [T * blocks, at least 12], becomes dJ/dnumber, zero before; None: none is wanted.
        dots: [T, blocks] of scratch memory, for clipping by the norm.
    """
    size = place.slots.numel()
    programs, columns = tasks * blocks(size, BLOCK), 0 if parts is None else parts.stride(0)
    clips = v is not None and (form.clip_value or form.clip_norm)
    emit(
        rule_back,
        programs,
        place=place,
        lam=lam,
        mbar=states(mbar),
        v=v,
        by_rate=by_rate,
        parts=parts,
        dots=dots if clips and form.clip_norm else None,
        P=size,
        COLUMNS=columns,
        LAST=last,
        FORM=form,
        BLOCK=BLOCK,
    )
    if clips:
        emit(
            clip_back,
            programs,
            place=place,
            v=v,
            dots=dots if form.clip_norm else None,
            parts=parts,
            P=size,
            COLUMNS=columns,
            FORM=form,
            BLOCK=BLOCK,
        )
