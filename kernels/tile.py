"""What the kernels with matrix products share: the product of two tiles, and where a gradient
goes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; PRECISION is "ieee", "tf32", "tf32x3" or "bf16".

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


@triton.jit
def deliver(
    gradient,
    at,
    mask,
    task,
    to,
    to_task,
    base,
    base_task,
    rate,
    rate_task,
):
    """to = [base +] gradient, or base - rate * gradient: the sink of a parameter's gradient; see
    `passes.Sink`."""
    if rate is not None:
        gradient = -tl.load(rate + task * rate_task) * gradient
    if base is not None:
        gradient += tl.load(base + task * base_task + at, mask=mask, other=0.0)
    tl.store(to + task * to_task + at, gradient, mask=mask)
