"""max_pool2d: the largest value of every window; the first of several, as in PyTorch, and NaN if
there is one.

The position within its window is kept: gradients go there, and tangents are read there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.passes import Node, Pass, Sinks

#: Elements that a program handles.
POOLED = 512


@triton.jit
def _place(j, C, HEIGHT, WIDTH):
    """(channel, column, row, image) of an element of channels-last images."""
    row = j // (C * WIDTH)
    return (j % C).to(tl.int32), (j // C % WIDTH).to(tl.int32), (row % HEIGHT).to(tl.int32), row // HEIGHT


@triton.jit(do_not_specialize=["size"])
def _forward(x, y, positions, size, C, H, W, OH, OW, KH, KW, SH, SW, PH, PW, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = _place(j, C, OH, OW)
    best = tl.zeros([BLOCK], x.dtype.element_ty)
    position = tl.full([BLOCK], -1, tl.int32)
    for tap in range(KH * KW):
        ih = oh * SH - PH + tap // KW
        iw = ow * SW - PW + tap % KW
        here = mask & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        v = tl.load(x + ((image * H + ih) * W + iw) * C + c, mask=here, other=0.0)
        take = here & ((v > best) | (v != v) | (position < 0))
        best = tl.where(take, v, best)
        position = tl.where(take, tap, position)
    tl.store(y + j, best, mask=mask)
    tl.store(positions + j, position.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _gather(x, y, positions, size, C, H, W, OH, OW, KW, SH, SW, PH, PW, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = _place(j, C, OH, OW)
    tap = tl.load(positions + j, mask=mask, other=0).to(tl.int32)
    at = ((image * H + oh * SH - PH + tap // KW) * W + ow * SW - PW + tap % KW) * C + c
    tl.store(y + j, tl.load(x + at, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _scatter(
    dy, dx, positions, size, C, H, W, OH, OW, KH, KW, SH, SW, PH, PW, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, iw, ih, image = _place(j, C, H, W)
    total = tl.zeros([BLOCK], dx.dtype.element_ty)
    if ADD:
        total = tl.load(dx + j, mask=mask, other=0.0)
    for tap in range(KH * KW):
        h = ih + PH - tap // KW
        w = iw + PW - tap % KW
        oh = h // SH
        ow = w // SW
        here = mask & (h >= 0) & (w >= 0) & (h % SH == 0) & (w % SW == 0) & (oh < OH) & (ow < OW)
        at = ((image * OH + oh) * OW + ow) * C + c
        chosen = tl.load(positions + at, mask=here, other=-1).to(tl.int32) == tap
        total += tl.load(dy + at, mask=here & chosen, other=0.0)
    tl.store(dx + j, total, mask=mask)


def geometry(run: Pass, node: Node) -> dict[str, int]:
    """Sizes of images and windows, as the kernels call them."""
    a, b = run.values[node.inputs[0]], run.values[node.output]
    kh, kw, sh, sw, ph, pw = map(int, node.constants[:6]) if node.constants else (0,) * 6
    names = {"C": a.cols, "H": a.height, "W": a.width, "OH": b.height, "OW": b.width}
    return names | {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def _positions(run: Pass, node: Node) -> Any:
    return run.keep(node, "positions", run.tasks, run.elements(node.output), dtype=torch.int16)


def forward(run: Pass, node: Node) -> None:
    """y = the largest value of each window."""
    size = run.tasks * run.elements(node.output)
    x, y = run.x[node.inputs[0]], run.x[node.output]
    run.emit(
        _forward,
        blocks(size, POOLED),
        x=x,
        y=y,
        positions=_positions(run, node),
        size=size,
        BLOCK=POOLED,
        **geometry(run, node),
    )


def tangent(run: Pass, node: Node) -> None:
    """ry = rx where the largest value was."""
    size = run.tasks * run.elements(node.output)
    sizes = geometry(run, node)
    del sizes["KH"]
    x, y = run.rx[node.inputs[0]], run.rx[node.output]
    run.emit(
        _gather,
        blocks(size, POOLED),
        x=x,
        y=y,
        positions=_positions(run, node),
        size=size,
        BLOCK=POOLED,
        **sizes,
    )


def _hand_back(run: Pass, node: Node, deltas: list[Any]) -> None:
    in_ = node.inputs[0]
    if not run.wants_delta(in_):
        return
    size = run.tasks * run.elements(in_)
    run.emit(
        _scatter,
        blocks(size, POOLED),
        dy=deltas[node.output],
        dx=deltas[in_],
        positions=_positions(run, node),
        size=size,
        ADD=node.adds[0],
        BLOCK=POOLED,
        **geometry(run, node),
    )


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy where the largest value was, zero elsewhere."""
    _hand_back(run, node, run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _hand_back(run, node, run.rd)
