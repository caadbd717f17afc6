"""Windows over images, as kernels take them: sizes, and the taps of a convolution or a pool."""

from __future__ import annotations

from typing import NamedTuple

from fastmeta.kernels.passes import Node, Value


class Images(NamedTuple):
    """Sizes of images: of a layer's input H x W, of its output OH x OW. The transpose of a
    convolution is a layer from the output's gradient to the input's."""

    H: int
    W: int
    OH: int
    OW: int


class Window(NamedTuple):
    """Taps, strides and padding along height and width."""

    KH: int
    KW: int
    SH: int
    SW: int
    PH: int
    PW: int


class Pool(NamedTuple):
    """Windows side by side, of a max-pool that a norm does on the way; 1 x 1 for none."""

    height: int
    width: int


def image_sizes(source: Value, target: Value) -> Images:
    """Of a layer that makes `target` of `source`."""
    return Images(source.height, source.width, target.height, target.width)


def window(node: Node) -> Window:
    """Of a convolution or a pool."""
    return Window(*map(int, node.constants[:6]))
