"""The inner update rule on whole sets of parameters [T, P]: see `fastmeta.update_rules.sgd`.

`index` [P] says where in a row of rates [T or 1, L] the rate of an element stands, -1 where it has
none.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import FLAT, Recorder, blocks
from fastmeta.kernels.passes import Operand


@triton.jit
def _update(
    theta,
    theta_task,
    gradient,
    momentum,  # [T, P], or None at the first step
    rates,
    rates_task,
    index,
    out,  # the next theta, or None
    kept,  # u, or None
    P,
    MU: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(index + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    u = tl.load(gradient + at, mask=mask, other=0.0)
    old = tl.load(theta + task * theta_task + e, mask=mask, other=0.0)
    if DECAY != 0.0:
        u += DECAY * old
    if momentum is not None:
        u += MU * tl.load(momentum + at, mask=mask, other=0.0)
    if kept is not None:
        tl.store(kept + at, u, mask=mask)
    if out is not None:
        alpha = tl.load(rates + task * rates_task + slot, mask=mask, other=0.0)
        tl.store(out + at, old - alpha * u, mask=mask)


@triton.jit
def _direction(lam, mbar, rates, rates_task, index, out, P, BLOCK: tl.constexpr):
    tiles = tl.cdiv(P, BLOCK)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(index + e, mask=e < P, other=-1)
    mask = slot >= 0
    at = task * P + e
    alpha = tl.load(rates + task * rates_task + slot, mask=mask, other=0.0)
    v = -alpha * tl.load(lam + at, mask=mask, other=0.0)
    if mbar is not None:
        v += tl.load(mbar + at, mask=mask, other=0.0)
    tl.store(out + at, v, mask=e < P)


@triton.jit
def _adjoint(lam, v, mbar, index, P, MU: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr):
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


@triton.jit
def _rate_gradient(
    lam,  # [T, P]
    u,
    starts,  # of each adapted parameter in P
    sizes,
    slots,  # in L
    elements,  # whether it has one rate an element
    out,  # [T, L]
    count,
    P,
    L,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    task = (tl.program_id(0) // count).to(tl.int64)
    p = tl.program_id(0) % count
    start = tl.load(starts + p)
    size = tl.load(sizes + p)
    to = out + task * L + tl.load(slots + p)
    each = tl.load(elements + p) != 0
    total = tl.zeros([BLOCK], dtype=lam.dtype.element_ty)
    for i0 in range(0, size, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at = task * P + start + i
        g = -tl.load(lam + at, mask=i < size, other=0.0) * tl.load(u + at, mask=i < size, other=0.0)
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
    gradient: Any,
    momentum: Any,
    rates: Operand | None,
    index: Any,
    out: Any,
    kept: Any,
    mu: float,
    decay: float,
) -> None:
    """kept = u = [mu momentum +] gradient + decay theta; out = theta - rates u. `kept` may be
    `momentum`."""
    size = index.numel()
    emit(
        _update,
        tasks * blocks(size, FLAT),
        theta=theta.at,
        theta_task=theta.stride,
        gradient=gradient,
        momentum=momentum,
        rates=None if rates is None else rates.at,
        rates_task=0 if rates is None else rates.stride,
        index=index,
        out=out,
        kept=kept,
        P=size,
        MU=mu,
        DECAY=decay,
        BLOCK=FLAT,
    )


def direction(emit: Recorder, tasks: int, lam: Any, mbar: Any, rates: Operand, index: Any, out: Any) -> None:
    """out = mbar - rates lam, zero where nothing is adapted."""
    size = index.numel()
    emit(
        _direction,
        tasks * blocks(size, FLAT),
        lam=lam,
        mbar=mbar,
        rates=rates.at,
        rates_task=rates.stride,
        index=index,
        out=out,
        P=size,
        BLOCK=FLAT,
    )


def adjoint(
    emit: Recorder, tasks: int, lam: Any, v: Any, mbar: Any, index: Any, mu: float, decay: float
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


def rate_gradient(emit: Recorder, tasks: int, lam: Any, u: Any, table: Any, out: Any, add: bool) -> None:
    """out [T, L] = [out] - lam u, summed over a parameter's elements where they share a rate.

    `table` is [4, adapted parameters]: start in P, size, slot in L, whether there is one rate an
    element.
    """
    count = table.shape[1]
    emit(
        _rate_gradient,
        tasks * count,
        lam=lam,
        u=u,
        starts=table[0],
        sizes=table[1],
        slots=table[2],
        elements=table[3],
        out=out,
        count=count,
        P=lam.shape[1],
        L=out.shape[-1],
        ADD=add,
        BLOCK=FLAT,
    )
