"""Windows that slide over an image [C, H, W] or a signal [C, L]: what convolutions and pools have
in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmeta.capture.build import Refused, Value, batched, described, integer


def image(input: Any, dimensions: int) -> Value:
    """The input, if it is a batch of images (2 dimensions) or signals (1); anything else is
    refused."""
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")
    if len(input.shape) != dimensions + 1:
        wanted = "[N, C, H, W]" if dimensions == 2 else "[N, C, L]"
        raise Refused(f"it takes {wanted}, got {batched(input.shape)}")
    return input


def as_image(x: Tensor) -> Tensor:
    """Signals [N, C, L] as images of height 1."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def numbers(what: str, value: Any, dimensions: int, least: int = 1) -> tuple[int, ...]:
    """An int or one for each dimension, as one for each dimension, all at least `least`."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(given) == 1:
        given *= dimensions
    if len(given) != dimensions or any(integer(size) < least for size in given):
        raise Refused(f"{what} must be {dimensions} ints of at least {least}, got {value!r}")
    return given


def pooling(
    kernel_size: Any, stride: Any, padding: Any, dimensions: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A pool's window, stride (by default the window) and padding, at most half of the window."""
    kernel = numbers("kernel_size", kernel_size, dimensions)
    strides = kernel if stride in (None, (), []) else numbers("stride", stride, dimensions)
    paddings = numbers("padding", padding, dimensions, least=0)
    if any(2 * p > k for p, k in zip(paddings, kernel, strict=True)):
        raise Refused(f"a padding of {padding} is more than half of the window {kernel_size}")
    return kernel, strides, paddings


def two(sizes: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Sizes along height and width: a signal is an image of height 1."""
    return (missing, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def constants(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[float, ...]:
    """(kh, kw, sh, sw, ph, pw) as a layer has them."""
    return tuple(map(float, (*two(kernel, 1), *two(stride, 1), *two(padding, 0))))


def positions(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil: bool = False,
) -> tuple[int, ...]:
    """How many windows fit along each dimension of a shape (C, ...), by PyTorch's rule."""
    counts = []
    for size, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True):
        room = size + 2 * p - k
        if room < 0 or k < 1:
            raise Refused(f"a window of {k} does not fit into {size} with a padding of {p}")
        count = (room + (s - 1 if ceil else 0)) // s + 1
        if ceil and (count - 1) * s >= size + p:  # the last window would begin in the padding on the right
            count -= 1
        counts.append(count)
    return tuple(counts)
