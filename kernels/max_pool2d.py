"""max_pool2d: the largest value of every window; the first of several, as in PyTorch, and NaN if
there is one.

x is [T * N images, H, W, C], y [T * N images, OH, OW, C]; a program makes BLOCK elements. The
position within its window is kept: gradients go there, and tangents are read there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks
from fastmeta.kernels.windows import Images, Window, image_sizes, window

#: Elements that a program handles.
POOLED = 512


@jit
def place(j, C, height, width):
    """(channel, column, row, image) of element j of channels-last images, a block of any shape."""
    row = j // (C * width)
    return (j % C).to(tl.int32), (j // C % width).to(tl.int32), (row % height).to(tl.int32), row // height


@jit
@varies("size")
def _forward(
    x,  # [images, H, W, C]
    y,  # [images, OH, OW, C]
    positions,  # as y
    size,  # elements of y
    C,
    images: Images,
    window: Window,
    BLOCK: tl.constexpr,
):
    """y = the largest value of each window; positions = where in the window it is."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = place(j, C, images.OH, images.OW)
    best = tl.zeros([BLOCK], x.dtype.element_ty)
    position = tl.full([BLOCK], -1, tl.int32)
    for tap in range(window.KH * window.KW):
        ih = oh * window.SH - window.PH + tap // window.KW
        iw = ow * window.SW - window.PW + tap % window.KW
        here = mask & (ih >= 0) & (ih < images.H) & (iw >= 0) & (iw < images.W)
        v = tl.load(x + ((image * images.H + ih) * images.W + iw) * C + c, mask=here, other=0.0)
        take = here & ((v > best) | (v != v) | (position < 0))
        best = tl.where(take, v, best)
        position = tl.where(take, tap, position)
    tl.store(y + j, best, mask=mask)
    tl.store(positions + j, position.to(tl.int16), mask=mask)


@jit
@varies("size")
def _gather(
    x,  # [images, H, W, C]
    y,  # [images, OH, OW, C]
    positions,  # as y
    size,  # elements of y
    C,
    images: Images,
    window: Window,
    BLOCK: tl.constexpr,
):
    """y = x at the position of each window."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = place(j, C, images.OH, images.OW)
    tap = tl.load(positions + j, mask=mask, other=0).to(tl.int32)
    h = oh * window.SH - window.PH + tap // window.KW
    w = ow * window.SW - window.PW + tap % window.KW
    at = ((image * images.H + h) * images.W + w) * C + c
    tl.store(y + j, tl.load(x + at, mask=mask, other=0.0), mask=mask)


@jit
@varies("size")
def _scatter(
    dy,  # [images, OH, OW, C]
    dx,  # [images, H, W, C]
    positions,  # as dy
    size,  # elements of dx
    C,
    images: Images,
    window: Window,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = [dx +] the sum of dy over the windows whose position a pixel is."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, iw, ih, image = place(j, C, images.H, images.W)
    total = tl.zeros([BLOCK], dx.dtype.element_ty)
    if ADD:
        total = tl.load(dx + j, mask=mask, other=0.0)
    for tap in range(window.KH * window.KW):
        h = ih + window.PH - tap // window.KW
        w = iw + window.PW - tap % window.KW
        oh = h // window.SH
        ow = w // window.SW
        here = mask & (h >= 0) & (w >= 0) & (h % window.SH == 0) & (w % window.SW == 0)
        here = here & (oh < images.OH) & (ow < images.OW)
        at = ((image * images.OH + oh) * images.OW + ow) * C + c
        chosen = tl.load(positions + at, mask=here, other=-1).to(tl.int32) == tap
        total += tl.load(dy + at, mask=here & chosen, other=0.0)
    tl.store(dx + j, total, mask=mask)


def _geometry(run: Pass, node: Node) -> dict[str, Any]:
    """Sizes of images and windows, as the kernels take them."""
    x, y = run.values[node.inputs[0]], run.values[node.output]
    return {"C": x.cols, "images": image_sizes(x, y), "window": window(node)}


def _positions(run: Pass, node: Node) -> Tensor:
    return run.keep(node, "positions", run.tasks, run.elements(node.output), dtype=torch.int16)


def forward(run: Pass, node: Node) -> None:
    """y = the largest value of each window."""
    size = run.tasks * run.elements(node.output)
    run.emit(
        _forward,
        blocks(size, POOLED),
        x=run.x[node.inputs[0]],
        y=run.x[node.output],
        positions=_positions(run, node),
        size=size,
        BLOCK=POOLED,
        **_geometry(run, node),
    )


def tangent(run: Pass, node: Node) -> None:
    """ry = rx where the largest value was."""
    size = run.tasks * run.elements(node.output)
    run.emit(
        _gather,
        blocks(size, POOLED),
        x=run.rx[node.inputs[0]],
        y=run.rx[node.output],
        positions=_positions(run, node),
        size=size,
        BLOCK=POOLED,
        **_geometry(run, node),
    )


def _hand_back(run: Pass, node: Node, deltas: list[Buffer]) -> None:
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
        **_geometry(run, node),
    )


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy where the largest value was, zero elsewhere."""
    _hand_back(run, node, run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _hand_back(run, node, run.rd)
