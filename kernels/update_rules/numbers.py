"""The numbers of an update rule in the rows that kernels read, one row for each inner step:
`kernels/rule_numbers.py` makes them."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from fastmeta.kernels.jit import jit
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
