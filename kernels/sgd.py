"""The inner update rule on whole sets of parameters [T, P]: see `fastmeta.update_rules.sgd`.

`index` [P] says where in a row of rates [T or 1, L] the rate of an element stands, -1 where it has
none.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit
from fastmeta.kernels.launch import FLAT, Recorder, blocks
from fastmeta.kernels.passes import Operand


@jit
def _update(
    theta: Operand,  # of a task [P]
    gradient,  # [T, P]
    momentum,  # [T, P]; or None at the first step
    rates: Operand,  # of a task [L]; or None
    index,  # [P]
    out,  # [T, P], the next theta; or None
    kept,  # [T, P], u; or None
    P,
    MU: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kept = u = gradient + DECAY theta + MU momentum; out = theta - rates u."""
    tiles = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(index + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    u = tl.load(gradient + at, mask=mask, other=0.0)
    old = tl.load(theta.at + task * theta.stride + e, mask=mask, other=0.0)
    if DECAY != 0.0:
        u += DECAY * old
    if momentum is not None:
        u += MU * tl.load(momentum + at, mask=mask, other=0.0)
    if kept is not None:
        tl.store(kept + at, u, mask=mask)
    if out is not None:
        alpha = tl.load(rates.at + task * rates.stride + slot, mask=mask, other=0.0)
        tl.store(out + at, old - alpha * u, mask=mask)


@jit
def _direction(
    lam,  # [T, P]
    mbar,  # [T, P]; or None
    rates: Operand,  # of a task [L]
    index,  # [P]
    out,  # [T, P]
    P,
    BLOCK: tl.constexpr,
):
    """out = mbar - rates lam, zero where nothing is adapted."""
    tiles = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(index + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    alpha = tl.load(rates.at + task * rates.stride + slot, mask=mask, other=0.0)
    v = -alpha * tl.load(lam + at, mask=mask, other=0.0)
    if mbar is not None:
        v += tl.load(mbar + at, mask=mask, other=0.0)
    tl.store(out + at, v, mask=e < P)


@jit
def _adjoint(
    lam,  # [T, P]
    v,  # [T, P]
    mbar,  # [T, P]; or None
    index,  # [P]
    P,
    MU: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """lam += DECAY v; mbar = MU v."""
    tiles = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = tl.load(index + e, mask=e < P, other=-1) >= 0
    at = task * P + e
    d = tl.load(v + at, mask=mask, other=0.0)
    if DECAY != 0.0:
        tl.store(lam + at, tl.load(lam + at, mask=mask, other=0.0) + DECAY * d, mask=mask)
    if mbar is not None:
        tl.store(mbar + at, MU * d, mask=mask)


class Table(NamedTuple):
    """Of each adapted parameter [count]: where it stands in P, its size, its slot in L, and whether
    it has one rate an element."""

    start: Tensor
    size: Tensor
    slot: Tensor
    elementwise: Tensor


@jit
def _rate_gradient(
    lam,  # [T, P]; None: u is the gradient of each element
    u,  # [T, P]
    table: Table,
    out,  # [T, L]
    count,
    P,
    L,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [out] - lam u, summed over a parameter's elements where they share a rate: one program
    a task and parameter."""
    task = (tl.program_id(0) // count).to(tl.int64)
    p = tl.program_id(0) % count
    start = tl.load(table.start + p)
    size = tl.load(table.size + p)
    to = out + task * L + tl.load(table.slot + p)
    each = tl.load(table.elementwise + p) != 0
    total = tl.zeros([BLOCK], dtype=u.dtype.element_ty)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = task * P + start + i
        g = tl.load(u + at, mask=i < size, other=0.0)
        if lam is not None:
            g = -tl.load(lam + at, mask=i < size, other=0.0) * g
        total += g
        if each:
            if ADD:
                g += tl.load(to + i, mask=i < size, other=0.0)
            tl.store(to + i, g, mask=i < size)
    if not each:
        one = tl.sum(total, axis=0)
        if ADD:
            one += tl.load(to)
        tl.store(to, one)


def update(
    emit: Recorder,
    tasks: int,
    theta: Operand,
    gradient: Tensor,
    momentum: Tensor | None,
    rates: Operand | None,
    index: Tensor,
    out: Tensor | None,
    kept: Tensor | None,
    mu: float,
    decay: float,
) -> None:
    """kept = u = [mu momentum +] gradient + decay theta; out = theta - rates u. `kept` may be
    `momentum`."""
    size = index.numel()
    emit(
        _update,
        tasks * blocks(size, FLAT),
        theta=theta,
        gradient=gradient,
        momentum=momentum,
        rates=rates,
        index=index,
        out=out,
        kept=kept,
        P=size,
        MU=mu,
        DECAY=decay,
        BLOCK=FLAT,
    )


def direction(
    emit: Recorder,
    tasks: int,
    lam: Tensor,
    mbar: Tensor | None,
    rates: Operand,
    index: Tensor,
    out: Tensor,
) -> None:
    """out = mbar - rates lam, zero where nothing is adapted."""
    size = index.numel()
    emit(
        _direction,
        tasks * blocks(size, FLAT),
        lam=lam,
        mbar=mbar,
        rates=rates,
        index=index,
        out=out,
        P=size,
        BLOCK=FLAT,
    )


def adjoint(
    emit: Recorder,
    tasks: int,
    lam: Tensor,
    v: Tensor,
    mbar: Tensor | None,
    index: Tensor,
    mu: float,
    decay: float,
) -> None:
    """lam += decay v; mbar = mu v."""
    size = index.numel()
    emit(
        _adjoint,
        tasks * blocks(size, FLAT),
        lam=lam,
        v=v,
        mbar=mbar,
        index=index,
        P=size,
        MU=mu,
        DECAY=decay,
        BLOCK=FLAT,
    )


def rate_gradient(
    emit: Recorder, tasks: int, lam: Tensor | None, u: Tensor, table: Tensor, out: Tensor, add: bool
) -> None:
    """out [T, L] = [out] - lam u, or [out] + u, summed over a parameter's elements where they
    share a rate.

    `table` [4, adapted parameters] has the rows of `Table`.
    """
    count = table.shape[1]
    emit(
        _rate_gradient,
        tasks * count,
        lam=lam,
        u=u,
        table=Table(*table),
        out=out,
        count=count,
        P=u.shape[1],
        L=out.shape[-1],
        ADD=add,
        BLOCK=FLAT,
    )
