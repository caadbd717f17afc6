"""The numbers of an update rule in the rows that kernels read, one row for each inner step.

A row is made once a call (`make_rows`), in float64: 1 - beta^(k+1) of float32 numbers would have
few right digits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit
from fastmeta.kernels.launch import Recorder
from fastmeta.update_rules.rule import NUMBERS

# Where a number stands in a row.
MOMENTUM = tl.constexpr(NUMBERS.index("momentum"))
DAMPENING = tl.constexpr(NUMBERS.index("dampening"))
WEIGHT_DECAY = tl.constexpr(NUMBERS.index("weight_decay"))
BETA1 = tl.constexpr(NUMBERS.index("beta1"))
BETA2 = tl.constexpr(NUMBERS.index("beta2"))
ALPHA = tl.constexpr(NUMBERS.index("alpha"))
EPS = tl.constexpr(NUMBERS.index("eps"))
EPS_ROOT = tl.constexpr(NUMBERS.index("eps_root"))
LR_DECAY = tl.constexpr(NUMBERS.index("lr_decay"))
START = tl.constexpr(NUMBERS.index("initial_accumulator_value"))
CLIP_VALUE = tl.constexpr(NUMBERS.index("clip_value"))
CLIP_NORM = tl.constexpr(NUMBERS.index("clip_norm"))

# Behind them 1 - number of each, and then:
COUNT = tl.constexpr(len(NUMBERS))
C1 = tl.constexpr(2 * len(NUMBERS))  # 1 - beta1^(k+1)
C2 = tl.constexpr(2 * len(NUMBERS) + 1)  # 1 - beta2^(k+1)
BY_BETA1 = tl.constexpr(2 * len(NUMBERS) + 2)  # the derivative of C1 by beta1
BY_BETA2 = tl.constexpr(2 * len(NUMBERS) + 3)
STEP = tl.constexpr(2 * len(NUMBERS) + 4)  # k
#: Numbers in a row.
ROW = 2 * len(NUMBERS) + 5

_BLOCK = 32


class Form(NamedTuple):
    """What is known of a rule, and of its call at one step, when a kernel is compiled."""

    kind: str
    nesterov: bool
    centered: bool
    # numbers that are there, and of any effect
    momentum: bool
    weight_decay: bool
    eps_root: bool
    clip_value: bool
    clip_norm: bool
    states: int  # parts of the state
    learned: int  # bit i: the gradient of number i is wanted
    first: bool  # k is 0: the state is the one before any step


@jit
def number(row, N: tl.constexpr):
    """A number of the step."""
    return tl.load(row + N)


@jit
def rest(row, N: tl.constexpr):
    """1 - the number, rounded once."""
    return tl.load(row + COUNT + N)


@jit
def add(parts, gradient, mask, N: tl.constexpr, FORM: tl.constexpr):
    """parts[N] = the sum of dJ/dnumber over a block, where that is wanted. To be called once a
    number at most: parts are zero before."""
    if (tl.constexpr(FORM.learned) >> N) & 1:
        tl.store(parts + N, tl.sum(tl.where(mask, gradient, 0.0), axis=0))


@jit
def root(x):
    """The square root, rounded as IEEE says: the quick one takes small float32 numbers for zero."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@jit
def decayed(theta, g, row, FORM: tl.constexpr):
    """g + omega theta."""
    if FORM.weight_decay:
        return g + number(row, WEIGHT_DECAY) * theta
    else:
        return g


@jit
def decayed_back(theta, lam, to_d, row, parts, mask, FORM: tl.constexpr):
    """lambda with the share that passes through the theta of `decayed`."""
    if FORM.weight_decay:
        add(parts, to_d * theta, mask, WEIGHT_DECAY, FORM)
        return lam + number(row, WEIGHT_DECAY) * to_d
    else:
        return lam


@jit
def _rows(
    plain,  # [numbers] float64
    given,  # [K, numbers], the learned ones; or None
    out,  # [K, ROW]
    K,
    COUNT: tl.constexpr,
    ROW: tl.constexpr,
    LEARNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the numbers of each step and what follows from them alone; a program makes BLOCK
    rows."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < K
    to = out + k * ROW
    for i in tl.static_range(COUNT):
        if (tl.constexpr(LEARNED) >> i) & 1:
            value = tl.load(given + k * COUNT + i, mask=mask, other=0.0).to(tl.float64)
        else:
            value = tl.load(plain + i) + tl.zeros([BLOCK], tl.float64)
        tl.store(to + i, value.to(out.dtype.element_ty), mask=mask)
        tl.store(to + COUNT + i, (1.0 - value).to(out.dtype.element_ty), mask=mask)
        if i == BETA1 or i == BETA2:  # noqa: SIM109
            power, base, left = tl.zeros([BLOCK], tl.float64) + 1.0, value, k
            for _ in tl.static_range(BITS):
                power = tl.where(left & 1 == 1, power * base, power)
                base *= base
                left >>= 1
            at = C1 if i == BETA1 else C2
            tl.store(to + at, (1.0 - power * value).to(out.dtype.element_ty), mask=mask)
            slope = -(k + 1).to(tl.float64) * power
            tl.store(to + at + 2, slope.to(out.dtype.element_ty), mask=mask)
    tl.store(to + STEP, k.to(out.dtype.element_ty), mask=mask)


def make_rows(emit: Recorder, plain: Tensor, given: Tensor | None, learned: int, out: Tensor) -> None:
    """out [K, ROW] from the plain numbers [numbers], in float64, and the learned ones [K, numbers],
    whose bits are set in `learned`."""
    steps = out.shape[0]
    emit(
        _rows,
        -(-steps // _BLOCK),
        plain=plain,
        given=given,
        out=out,
        K=steps,
        COUNT=len(NUMBERS),
        ROW=ROW,
        LEARNED=learned,
        BITS=max(steps.bit_length(), 1),
        BLOCK=_BLOCK,
    )
