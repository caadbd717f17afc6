"""Losses that compare output and target element by element: value, gradients and their tangents,
one program a task.

Output z and target y are [T, N examples, E elements]. Formulas and denominators: docs/losses.md.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from fastmeta.kernels.functions import sigmoid, softplus
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import LOSS_BYTES, REGISTERS, Recorder, power
from fastmeta.kernels.losses import Results


@jit
def _terms(z, y, q, KIND: tl.constexpr, BETA: tl.constexpr):
    """(l, dl/dz, dl/dy) of one element; q is pos_weight."""
    d = z - y
    if KIND == "mse":
        l, lz, ly = d * d, 2.0 * d, -2.0 * d
    elif KIND == "l1":
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)
        l, lz, ly = tl.abs(d), sign, -sign
    elif KIND == "bce_with_logits":
        s = softplus(-z)
        a = 1.0 + (q - 1.0) * y
        l, lz, ly = (1.0 - y) * z + a * s, 1.0 - y - a * sigmoid(-z), -z + (q - 1.0) * s
    elif KIND == "smooth_l1":
        clipped = tl.minimum(tl.maximum(d, -BETA), BETA)
        l, lz, ly = clipped * (d - 0.5 * clipped) / BETA, clipped / BETA, -clipped / BETA
    elif KIND == "huber":
        clipped = tl.minimum(tl.maximum(d, -BETA), BETA)
        l, lz, ly = clipped * (d - 0.5 * clipped), clipped, -clipped
    else:
        tl.static_assert(False, "_terms: no such loss")
    return l, lz, ly


@jit
def _second(z, y, q, KIND: tl.constexpr, BETA: tl.constexpr):
    """(d2l/dz2, d2l/dzdy) of one element."""
    d = z - y
    if KIND == "mse":
        lzz, lzy = tl.zeros_like(d) + 2.0, tl.zeros_like(d) - 2.0
    elif KIND == "l1":
        lzz, lzy = tl.zeros_like(d), tl.zeros_like(d)
    elif KIND == "bce_with_logits":
        r = sigmoid(-z)
        lzz, lzy = (1.0 + (q - 1.0) * y) * r * (1.0 - r), -1.0 - (q - 1.0) * r
    elif KIND == "smooth_l1":
        inside = tl.where(tl.abs(d) < BETA, 1.0, 0.0).to(d.dtype)
        lzz, lzy = inside / BETA, -inside / BETA
    elif KIND == "huber":
        inside = tl.where(tl.abs(d) < BETA, 1.0, 0.0).to(d.dtype)
        lzz, lzy = inside, -inside
    else:
        tl.static_assert(False, "_second: no such loss")
    return lzz, lzy


@jit
def _tile(z, y, rz, pos_weight, factors, task, n, e, N, E):
    """(z, y, rz or z, pos_weight, factor) of a tile, and where it is."""
    mask = (n < N)[:, None] & (e < E)[None, :]
    at = task * N * E + n[:, None] * E + e[None, :]
    zs = tl.load(z + at, mask=mask, other=0.0)
    ys = tl.load(y + at, mask=mask, other=0.0)
    q = tl.zeros_like(zs) + 1.0
    if pos_weight is not None:
        q = q * tl.load(pos_weight + e, mask=e < E, other=1.0)[None, :]
    moved = zs
    if rz is not None:
        moved = tl.load(rz + at, mask=mask, other=0.0)
    f = tl.zeros_like(zs) + 1.0
    if factors is not None:
        f = f * tl.load(factors + e, mask=e < E, other=0.0)[None, :]
    return zs, ys, moved, q, f, at, mask


@jit
def _sums(
    z, y, rz, pos_weight, factors, task, n, N, E, KIND: tl.constexpr, BETA: tl.constexpr, BE: tl.constexpr
):
    """Of each example, the sum of its losses, or of their tangents along rz."""
    sums = tl.zeros_like(n).to(z.dtype.element_ty)
    for e0 in range(0, E, BE):
        zs, ys, moved, q, f, _, mask = _tile(
            z, y, rz, pos_weight, factors, task, n, e0 + tl.arange(0, BE), N, E
        )
        l, lz, _ = _terms(zs, ys, q, KIND, BETA)
        if rz is not None:
            l = lz * moved
        sums += tl.sum(tl.where(mask, l * f, 0.0), axis=1)
    return sums


@jit
@varies("N")
def loss(
    z,  # [T, N, E]
    y,  # [T, N, E]
    rz,  # [T, N, E]; or None: values and gradients; else the gradients' tangents along it
    weights,  # [T, N]; or None
    pos_weight,  # [E]; or None
    factors,  # [E], of each element's term; or None
    task_weights,  # [T]; or None
    results: Results,
    N,
    E,
    KIND: tl.constexpr,
    BETA: tl.constexpr,
    HOW: tl.constexpr,  # a `Reduction`
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Everything of one task."""
    task = tl.program_id(0).to(tl.int64)
    dtype = z.dtype.element_ty
    D = tl.cast(N * E, dtype)
    if HOW.sum:
        D = tl.cast(1, dtype)
    elif HOW.by_weights and weights is not None:
        count = tl.zeros([BN], dtype=dtype)
        largest = tl.zeros([BN], dtype=dtype)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            w = tl.load(weights + task * N + n, mask=n < N, other=0.0)
            count += w
            largest = tl.maximum(largest, tl.abs(w))
        D = tl.sum(count, axis=0) * E
        # nothing counts where there are no weights at all
        D = tl.where(tl.max(largest, axis=0) < tl.full([], HOW.tiny, dtype), float("inf"), D)
    sums = tl.zeros([BN], dtype=dtype)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        each = _sums(z, y, rz, pos_weight, factors, task, n, N, E, KIND, BETA, BE)
        if weights is not None:
            each *= tl.load(weights + task * N + n, mask=n < N, other=0.0)
        sums += each
    total = tl.sum(sums, axis=0) / D
    if results.value is not None:
        part = HOW.step * total
        if HOW.add_value:
            part += tl.load(results.value + task)
        tl.store(results.value + task, part)
    scale = HOW.scale / D
    if task_weights is not None:
        scale *= tl.load(task_weights + task)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        w = tl.zeros([BN], dtype=dtype) + scale
        if weights is not None:
            w *= tl.load(weights + task * N + n, mask=n < N, other=0.0)
        if results.dz is not None:
            for e0 in range(0, E, BE):
                e = e0 + tl.arange(0, BE)
                zs, ys, moved, q, f, at, mask = _tile(z, y, rz, pos_weight, factors, task, n, e, N, E)
                _, gz, gy = _terms(zs, ys, q, KIND, BETA)
                if rz is not None:
                    lzz, lzy = _second(zs, ys, q, KIND, BETA)
                    gz = lzz * moved
                    gy = lzy * moved
                f *= w[:, None]
                tl.store(results.dz + at, gz * f, mask=mask)
                if results.dy is not None:
                    gy *= f
                    if HOW.add:
                        gy += tl.load(results.dy + at, mask=mask, other=0.0)
                    tl.store(results.dy + at, gy, mask=mask)
        if results.dweights is not None:
            each = _sums(z, y, rz, pos_weight, factors, task, n, N, E, KIND, BETA, BE)
            if HOW.by_weights and not HOW.sum:
                each -= E * total
            each *= scale
            if HOW.add:
                each += tl.load(results.dweights + task * N + n, mask=n < N, other=0.0)
            tl.store(results.dweights + task * N + n, each, mask=n < N)


def emit(
    record: Recorder,
    tasks: int,
    examples: int,
    elements: int,
    z: Tensor,
    **arguments: Any,
) -> None:
    """The launch for all tasks; `arguments` are those of `loss` but for sizes."""
    tile = LOSS_BYTES // z.element_size()
    be = power(elements, 1, 256)
    bn = power(examples, 1, tile // be)
    record(loss, tasks, z=z, N=examples, E=elements, BN=bn, BE=be, registers=REGISTERS, **arguments)
