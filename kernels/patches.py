"""A convolution of few taps and the norm after it, with no image between them.

The images of a task are [N, H, W, C], the convolution's weight [O, I] with I = taps * C, its output
[M, O] with one row a pixel, pooled to one row a window.

A patch is what one pixel of the convolution is made of: I = taps * C numbers of its input. Let p be
a patch less the task's mean patch; a norm does not notice. With Z = sum p p^T over all pixels, what
it sums over them follows from the weight W [I, O] alone: sum x^2 = W^T Z W and sum rx x = V^T Z W;
and with A = sum p dy^T also sum dy x = W^T A and sum dy rx = V^T A. Z is made in float64, since W^T
Z W may cancel. See docs/norms.md.
"""

from __future__ import annotations

import triton.language as tl

from fastmeta.kernels.elementwise import End, finish
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.passes import Operand, Target
from fastmeta.kernels.tile import deliver, dot
from fastmeta.kernels.windows import Images


@jit
def _patches(x, m, q, i, M, size: Images, C: tl.constexpr, WINDOW: tl.constexpr, POOL: tl.constexpr):
    """Numbers of patches, [m, i] or [i, m], as the two indices stand.

    Args:
        x: images [N, H, W, C] of a task.
        m: windows of pixels, of M.
        q: the pixel of a window.
        i: numbers of a patch.
        M: windows of a task, OH x OW of an image.
        size: of the images.
        C: channels.
        WINDOW: the convolution's `Window`.
        POOL: a `Pool`.
    """
    tap = i // C
    h = (m // size.OW % size.OH * POOL.height + q // POOL.width) * WINDOW.SH - WINDOW.PH + tap // WINDOW.KW
    w = (m % size.OW * POOL.width + q % POOL.width) * WINDOW.SW - WINDOW.PW + tap % WINDOW.KW
    here = (m < M) & (i < WINDOW.KH * WINDOW.KW * C) & (h >= 0) & (h < size.H) & (w >= 0) & (w < size.W)
    row = (m // (size.OH * size.OW) * size.H + h) * size.W + w
    return tl.load(x + row * C + i % C, mask=here, other=0.0)


@jit
def _weight(w, i, o, I: tl.constexpr, O):
    """[I, O], as a product takes it, of a weight [O, I]."""
    return tl.load(w + o[None, :] * I + i[:, None], mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)


@jit
@varies("M", "CHUNK", "chunks")
def patch_moments(
    x,  # [T, N, H, W, C]
    # float64 [T, chunks, I, BI + 2]: sums of products of one number with all, of one, its origin
    parts,
    M,  # pixels
    CHUNK,  # of them
    chunks,
    size: Images,
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # the convolution's `Window`
    POOL: tl.constexpr,  # a `Pool`
    BI: tl.constexpr,
    BM: tl.constexpr,
):
    """Sums over one chunk of a task's pixels, for one number of the patch; all less the patch in
    the middle of the first image: far from it, the products less those of the means would
    cancel."""
    I: tl.constexpr = WINDOW.KH * WINDOW.KW * C
    first = tl.program_id(0) % I
    chunk = tl.program_id(0) // I % chunks
    task = (tl.program_id(0) // (I * chunks)).to(tl.int64)
    images = x + task * (M // (size.OH * size.OW)) * (size.H * size.W * C)
    i = tl.arange(0, BI)[None, :]
    one_by_one = tl.zeros([1, 1], tl.int32)
    j = one_by_one + first
    origin = one_by_one + size.OH // 2 * size.OW + size.OW // 2
    origins = _patches(images, origin, 0, i, M, size, C, WINDOW, POOL).to(tl.float64)
    own = _patches(images, origin, 0, j, M, size, C, WINDOW, POOL).to(tl.float64)
    products = tl.zeros([BM, BI], tl.float64)
    total = tl.zeros([BM, 1], tl.float64)
    for m0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M), BM):
        m = m0 + tl.arange(0, BM)[:, None]
        p = _patches(images, m, 0, i, M, size, C, WINDOW, POOL).to(tl.float64)
        one = _patches(images, m, 0, j, M, size, C, WINDOW, POOL).to(tl.float64)
        one = tl.where(m < M, one - own, 0.0)
        products += one * (p - origins)
        total += one
    to = parts + ((task * chunks + chunk) * I + first) * (BI + 2)
    tl.store(to + tl.arange(0, BI), tl.sum(products, axis=0))
    tl.store(to + BI, tl.sum(total))
    tl.store(to + BI + 1, tl.sum(own))


@jit
@varies("M", "chunks")
def patch_scatter(
    parts,  # float64 [T, chunks, I, BI + 2], of `patch_moments`
    middle,  # float64 [T, BI]: the mean patch
    scatter,  # float64 [T, BI, BI]: Z
    M,  # pixels
    chunks,
    I: tl.constexpr,
    BI: tl.constexpr,
):
    """The mean patch and Z of a task, from its chunks."""
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


@jit
def patch_statistics(
    w: Operand,  # of a task [O, I]
    bias: Operand,  # of a task [O]; or None; counts for nothing if it is finite
    v: Operand,  # as w; None: of the value; else of its tangent
    scatter,  # float64 [T, BI, BI]
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
    weight = _weight(w.at + task * w.stride, i, o, I, O).to(tl.float64)
    moves = w.at + task * w.stride
    if v is not None:
        moves = v.at + task * v.stride
    product = tl.zeros([BI, BO], tl.float64)
    for j in tl.static_range(I):  # no matrix product: Triton 3.6 spills around those of float64 numbers
        row = tl.load(moves + o * I + j, mask=o < O, other=0.0).to(tl.float64)
        product += tl.load(scatter + (task * BI + j) * BI + i)[:, None] * row[None, :]  # Z is symmetric
    mean = tl.zeros([BO], dtype)
    squares = tl.sum(weight * product, axis=0)
    if bias is not None:
        mean += 0.0 * tl.load(bias.at + task * bias.stride + o, mask=o < O, other=0.0)
    if v is None:
        squares = tl.where(squares < 0, 0.0, squares)  # by rounding; NaN stays
    to = parts + task * 3 * O + o
    tl.store(to, mean, mask=o < O)
    tl.store(to + O, squares.to(dtype), mask=o < O)
    inside = (i < I)[:, None] & (o < O)[None, :]
    tl.store(scattered + task * I * O + i[:, None] * O + o[None, :], product.to(dtype), mask=inside)


@jit
@varies("M")
def patch_norm(
    x,  # [T, N, H, W, C]
    w: Operand,  # of a task [O, I]
    v: Operand,  # likewise, of tangent; or None
    middle,  # float64 [T, BI]
    positions,  # [T, M, O] of a max-pool; or None
    coefficients,  # [T, 5, O]: see `channel_coefficients`
    end: End,  # each [T, M, O]
    M,  # windows
    O,
    size: Images,
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # the convolution's `Window`
    POOL: tl.constexpr,  # a `Pool`
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
):
    """forward: the largest of the normalised pixels of each window, and where it is; tangent: that
    pixel's tangent."""
    I: tl.constexpr = WINDOW.KH * WINDOW.KW * C
    tiles_o = tl.cdiv(O, BO)
    tiles = tl.cdiv(M, BR) * tiles_o
    task = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o = tile % tiles_o * BO + tl.arange(0, BO)
    m = tile // tiles_o * BR + tl.arange(0, BR)
    i = tl.arange(0, BI)
    mask = (m < M)[:, None] & (o < O)[None, :]
    at = task * M * O + m[:, None] * O + o[None, :]
    images = x + task * (M // (size.OH * size.OW)) * (size.H * size.W * C)
    dtype = x.dtype.element_ty
    center = tl.load(middle + task * BI + i)[None, :].to(dtype)
    of = coefficients + task * 5 * O + o
    constant = tl.load(of + 4 * O, mask=o < O, other=0.0)[None, :]
    weight = tl.load(of, mask=o < O, other=0.0)[None, :] * _weight(w.at + task * w.stride, i, o, I, O)
    best = tl.zeros([BR, BO], dtype)
    chosen = tl.full([BR, BO], -1, tl.int32)
    if FINISH.mode == "tangent":
        weight += tl.load(of + 3 * O, mask=o < O, other=0.0)[None, :] * _weight(
            v.at + task * v.stride, i, o, I, O
        )
        if positions is not None:
            chosen = tl.load(positions + at, mask=mask, other=0).to(tl.int32)
    for q in range(POOL.height * POOL.width):
        p = _patches(images, m[:, None], q, i[None, :], M, size, C, WINDOW, POOL) - center
        y = dot(p, weight, tl.zeros([BR, BO], dtype), PRECISION) + constant
        if positions is None:
            best = y
        elif FINISH.mode == "forward":
            take = (y > best) | (y != y) | (chosen < 0)
            best = tl.where(take, y, best)
            chosen = tl.where(take, q, chosen)
        else:
            tl.static_assert(FINISH.mode == "tangent", "patch_norm: no such mode")
            best = tl.where(chosen == q, y, best)
    if positions is not None and FINISH.mode == "forward":
        tl.store(positions + at, chosen.to(positions.dtype.element_ty), mask=mask)
    finish(best, at, mask, end, FINISH)


@jit
@varies("M", "CHUNK", "chunks")
def patch_products(
    x,  # [T, N, H, W, C]
    dy,  # [T, M, O]
    middle,  # float64 [T, BI]
    positions,  # [T, M, O] of a max-pool; or None
    parts,  # [T, chunks, I + 1, O]: A, and the sum of dy
    M,  # windows
    O,
    CHUNK,  # of them
    chunks,
    size: Images,
    C: tl.constexpr,
    WINDOW: tl.constexpr,  # the convolution's `Window`
    POOL: tl.constexpr,  # a `Pool`
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
    BM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A and the sum of dy over one chunk of a task's windows, for some channels."""
    I: tl.constexpr = WINDOW.KH * WINDOW.KW * C
    tiles = tl.cdiv(O, BO)
    o = tl.program_id(0) % tiles * BO + tl.arange(0, BO)
    chunk = tl.program_id(0) // tiles % chunks
    task = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    i = tl.arange(0, BI)
    images = x + task * (M // (size.OH * size.OW)) * (size.H * size.W * C)
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
        for q in tl.range(POOL.height * POOL.width, loop_unroll_factor=UNROLL):
            p = _patches(images, m[None, :], q, i[:, None], M, size, C, WINDOW, POOL)
            at_q = g
            if positions is not None:
                at_q = tl.where(chosen == q, g, 0.0)
            products = dot(p - center, at_q, products, PRECISION)
    to = parts + (task * chunks + chunk) * (I + 1) * O
    tl.store(to + i[:, None] * O + o[None, :], products, mask=(i < I)[:, None] & (o < O)[None, :])
    tl.store(to + I * O + o, total, mask=o < O)


@jit
@varies("chunks")
def patch_sums(
    sums,  # [T, chunks, I + 1, O]: what `patch_products` made, of dy or rdy
    w: Operand,  # of a task [O, I]
    products,  # [T, I, O]: A, or RA
    earlier,  # [T, I, O]: A, if these are of rdy; or None
    v: Operand,  # likewise, if these are of rdy; or None
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
    tl.store(to + O, tl.sum(_weight(w.at + task * w.stride, i, o, I, O) * a, axis=0), mask=o < O)
    if v is not None:
        a = tl.load(earlier + task * I * O + at, mask=inside, other=0.0)
        tl.store(to + 2 * O, tl.sum(_weight(v.at + task * v.stride, i, o, I, O) * a, axis=0), mask=o < O)


@jit
def patch_gradient(
    coefficients,  # [T, 5, O]
    of_x,  # [T, I, O]: Z W
    of_dy,  # [T, I, O]: A
    of_rdy,  # [T, I, O]: RA; or None
    of_rx,  # [T, I, O]: Z V; or None
    weight_target: Target,  # [O, I]
    bias_target: Target,  # [O]
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
    if weight_target.to is not None:
        deliver(found, o[None, :] * I + i[:, None], inside, task, weight_target)
    if bias_target.to is not None:
        nothing = 0.0 * tl.load(c + 4 * O, mask=o < O, other=0.0)  # or NaN
        deliver(nothing, o, o < O, task, bias_target)
