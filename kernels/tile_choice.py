"""Tiles, warps and stages of the products of linear and conv2d, and what else may be tried in their
place.

What is chosen here follows from shapes alone. The order of every sum is no part of a choice: steps
along a sum (`sum_step`) and chunks of rows are fixed, an element is summed by one program from its
first term to its last, and no choice changes which instruction multiplies. So all choices of a
launch give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastmeta.kernels.launch import Choice, blocks, power

#: Programs that give every multiprocessor of a large GPU one; fixed, so that the shapes alone
#: decide how work is cut. A multiprocessor wants several at once, more of those that wait for
#: memory than of those that multiply.
FULL = 128


def sum_step(wide: bool) -> int:
    """Elements along the sum that a step of a product takes; `wide`: elements of eight bytes.

    Part of the order of summation, and so never tuned.
    """
    return 16 if wide else 32


#: The tile of float64 products. The assembler spills around the matrix instruction that Triton 3.6
#: takes for them on an H100, on smaller tiles as on larger ones and where a step along the sum is
#: 32; here it does not.
_WIDE = (32, 32)


def tile_shape(m: int, n: int, batch: int, wide: bool) -> tuple[int, int]:
    """(BM, BN) of a product [m, n] for each of `batch` tasks."""
    if wide:
        return _WIDE
    bm, bn = power(m, 16, 64), power(n, 16, 64)
    while batch * blocks(m, bm) * blocks(n, bn) < FULL and max(bm, bn) > 16:
        bm, bn = (bm // 2, bn) if bm > bn else (bm, bn // 2)
    return bm, bn


def gradient_tile(o: int, i: int, wide: bool) -> tuple[int, int]:
    """(BO, BI) of a gradient [o, i] that is cut into chunks of rows where its tiles are too few."""
    return _WIDE if wide else (power(o, 16, 64), power(i, 16, 64))


def product_warps(tile: tuple[int, int], pairs: int, function: str, wide: bool) -> int:
    """Warps of a product: as many as it takes to keep a full tile, both pairs and the epilogue in
    registers."""
    full = tile[0] * tile[1] >= 64 * 64 or wide
    return 8 if full and (pairs > 1 or function) else 4


def gradient_warps(tile: tuple[int, int], precision: str) -> int:
    """The same for a weight's gradient: on tensor cores, operands are converted in registers."""
    return 8 if tile[0] * tile[1] >= 64 * 64 and precision != "ieee" else 4


def choices(
    names: tuple[str, str],
    tile: tuple[int, int],
    warps: int,
    stages: int,
    programs: Callable[[int, int], int],
    sizes: tuple[int, int],
    precision: str,
    wide: bool,
    summed: str = "",
) -> tuple[Choice, ...]:
    """What a product may be launched with instead.

    Args:
        names: of the tile's two sizes among the kernel's arguments.
        tile: chosen so far, with its warps and stages.
        programs: of a tile.
        sizes: that the tile's two cover.
        precision: see `kernels.tile`.
        wide: elements of eight bytes: there is one tile for them.
        summed: the kernel sums its tile along the way, across threads: "rows" of the tile's first
            size, of which the second may change, or "tile" and nothing may but the stages.
    """

    def made(bm: int, bn: int, w: int, s: int) -> Choice:
        tiles: dict[str, Any] = {names[0]: bm, names[1]: bn}
        return Choice(programs(bm, bn), w, s, tuple(tiles.items()))

    found = [made(*tile, warps, other) for other in (2, 3) if other != stages]
    if summed != "tile" and not wide:
        tried = list(_shapes(tile, sizes, precision, keep_first=bool(summed)))
        found += [made(*shape, warps if summed else _warps(shape), stages) for shape in tried]
        if not summed:
            found.append(made(*tile, 12 - warps, stages))  # 4 or 8
    return tuple(found)


def _warps(shape: tuple[int, int]) -> int:
    return 8 if shape[0] * shape[1] > 64 * 64 else 4


def _shapes(
    tile: tuple[int, int], sizes: tuple[int, int], precision: str, keep_first: bool
) -> Iterator[tuple[int, int]]:
    bm, bn = tile
    for a, b in ((2 * bm, bn), (bm // 2, bn), (bm, bn // 2)):
        inside = 16 <= a <= power(sizes[0], 16, 128) and b >= 16
        same_instruction = precision == "ieee" or (a >= 64) == (
            bm >= 64
        )  # tensor cores read 64 rows or fewer
        if inside and same_instruction and not (keep_first and a != bm):
            yield a, b
