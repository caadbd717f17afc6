"""avg_pool2d: the mean of every window, also of adaptive ones. Linear, so its tangents are means
too."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmeta.kernels.launch import blocks
from fastmeta.kernels.max_pool2d import POOLED, _place, geometry
from fastmeta.kernels.passes import Node, Pass, Sinks


@triton.jit
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


@triton.jit
def _divisor(h0, h1, hp, w0, w1, wp, PADDING: tl.constexpr, DIVISOR: tl.constexpr):
    if DIVISOR > 0:
        return h0 * 0 + DIVISOR
    if PADDING:
        return hp * wp
    return (h1 - h0) * (w1 - w0)


@triton.jit(do_not_specialize=["size"])
def _gather(
    x,
    y,
    size,
    C,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    ADAPTIVE: tl.constexpr,
    PADDING: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, ow, oh, image = _place(j, C, OH, OW)
    h0, h1, hp = _window(oh, H, OH, KH, SH, PH, ADAPTIVE)
    w0, w1, wp = _window(ow, W, OW, KW, SW, PW, ADAPTIVE)
    total = tl.zeros([BLOCK], y.dtype.element_ty)
    for tap in range(KH * KW):
        ih = h0 + tap // KW
        iw = w0 + tap % KW
        here = mask & (ih < h1) & (iw < w1)
        total += tl.load(x + ((image * H + ih) * W + iw) * C + c, mask=here, other=0.0)
    divisor = _divisor(h0, h1, hp, w0, w1, wp, PADDING, DIVISOR)
    tl.store(y + j, total / divisor.to(total.dtype), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _scatter(
    dy,
    dx,
    size,
    C,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    SH,
    SW,
    PH,
    PW,
    ADD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    PADDING: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = j < size
    c, iw, ih, image = _place(j, C, H, W)
    total = tl.zeros([BLOCK], dx.dtype.element_ty)
    if ADD:
        total = tl.load(dx + j, mask=mask, other=0.0)
    # the windows that may hold this pixel: from the first that ends behind it on
    first_h = ih * 0
    first_w = iw * 0
    if not ADAPTIVE:
        first_h = tl.maximum(ih + PH - KH + SH, 0) // SH
        first_w = tl.maximum(iw + PW - KW + SW, 0) // SW
    most_h = OH if ADAPTIVE else (KH + SH - 1) // SH
    most_w = OW if ADAPTIVE else (KW + SW - 1) // SW
    for window in range(most_h * most_w):
        oh = first_h + window // most_w
        ow = first_w + window % most_w
        h0, h1, hp = _window(oh, H, OH, KH, SH, PH, ADAPTIVE)
        w0, w1, wp = _window(ow, W, OW, KW, SW, PW, ADAPTIVE)
        here = mask & (oh < OH) & (ow < OW) & (h0 <= ih) & (ih < h1) & (w0 <= iw) & (iw < w1)
        divisor = tl.where(here, _divisor(h0, h1, hp, w0, w1, wp, PADDING, DIVISOR), 1)
        g = tl.load(dy + ((image * OH + oh) * OW + ow) * C + c, mask=here, other=0.0)
        total += g / divisor.to(total.dtype)
    tl.store(dx + j, total, mask=mask)


def _longest(size: int, out: int) -> int:
    """The longest of `out` adaptive windows over `size`."""
    return max(-(-(o + 1) * size // out) - o * size // out for o in range(out))


def _options(run: Pass, node: Node) -> dict[str, Any]:
    sizes: dict[str, Any] = geometry(run, node)
    adaptive = node.function == "adaptive"
    if adaptive:
        sizes |= {"KH": _longest(sizes["H"], sizes["OH"]), "KW": _longest(sizes["W"], sizes["OW"])}
        sizes |= {"SH": 1, "SW": 1}
    padding, divisor = (True, 0.0) if adaptive else node.constants[6:8]
    return sizes | {"ADAPTIVE": adaptive, "PADDING": bool(padding), "DIVISOR": int(divisor)}


def _means(run: Pass, node: Node, values: list[Any]) -> None:
    size = run.tasks * run.elements(node.output)
    x, y = values[node.inputs[0]], values[node.output]
    run.emit(_gather, blocks(size, POOLED), x=x, y=y, size=size, BLOCK=POOLED, **_options(run, node))


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
