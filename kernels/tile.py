"""What the kernels with matrix products share: the product of two tiles [M, K] and [K, N], and
where the gradient of a parameter goes."""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.jit import jit
from fastmeta.kernels.passes import Target


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] + a [M, K] b [K, N]; PRECISION is "ieee", "tf32", "tf32x3" or "bf16".

    "bf16_rounded" is the same as "bf16" for Triton's interpreter, which multiplies no bfloat16.
    """
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "bf16_rounded":
        a = a.to(tl.bfloat16).to(tl.float32)
        b = b.to(tl.bfloat16).to(tl.float32)
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@jit
def deliver(gradient, at, mask, task, target: Target):
    """Store the gradient of a task's parameter: to = [base +] gradient, or base - rate * gradient.

    Args:
        gradient: a block of any shape.
        at: of that shape: the places within the parameter, of which `mask` are there.
        task: whose.
        target: where to; not nowhere.
    """
    if target.rate is not None:
        gradient = -tl.load(target.rate.at + task * target.rate.stride) * gradient
    if target.base is not None:
        gradient += tl.load(target.base.at + task * target.base.stride + at, mask=mask, other=0.0)
    tl.store(target.to.at + task * target.to.stride + at, gradient, mask=mask)
