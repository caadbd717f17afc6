"""The rows of numbers that the kernels of update rules read, made once a call.

In float64: 1 - beta^(k+1) of float32 numbers would have few right digits.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit
from fastmeta.kernels.launch import Recorder, blocks
from fastmeta.kernels.update_rules.numbers import BETA1, BETA2, C1, C2, ROW, STEP
from fastmeta.update_rules.rule import NUMBERS

_BLOCK = 32


@jit
def rule_numbers(
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
        rule_numbers,
        blocks(steps, _BLOCK),
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
