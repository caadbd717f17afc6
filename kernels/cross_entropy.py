"""Cross-entropy of outputs z [T, N examples, P positions, C classes]: value, gradients and their
tangents, one program a task.

The target y is an index [T, N, P], or probabilities [T, N, P, C]. Formulas and denominators:
docs/losses.md. A class index that is out of range reads nothing: it makes its task NaN.

Helpers take what belongs to their task alone, and rows n of positions, of which there are R.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import LOSS_BYTES, REGISTERS, Recorder, power
from fastmeta.kernels.losses import Results


class Target(NamedTuple):
    """What a target is, as one argument that is known when a kernel is compiled."""

    indices: bool  # else probabilities
    smoothing: float
    ignore: int  # an index that counts for nothing


@jit
def _target(y, class_weights, n, c, R, C, TARGET: tl.constexpr, like):
    """q, the class weight of each entry, and what these classes add to a position's share of a
    mean's denominator."""
    mask = (n < R)[:, None] & (c < C)[None, :]
    cw = tl.zeros_like(like) + 1.0
    if class_weights is not None:
        cw = cw * tl.load(class_weights + c, mask=c < C, other=0.0)[None, :]
    if TARGET.indices:
        index = tl.load(y + n, mask=n < R, other=TARGET.ignore)
        counts = (index != TARGET.ignore) & (n < R)
        hit = index[:, None] == c[None, :]
        rest = TARGET.smoothing / tl.cast(C, like.dtype)
        smoothed = tl.where(hit, tl.zeros_like(like) + (1.0 - TARGET.smoothing), 0.0) + rest
        q = tl.where(counts[:, None] & mask, cw * smoothed, 0.0)
        share = tl.sum(tl.where(hit & counts[:, None] & mask, cw, 0.0), axis=1)
        wrong = counts & ((index < 0) | (index >= C))
        share = tl.where(wrong, float("nan"), share)
    else:
        p = tl.load(y + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        rest = TARGET.smoothing / tl.cast(C, like.dtype)
        q = tl.where(mask, cw * ((1.0 - TARGET.smoothing) * p + rest), 0.0)
        share = tl.sum(tl.where(mask & (c == 0)[None, :], tl.zeros_like(like) + 1.0, 0.0), axis=1)
    return q, cw, share


@jit
def _logits(z, n, c, R, C):
    """Rows that are not there are zero, classes that are not there minus infinity."""
    mask = (n < R)[:, None] & (c < C)[None, :]
    zs = tl.load(z + n[:, None] * C + c[None, :], mask=mask, other=-float("inf"))
    return tl.where((n < R)[:, None], zs, 0.0), mask


@jit
def _log_sum(z, n, R, C, BN: tl.constexpr, BC: tl.constexpr):
    """(the largest logit, the logarithm of the sum of all exp(z - it)) of each position."""
    dtype = z.dtype.element_ty
    top = tl.full([BN], -float("inf"), dtype)
    for c0 in range(0, C, BC):
        zs, _ = _logits(z, n, c0 + tl.arange(0, BC), R, C)
        top = tl.maximum(top, tl.max(zs, axis=1))
    total = tl.zeros([BN], dtype)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        zs, _ = _logits(z, n, c, R, C)
        total += tl.sum(tl.where((c < C)[None, :], tl.exp(zs - top[:, None]), 0.0), axis=1)
    return top, tl.log(total)


@jit
def _positions(
    z,
    y,
    rz,
    class_weights,
    n,
    R,
    C,
    TARGET: tl.constexpr,  # a `Target`
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Of each position: `_log_sum`, <p, rz>, the loss -sum q log p or its tangent -sum q (rz - <p,
    rz>), sum q, and its share of a mean's denominator."""
    dtype = z.dtype.element_ty
    top, log_sum = _log_sum(z, n, R, C, BN, BC)
    center = tl.zeros([BN], dtype)
    if rz is not None:
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            zs, mask = _logits(z, n, c, R, C)
            moved = tl.load(rz + n[:, None] * C + c[None, :], mask=mask, other=0.0)
            center += tl.sum(tl.exp(zs - top[:, None] - log_sum[:, None]) * moved, axis=1)
    each = tl.zeros([BN], dtype)
    mass = tl.zeros([BN], dtype)
    share = tl.zeros([BN], dtype)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        zs, mask = _logits(z, n, c, R, C)
        terms = zs - top[:, None] - log_sum[:, None]
        q, _, more = _target(y, class_weights, n, c, R, C, TARGET, terms)
        if rz is not None:
            terms = tl.load(rz + n[:, None] * C + c[None, :], mask=mask, other=0.0) - center[:, None]
        each -= tl.sum(q * tl.where(q != 0, terms, 0.0), axis=1)
        mass += tl.sum(q, axis=1)
        share += more
    return top, log_sum, center, each, mass, share


@jit
@varies("N")
def loss(
    z,  # [T, N, P, C]
    y,  # [T, N, P] or [T, N, P, C]
    rz,  # [T, N, P, C]; or None: values and gradients; else the gradients' tangents along it
    weights,  # [T, N]; or None
    class_weights,  # [C]; or None
    task_weights,  # [T]; or None
    results: Results,
    N,
    P,
    C,
    POSITIONS: tl.constexpr,  # P > 1
    TARGET: tl.constexpr,  # a `Target`
    HOW: tl.constexpr,  # a `Reduction`
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Everything of one task."""
    task = tl.program_id(0).to(tl.int64)
    dtype = z.dtype.element_ty
    R = N * P
    z += task * R * C
    y += task * R if TARGET.indices else task * R * C
    if rz is not None:
        rz += task * R * C
    if weights is not None:
        weights += task * N
    shares = tl.zeros([BN], dtype=dtype)
    sums = tl.zeros([BN], dtype=dtype)
    largest = tl.zeros([BN], dtype=dtype)
    for n0 in range(0, R, BN):
        n = n0 + tl.arange(0, BN)
        _, _, _, each, _, share = _positions(z, y, rz, class_weights, n, R, C, TARGET, BN, BC)
        if weights is not None:
            w = tl.load(weights + n // P, mask=n < R, other=0.0)
            each *= w
            if HOW.by_weights:
                share *= w
                largest = tl.maximum(largest, tl.abs(w))
        sums += each
        shares += share
    D = tl.sum(shares, axis=0)
    if HOW.sum:
        D = D * 0.0 + 1.0  # NaN of a wrong index stays
    elif HOW.by_weights and weights is not None:  # nothing counts where there are no weights at all
        D = tl.where(tl.max(largest, axis=0) < tl.full([], HOW.tiny, dtype), D + float("inf"), D)
    total = tl.sum(sums, axis=0) / D
    if results.value is not None:
        part = HOW.step * total
        if HOW.add_value:
            part += tl.load(results.value + task)
        tl.store(results.value + task, part)
    scale = HOW.scale / D
    if task_weights is not None:
        scale *= tl.load(task_weights + task)
    for n0 in range(0, R, BN):
        n = n0 + tl.arange(0, BN)
        top, log_sum, center, each, mass, share = _positions(z, y, rz, class_weights, n, R, C, TARGET, BN, BC)
        w = tl.zeros([BN], dtype=dtype) + scale
        if weights is not None:
            w *= tl.load(weights + n // P, mask=n < R, other=0.0)
        if TARGET.indices:  # nothing depends on an ignored one, not even where all are and w is infinite
            w = tl.where(tl.load(y + n, mask=n < R, other=TARGET.ignore) != TARGET.ignore, w, 0.0)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            at = n[:, None] * C + c[None, :]
            zs, mask = _logits(z, n, c, R, C)
            log_p = zs - top[:, None] - log_sum[:, None]
            q, cw, _ = _target(y, class_weights, n, c, R, C, TARGET, log_p)
            if rz is None:
                gz = tl.exp(log_p) * mass[:, None] - q
                gy = tl.where(mask, log_p, 0.0)
            else:
                gy = tl.load(rz + at, mask=mask, other=0.0) - center[:, None]
                gz = tl.exp(log_p) * gy * mass[:, None]
            at += task * R * C
            if results.dz is not None:
                tl.store(results.dz + at, gz * w[:, None], mask=mask)
            if results.dy is not None:
                gy = -(1.0 - TARGET.smoothing) * cw * gy * w[:, None]
                if HOW.add:
                    gy += tl.load(results.dy + at, mask=mask, other=0.0)
                tl.store(results.dy + at, gy, mask=mask)
        if results.dweights is not None and not POSITIONS:
            if HOW.by_weights and not HOW.sum:
                each -= share * total
            each *= scale
            if HOW.add:
                each += tl.load(results.dweights + task * N + n, mask=n < N, other=0.0)
            tl.store(results.dweights + task * N + n, each, mask=n < N)
    if results.dweights is not None and POSITIONS:
        for example in range(N):
            sums = tl.zeros([BN], dtype=dtype)
            for p0 in range(0, P, BN):
                n = example * P + p0 + tl.arange(0, BN)
                _, _, _, each, _, share = _positions(
                    z, y, rz, class_weights, n, (example + 1) * P, C, TARGET, BN, BC
                )
                if HOW.by_weights and not HOW.sum:
                    each -= share * total
                sums += each
            change = tl.sum(sums, axis=0) * scale
            if HOW.add:
                change += tl.load(results.dweights + task * N + example)
            tl.store(results.dweights + task * N + example, change)


def emit(
    record: Recorder,
    tasks: int,
    examples: int,
    positions: int,
    classes: int,
    z: Tensor,
    **arguments: Any,
) -> None:
    """The launch for all tasks; `arguments` are those of `loss` but for sizes."""
    tile = LOSS_BYTES // z.element_size()
    bc = power(classes, 1, tile)
    bn = power(examples * positions, 1, tile // bc)
    record(
        loss,
        tasks,
        registers=REGISTERS,
        z=z,
        N=examples,
        P=positions,
        C=classes,
        POSITIONS=positions > 1,
        BN=bn,
        BC=bc,
        **arguments,
    )
