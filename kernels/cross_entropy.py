"""Cross-entropy of an output [N, C]: value, gradients and their tangents, one program a task.

Formulas and denominators: docs/losses.md. A class index that is out of range reads nothing: it makes its task NaN.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import Recorder, power

#: A row of classes is one tile.
MOST_CLASSES = 8192


@triton.jit
def _target(
    y, class_weights, task, n, c, N, C, INDICES: tl.constexpr, SMOOTHING: tl.constexpr, IGNORE: tl.constexpr, like
):
    """q, the class weight of each entry, and the example's share of a mean's denominator."""
    mask = (n < N)[:, None] & (c < C)[None, :]
    cw = tl.zeros_like(like) + 1.0
    if class_weights is not None:
        cw = cw * tl.load(class_weights + c, mask=c < C, other=0.0)[None, :]
    if INDICES:
        index = tl.load(y + task * N + n, mask=n < N, other=IGNORE)
        counts = (index != IGNORE) & (n < N)
        hit = index[:, None] == c[None, :]
        smoothed = tl.where(hit, tl.zeros_like(like) + (1.0 - SMOOTHING), 0.0) + SMOOTHING / tl.cast(C, like.dtype)
        q = tl.where(counts[:, None] & mask, cw * smoothed, 0.0)
        share = tl.sum(tl.where(hit & counts[:, None] & mask, cw, 0.0), axis=1)
        wrong = counts & ((index < 0) | (index >= C))
        share = tl.where(wrong, float("nan"), share)
    else:
        p = tl.load(y + task * N * C + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        q = tl.where(mask, cw * ((1.0 - SMOOTHING) * p + SMOOTHING / tl.cast(C, like.dtype)), 0.0)
        share = tl.where(n < N, 1.0, 0.0).to(like.dtype)
    return q, cw, share


@triton.jit
def _log_softmax(z, task, n, c, N, C):
    mask = (n < N)[:, None] & (c < C)[None, :]
    zs = tl.load(z + task * N * C + n[:, None] * C + c[None, :], mask=mask, other=-float("inf"))
    zs = tl.where((n < N)[:, None], zs, 0.0)
    zs = zs - tl.max(zs, axis=1)[:, None]
    return zs - tl.log(tl.sum(tl.exp(zs), axis=1))[:, None], mask


@triton.jit
def _example(log_p, q, moved):
    """The loss of each example, or its tangent: -sum q log p, -sum q (rz - <p, rz>)."""
    terms = log_p
    if moved is not None:
        terms = moved
    return -tl.sum(q * tl.where(q != 0, terms, 0.0), axis=1)


@triton.jit(do_not_specialize=["N"])
def loss(
    z,  # [T, N, C]
    y,  # [T, N] or [T, N, C]
    rz,  # None: values and gradients; else the gradients' tangents along it
    weights,  # [T, N]
    class_weights,  # [C]
    task_weights,  # [T]
    value,  # [T]
    dz,
    dy,
    dweights,
    N,
    C,
    INDICES: tl.constexpr,
    SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr,
    SUM: tl.constexpr,
    BY_WEIGHTS: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    ADD_VALUE: tl.constexpr,
    ADD: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Everything of one task."""
    task = tl.program_id(0).to(tl.int64)
    dtype = z.dtype.element_ty
    c = tl.arange(0, BC)
    shares = tl.zeros([BN], dtype=dtype)
    sums = tl.zeros([BN], dtype=dtype)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        log_p, mask = _log_softmax(z, task, n, c, N, C)
        q, _, share = _target(y, class_weights, task, n, c, N, C, INDICES, SMOOTHING, IGNORE, log_p)
        if rz is None:
            each = _example(log_p, q, None)
        else:
            moved = tl.load(rz + task * N * C + n[:, None] * C + c[None, :], mask=mask, other=0.0)
            moved = moved - tl.sum(tl.exp(log_p) * moved, axis=1)[:, None]
            each = _example(log_p, q, moved)
        if weights is not None:
            w = tl.load(weights + task * N + n, mask=n < N, other=0.0)
            each *= w
            if BY_WEIGHTS:
                share *= w
        sums += each
        shares += share
    D = tl.sum(shares, axis=0)
    if SUM:
        D = D * 0.0 + 1.0  # NaN of a wrong index stays
    total = tl.sum(sums, axis=0) / D
    if value is not None:
        part = STEP * total
        if ADD_VALUE:
            part += tl.load(value + task)
        tl.store(value + task, part)
    scale = SCALE / D
    if task_weights is not None:
        scale *= tl.load(task_weights + task)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        at = task * N * C + n[:, None] * C + c[None, :]
        log_p, mask = _log_softmax(z, task, n, c, N, C)
        q, cw, share = _target(y, class_weights, task, n, c, N, C, INDICES, SMOOTHING, IGNORE, log_p)
        p = tl.exp(log_p)
        w = tl.zeros([BN], dtype=dtype) + scale
        if weights is not None:
            w *= tl.load(weights + task * N + n, mask=n < N, other=0.0)
        mass = tl.sum(q, axis=1)[:, None]
        if rz is None:
            gz = p * mass - q
            gy = tl.where(mask, log_p, 0.0)
            each = _example(log_p, q, None)
        else:
            moved = tl.load(rz + at, mask=mask, other=0.0)
            moved = moved - tl.sum(p * moved, axis=1)[:, None]
            gz = p * moved * mass
            gy = moved
            each = _example(log_p, q, moved)
        if dz is not None:
            tl.store(dz + at, gz * w[:, None], mask=mask)
        if dy is not None:
            gy = -(1.0 - SMOOTHING) * cw * gy * w[:, None]
            if ADD:
                gy += tl.load(dy + at, mask=mask, other=0.0)
            tl.store(dy + at, gy, mask=mask)
        if dweights is not None:
            if BY_WEIGHTS and not SUM:
                each -= share * total
            each *= scale
            if ADD:
                each += tl.load(dweights + task * N + n, mask=n < N, other=0.0)
            tl.store(dweights + task * N + n, each, mask=n < N)


def emit(record: Recorder, tasks: int, examples: int, classes: int, **arguments: Any) -> None:
    """The launch for all tasks; `arguments` are those of `loss` but for sizes."""
    bc = power(classes, 1, MOST_CLASSES)
    bn = power(examples, 1, max(1, 1024 // bc))
    record(loss, tasks, N=examples, C=classes, BN=bn, BC=bc, **arguments)
