"""A convolution of few taps and the norm behind it, with no image between them.

A patch is what one pixel of the convolution is made of: I = taps * C numbers of its input. Let p be
a patch less the task's mean patch; a norm does not notice. With Z = sum p p^T over all pixels, what
it sums over them follows from the weight W [I, O] alone: sum x^2 = W^T Z W and sum rx x = V^T Z W;
and with A = sum p dy^T also sum dy x = W^T A and sum dy rx = V^T A. Z is made in float64, since W^T
Z W may cancel. See docs/norms.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastmeta.kernels.elementwise import finish
from fastmeta.kernels.tile import deliver, dot


@triton.jit
def _patches(
    x,  # images [H, W, C] of a task
    m,  # windows, of M
    q,  # pixel of the window
    i,  # numbers of the patch
    M,
    OH,  # windows of an image
    OW,
    H,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WH: tl.constexpr,  # of a window
    WW: tl.constexpr,
):
    """[m, i] or [i, m], as the two indices stand."""
    tap = i // C
    h = (m // OW % OH * WH + q // WW) * SH - PH + tap // KW
    w = (m % OW * WW + q % WW) * SW - PW + tap % KW
    here = (m < M) & (i < KH * KW * C) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return tl.load(x + ((m // (OH * OW) * H + h) * W + w) * C + i % C, mask=here, other=0.0)


@triton.jit
def _weight(w, i, o, I: tl.constexpr, O):
    """[I, O], as a product takes it, of a weight [O, I]."""
    return tl.load(w + o[None, :] * I + i[:, None], mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)


@triton.jit(do_not_specialize=["M", "CHUNK", "chunks"])
def patch_moments(
    x,
    # float64 [T, chunks, I, BI + 2]: sums of products of one number with all, of one, its origin
    parts,
    M,  # pixels
    CHUNK,
    chunks,
    OH,
    OW,
    H,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """Over one chunk of a task's pixels, for one number of the patch; all less the patch in the
    middle of the first
    image: far from it, the products less those of the means would cancel."""
    I: tl.constexpr = KH * KW * C
    first = tl.program_id(0) % I
    chunk = tl.program_id(0) // I % chunks
    task = (tl.program_id(0) // (I * chunks)).to(tl.int64)
    images = x + task * (M // (OH * OW)) * (H * W * C)
    i = tl.arange(0, BI)[None, :]
    one_by_one = tl.zeros([1, 1], tl.int32)
    j = one_by_one + first
    origin = one_by_one + OH // 2 * OW + OW // 2
    origins = _patches(images, origin, 0, i, M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, 1, 1).to(tl.float64)
    own = _patches(images, origin, 0, j, M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, 1, 1).to(tl.float64)
    products = tl.zeros([BM, BI], tl.float64)
    total = tl.zeros([BM, 1], tl.float64)
    for m0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M), BM):
        m = m0 + tl.arange(0, BM)[:, None]
        p = _patches(images, m, 0, i, M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, 1, 1).to(tl.float64)
        one = _patches(images, m, 0, j, M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, 1, 1).to(tl.float64)
        one = tl.where(m < M, one - own, 0.0)
        products += one * (p - origins)
        total += one
    to = parts + ((task * chunks + chunk) * I + first) * (BI + 2)
    tl.store(to + tl.arange(0, BI), tl.sum(products, axis=0))
    tl.store(to + BI, tl.sum(total))
    tl.store(to + BI + 1, tl.sum(own))


@triton.jit(do_not_specialize=["M", "chunks"])
def patch_scatter(
    parts,
    middle,  # float64 [T, BI]: the mean patch
    scatter,  # float64 [T, BI, BI]: Z
    M,
    chunks,
    I: tl.constexpr,
    BI: tl.constexpr,
):
    """From the chunks of a task."""
    task = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BI)
    inside = (i < I)[:, None] & (i < I)[None, :]
    products = tl.zeros([BI, BI], tl.float64)
    column = tl.zeros([BI, 1], tl.float64)
    row = tl.zeros([1, BI], tl.float64)
    for chunk in range(chunks):
        begin = parts + (task * chunks + chunk) * I * (BI + 2)
        products += tl.load(begin + i[:, None] * (BI + 2) + i[None, :], mask=inside, other=0.0)
        column += tl.load(begin + i[:, None] * (BI + 2) + BI, mask=(i < I)[:, None], other=0.0)
        row += tl.load(begin + i[None, :] * (BI + 2) + BI, mask=(i < I)[None, :], other=0.0)
    origin = parts + task * chunks * I * (BI + 2) + i[None, :] * (BI + 2) + BI + 1
    tl.store(middle + task * BI + i[None, :], tl.load(origin, mask=(i < I)[None, :], other=0.0) + row / M)
    tl.store(scatter + task * BI * BI + i[:, None] * BI + i[None, :], products - column * (row / M))


@triton.jit
def patch_statistics(
    w,
    w_task,
    bias,  # or None; counts for nothing if it is finite
    bias_task,
    v,  # or None: of the value; else of its tangent
    v_task,
    scatter,
    parts,  # [T, 3, O]: mean (zero, or NaN) and sum of x^2; or the sums of rx (zero) and of rx x
    scattered,  # [T, I, O]: Z W, or Z V
    O,
    I: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    """What the norm sums over pixels, for some channels of a task."""
    tiles = tl.cdiv(O, BO)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, BI)
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    dtype = parts.dtype.element_ty
    weight = _weight(w + task * w_task, i, o, I, O).to(tl.float64)
    moves = w + task * w_task
    if v is not None:
        moves = v + task * v_task
    product = tl.zeros([BI, BO], tl.float64)
    for j in tl.static_range(I):  # no matrix product: Triton 3.6 spills around those of float64 numbers
        row = tl.load(moves + o * I + j, mask=o < O, other=0.0).to(tl.float64)
        product += tl.load(scatter + (task * BI + j) * BI + i)[:, None] * row[None, :]  # Z is symmetric
    mean = tl.zeros([BO], dtype)
    squares = tl.sum(weight * product, axis=0)
    if bias is not None:
        mean += 0.0 * tl.load(bias + task * bias_task + o, mask=o < O, other=0.0)
    if v is None:
        squares = tl.where(squares < 0, 0.0, squares)  # by rounding; NaN stays
    to = parts + task * 3 * O + o
    tl.store(to, mean, mask=o < O)
    tl.store(to + O, squares.to(dtype), mask=o < O)
    inside = (i < I)[:, None] & (o < O)[None, :]
    tl.store(scattered + task * I * O + i[:, None] * O + o[None, :], product.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def patch_norm(
    x,
    w,
    w_task,
    v,
    v_task,
    middle,
    positions,  # [T, M, O] of a max-pool, or None
    coefficients,  # [T, 5, O]: see `channel_coefficients`
    out,
    pre,
    saved,
    curve,
    moved,
    M,  # windows
    O,
    OH,
    OW,
    H,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    PRECISION: tl.constexpr,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
):
    """forward: the largest of the normalised pixels of each window, and where it is; tangent: that
    pixel's tangent."""
    I: tl.constexpr = KH * KW * C
    tiles_o = tl.cdiv(O, BO)
    tiles = tl.cdiv(M, BR) * tiles_o
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile % tiles_o * BO + tl.arange(0, BO)
    m = tile // tiles_o * BR + tl.arange(0, BR)
    i = tl.arange(0, BI)
    mask = (m < M)[:, None] & (o < O)[None, :]
    at = task * M * O + m[:, None] * O + o[None, :]
    images = x + task * (M // (OH * OW)) * (H * W * C)
    dtype = x.dtype.element_ty
    center = tl.load(middle + task * BI + i)[None, :].to(dtype)
    of = coefficients + task * 5 * O + o
    constant = tl.load(of + 4 * O, mask=o < O, other=0.0)[None, :]
    weight = tl.load(of, mask=o < O, other=0.0)[None, :] * _weight(w + task * w_task, i, o, I, O)
    best = tl.zeros([BR, BO], dtype)
    chosen = tl.full([BR, BO], -1, tl.int32)
    if MODE == "tangent":
        weight += tl.load(of + 3 * O, mask=o < O, other=0.0)[None, :] * _weight(v + task * v_task, i, o, I, O)
        if positions is not None:
            chosen = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
    for q in range(WH * WW):
        p = (
            _patches(images, m[:, None], q, i[None, :], M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, WH, WW)
            - center
        )
        y = dot(p, weight, tl.zeros([BR, BO], dtype), PRECISION) + constant
        if positions is None:
            best = y
        elif MODE == "forward":
            take = (y > best) | (y != y) | (chosen < 0)
            best = tl.where(take, y, best)
            chosen = tl.where(take, q, chosen)
        else:
            best = tl.where(chosen == q, y, best)
    if positions is not None and MODE == "forward":
        tl.store(positions + at, chosen.to(positions.dtype.element_ty), mask=mask)
    finish(best, at, mask, out, pre, saved, curve, moved, MODE, ADD, F, C0, C1, SCALE, SHIFT)


@triton.jit(do_not_specialize=["M", "CHUNK", "chunks"])
def patch_products(
    x,
    dy,  # [T, M, O]
    middle,
    positions,
    parts,  # [T, chunks, I + 1, O]: A, and the sum of dy
    M,
    O,
    CHUNK,
    chunks,
    OH,
    OW,
    H,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Over one chunk of a task's windows, for some channels."""
    I: tl.constexpr = KH * KW * C
    tiles = tl.cdiv(O, BO)
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    chunk = tl.program_id(0) // tiles % chunks
    task = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    i = tl.arange(0, BI)
    images = x + task * (M // (OH * OW)) * (H * W * C)
    dtype = dy.dtype.element_ty
    center = tl.load(middle + task * BI + i)[:, None].to(dtype)
    products = tl.zeros([BI, BO], dtype)
    total = tl.zeros([BO], dtype)
    for m0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M), BM):
        m = m0 + tl.arange(0, BM)
        mask = (m < M)[:, None] & (o < O)[None, :]
        at = task * M * O + m[:, None] * O + o[None, :]
        g = tl.load(dy + at, mask=mask, other=0.0)
        total += tl.sum(g, axis=0)
        if positions is not None:
            chosen = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
        for q in tl.range(WH * WW, loop_unroll_factor=UNROLL):
            p = _patches(
                images, m[None, :], q, i[:, None], M, OH, OW, H, W, C, KH, KW, SH, SW, PH, PW, WH, WW
            )
            at_q = g
            if positions is not None:
                at_q = tl.where(chosen == q, g, 0.0)
            products = dot(p - center, at_q, products, PRECISION)
    to = parts + (task * chunks + chunk) * (I + 1) * O
    tl.store(to + i[:, None] * O + o[None, :], products, mask=(i < I)[:, None] & (o < O)[None, :])
    tl.store(to + I * O + o, total, mask=o < O)


@triton.jit(do_not_specialize=["chunks"])
def patch_sums(
    sums,  # what `patch_products` made, of dy or rdy
    w,
    w_task,
    products,  # [T, I, O]: A, or RA
    earlier,  # A, if these are of rdy
    v,
    v_task,
    parts,  # [T, 3, O]: the sums of dy and dy x; or of rdy, rdy x and dy rx
    O,
    chunks,
    I: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    """Chunks together, and with the weights, for some channels of a task."""
    tiles = tl.cdiv(O, BO)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, BI)
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    inside = (i < I)[:, None] & (o < O)[None, :]
    at = i[:, None] * O + o[None, :]
    dtype = parts.dtype.element_ty
    a = tl.zeros([BI, BO], dtype)
    total = tl.zeros([BO], dtype)
    for chunk in range(chunks):
        begin = sums + (task * chunks + chunk) * (I + 1) * O
        a += tl.load(begin + at, mask=inside, other=0.0)
        total += tl.load(begin + I * O + o, mask=o < O, other=0.0)
    tl.store(products + task * I * O + at, a, mask=inside)
    to = parts + task * 3 * O + o
    tl.store(to, total, mask=o < O)
    tl.store(to + O, tl.sum(_weight(w + task * w_task, i, o, I, O) * a, axis=0), mask=o < O)
    if v is not None:
        a = tl.load(earlier + task * I * O + at, mask=inside, other=0.0)
        tl.store(to + 2 * O, tl.sum(_weight(v + task * v_task, i, o, I, O) * a, axis=0), mask=o < O)


@triton.jit
def patch_gradient(
    coefficients,
    of_x,  # [T, I, O]: Z W
    of_dy,  # A
    of_rdy,  # RA, or None
    of_rx,  # Z V, or None
    to,
    to_task,
    base,
    base_task,
    rate,
    rate_task,
    bias_to,
    bias_to_task,
    bias_base,
    bias_base_task,
    bias_rate,
    bias_rate_task,
    O,
    I: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    """The gradients of the convolution's weight [O, I], sum p dx^T with the norm's dx, and of its
    bias: none."""
    tiles = tl.cdiv(O, BO)
    task = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.arange(0, BI)
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    inside = (i < I)[:, None] & (o < O)[None, :]
    at = task * I * O + i[:, None] * O + o[None, :]
    c = coefficients + task * 5 * O + o
    found = tl.load(c, mask=o < O, other=0.0)[None, :] * tl.load(of_x + at, mask=inside, other=0.0)
    found += tl.load(c + O, mask=o < O, other=0.0)[None, :] * tl.load(of_dy + at, mask=inside, other=0.0)
    if of_rdy is not None:
        found += tl.load(c + 2 * O, mask=o < O, other=0.0)[None, :] * tl.load(
            of_rdy + at, mask=inside, other=0.0
        )
        found += tl.load(c + 3 * O, mask=o < O, other=0.0)[None, :] * tl.load(
            of_rx + at, mask=inside, other=0.0
        )
    if to is not None:
        weight_at = o[None, :] * I + i[:, None]
        deliver(found, weight_at, inside, task, to, to_task, base, base_task, rate, rate_task)
    if bias_to is not None:
        nothing = 0.0 * tl.load(c + 4 * O, mask=o < O, other=0.0)  # or NaN
        deliver(
            nothing,
            o,
            o < O,
            task,
            bias_to,
            bias_to_task,
            bias_base,
            bias_base_task,
            bias_rate,
            bias_rate_task,
        )
