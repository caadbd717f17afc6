"""avg_pool2d: the mean of every window, also of adaptive ones. Linear, so its tangents are means
too.

x is [T * N images, H, W, C], y [T * N images, OH, OW, C]; a program makes BLOCK elements.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.max_pool2d import POOLED, place
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks
from fastmeta.kernels.windows import Images, Window, image_sizes, window


@jit
def _window(o, SIZE, OUT, K, S, P, ADAPTIVE: tl.constexpr):
    """(begin, end, end within the padded image) of window o along one dimension; begin and end
    within the image."""
    if ADAPTIVE:
        begin = o * SIZE // OUT
        end = ((o + 1) * SIZE + OUT - 1) // OUT
        return begin, end, end - begin
    start = o * S - P
    padded = tl.minimum(start + K, SIZE + P) - start
    return tl.maximum(start, 0), tl.minimum(start + K, SIZE), padded


@jit
def _divisor(h0, h1, hp, w0, w1, wp, PADDING: tl.constexpr, DIVISOR: tl.constexpr):
    """What the sum of a window is divided by, of windows that `_window` describes."""
    if DIVISOR > 0:
        return h0 * 0 + DIVISOR
    if PADDING:
        return hp * wp
    return (h1 - h0) * (w1 - w0)


@jit
@varies("size")
def _gather(
    x,  # [images, H, W, C]
    y,  # [images, OH, OW, C]
    size,  # elements of y
    C,
    images: Images,
    window: Window,
    ADAPTIVE: tl.constexpr,
    PADDING: tl.constexpr,  # counts, where a window goes beyond the image
    DIVISOR: tl.constexpr,  # if positive, instead of how many there are
    BLOCK: tl.constexpr,
):
    """y = the mean of each window."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = place(j, C, images.OH, images.OW)
    h0, h1, hp = _window(oh, images.H, images.OH, window.KH, window.SH, window.PH, ADAPTIVE)
    w0, w1, wp = _window(ow, images.W, images.OW, window.KW, window.SW, window.PW, ADAPTIVE)
    total = tl.zeros([BLOCK], y.dtype.element_ty)
    for tap in range(window.KH * window.KW):
        ih = h0 + tap // window.KW
        iw = w0 + tap % window.KW
        here = mask & (ih < h1) & (iw < w1)
        total += tl.load(x + ((image * images.H + ih) * images.W + iw) * C + c, mask=here, other=0.0)
    divisor = _divisor(h0, h1, hp, w0, w1, wp, PADDING, DIVISOR)
    tl.store(y + j, total / divisor.to(total.dtype), mask=mask)


@jit
@varies("size")
def _scatter(
    dy,  # [images, OH, OW, C]
    dx,  # [images, H, W, C]
    size,  # elements of dx
    C,
    images: Images,
    window: Window,
    ADD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PADDING: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = [dx +] the sum of dy over the windows that hold a pixel, divided as their means were."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, iw, ih, image = place(j, C, images.H, images.W)
    total = tl.zeros([BLOCK], dx.dtype.element_ty)
    if ADD:
        total = tl.load(dx + j, mask=mask, other=0.0)
    # the windows that may hold this pixel: from the first that ends after it on
    first_h = ih * 0
    first_w = iw * 0
    if not ADAPTIVE:
        first_h = tl.maximum(ih + window.PH - window.KH + window.SH, 0) // window.SH
        first_w = tl.maximum(iw + window.PW - window.KW + window.SW, 0) // window.SW
    most_h = images.OH if ADAPTIVE else (window.KH + window.SH - 1) // window.SH
    most_w = images.OW if ADAPTIVE else (window.KW + window.SW - 1) // window.SW
    for one in range(most_h * most_w):
        oh = first_h + one // most_w
        ow = first_w + one % most_w
        h0, h1, hp = _window(oh, images.H, images.OH, window.KH, window.SH, window.PH, ADAPTIVE)
        w0, w1, wp = _window(ow, images.W, images.OW, window.KW, window.SW, window.PW, ADAPTIVE)
        here = mask & (oh < images.OH) & (ow < images.OW)
        here = here & (h0 <= ih) & (ih < h1) & (w0 <= iw) & (iw < w1)
        divisor = tl.where(here, _divisor(h0, h1, hp, w0, w1, wp, PADDING, DIVISOR), 1)
        at = ((image * images.OH + oh) * images.OW + ow) * C + c
        g = tl.load(dy + at, mask=here, other=0.0)
        total += g / divisor.to(total.dtype)
    tl.store(dx + j, total, mask=mask)


def _longest(size: int, out: int) -> int:
    """The longest of `out` adaptive windows over `size`."""
    return max(-(-(o + 1) * size // out) - o * size // out for o in range(out))


def _options(run: Pass, node: Node) -> dict[str, Any]:
    """Sizes of images and windows and how means are taken, as the kernels take them."""
    x, y = run.values[node.inputs[0]], run.values[node.output]
    sizes = image_sizes(x, y)
    adaptive = node.function == "adaptive"
    if adaptive:
        taps = Window(_longest(sizes.H, sizes.OH), _longest(sizes.W, sizes.OW), 1, 1, 0, 0)
        padding, divisor = 1.0, 0.0
    else:
        taps = window(node)
        padding, divisor = node.constants[6:8]
    return {
        "C": x.cols,
        "images": sizes,
        "window": taps,
        "ADAPTIVE": adaptive,
        "PADDING": bool(padding),
        "DIVISOR": int(divisor),
    }


def _means(run: Pass, node: Node, values: list[Buffer]) -> None:
    size = run.tasks * run.elements(node.output)
    x, y = values[node.inputs[0]], values[node.output]
    run.emit(_gather, blocks(size, POOLED), x=x, y=y, size=size, BLOCK=POOLED, **_options(run, node))


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
        size=size,
        ADD=node.adds[0],
        BLOCK=POOLED,
        **_options(run, node),
    )


def forward(run: Pass, node: Node) -> None:
    """y = the mean of each window."""
    _means(run, node, run.x)


def tangent(run: Pass, node: Node) -> None:
    """The same of tangents."""
    _means(run, node, run.rx)


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = the sum of dy over the windows that hold a pixel, each divided as its mean was."""
    _hand_back(run, node, run.d)


def tangent_backward(run: Pass, node: Node, sinks: Sinks) -> None:
    """The same of tangents."""
    _hand_back(run, node, run.rd)
