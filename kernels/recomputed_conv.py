"""A batch norm that computes the convolution before it whenever it needs it: that image
[T, N, OH, OW, O] is never written down.

For a convolution of the network's input, of few taps and channels: its output is by far the largest
value of such a network and costs next to nothing to compute. Neither are its gradient and its
tangent kept; the gradients of its parameters come from the same sums as the norm's. `patches` has
the kernels and the algebra.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fastmeta.kernels.channel_norm import ChannelNorm, cut
from fastmeta.kernels.elementwise import Epilogue
from fastmeta.kernels.launch import blocks, power
from fastmeta.kernels.passes import Buffer, Node, Sinks
from fastmeta.kernels.patches import (
    patch_gradient,
    patch_moments,
    patch_norm,
    patch_products,
    patch_scatter,
    patch_statistics,
    patch_sums,
)
from fastmeta.kernels.tile_choice import sum_step
from fastmeta.kernels.windows import Pool, image_sizes, window

#: Numbers of a patch, at most: with more, the multiply-adds take longer than the image takes to be
#: written and read.
MOST = 32
#: Chunks of a task's pixels, at most: one program adds them up.
_CHUNKS = 32
#: Pixels of a window that are unrolled: the assembler spills where there are more.
_UNROLLED = 4


def is_small(conv: Node, channels: int) -> bool:
    """Whether a convolution of an image of so many channels is worth computing again and again."""
    taps = window(conv)
    return taps.KH * taps.KW * channels <= MOST


class RecomputedConv(ChannelNorm):
    """The norm `node` of the convolution `node.recomputes`; x, and rx, are what it makes of patches
    less their mean."""

    # ---- what ChannelNorm launches, from patches

    def _statistics(self) -> tuple[Tensor, int, int]:
        self._patch_moments()
        return self._with_weights("x"), self.rows, 1

    def _tangent_sums(self) -> tuple[Tensor, int]:
        return self._with_weights("rx"), 1

    def _products(self, a: Buffer, b: Buffer) -> tuple[int, Tensor]:
        run, tangent = self.run, b is not None
        pixels = prod(self.node.pool or (1, 1))
        unrolled = pixels if pixels <= _UNROLLED else 1
        chunk, chunks = cut(self.out_rows, run.tasks * blocks(self.cols, self._columns), _CHUNKS)
        sums = run.scratch("patch_sums", run.tasks * chunks * (self._numbers + 1) * self.cols)
        run.emit(
            patch_products,
            run.tasks * chunks * blocks(self.cols, self._columns),
            warps=8 if pixels > _UNROLLED and not run.wide else 4,
            dy=a,
            middle=self._middle,
            positions=self._positions,
            parts=sums,
            M=self.out_rows,
            O=self.cols,
            CHUNK=chunk,
            chunks=chunks,
            PRECISION=run.precision,
            BO=self._columns,
            BM=sum_step(run.wide),
            UNROLL=unrolled,
            **self._geometry(pooled=True),
        )
        parts = self._parts(1)
        run.emit(
            patch_sums,
            run.tasks * blocks(self.cols, self._columns),
            sums=sums,
            products=self._weighted("rdy" if tangent else "dy"),
            earlier=self._weighted("dy") if tangent else None,
            parts=parts,
            chunks=chunks,
            **self._weights(tangent),
            **self._tile_of_patches(),
        )
        return 1, parts

    def _combine(self, epilogue: Epilogue, dy: Buffer, rdy: Buffer, rx: Buffer) -> None:
        run = self.run
        windows = power(self.out_rows, 16, 32)
        run.emit(
            patch_norm,
            run.tasks * blocks(self.out_rows, windows) * blocks(self.cols, self._columns),
            middle=self._middle,
            positions=self._positions,
            coefficients=self._coefficients(),
            M=self.out_rows,
            O=self.cols,
            PRECISION=run.precision,
            BR=windows,
            BO=self._columns,
            **self._weights(epilogue.FINISH.mode == "tangent"),
            **self._geometry(pooled=True),
            **epilogue._asdict(),
        )

    def _input_gradient(self, sinks: Sinks | None, dy: Buffer, rdy: Buffer) -> None:
        """That of the convolution's parameters instead."""
        if sinks is None:
            return
        tangent = rdy is not None
        weight_target, bias_target = self._targets(sinks, self._conv)
        self.run.emit(
            patch_gradient,
            self.run.tasks * blocks(self.cols, self._columns),
            coefficients=self._coefficients(),
            of_x=self._weighted("x"),
            of_dy=self._weighted("dy"),
            of_rdy=self._weighted("rdy") if tangent else None,
            of_rx=self._weighted("rx") if tangent else None,
            weight_target=weight_target,
            bias_target=bias_target,
            **self._tile_of_patches(),
        )

    def _patch_moments(self) -> None:
        run = self.run
        numbers, size = self._numbers, self._patch
        chunk, chunks = cut(self.rows, run.tasks * numbers, _CHUNKS)
        moments = run.scratch("patch_moments", run.tasks * chunks * numbers * (size + 2), torch.float64)
        run.emit(
            patch_moments,
            run.tasks * chunks * numbers,
            warps=4 if size <= 16 else 8,  # or the assembler spills
            parts=moments,
            M=self.rows,
            CHUNK=chunk,
            chunks=chunks,
            BM=32,
            **self._geometry(pooled=False),
        )
        run.emit(
            patch_scatter,
            run.tasks,
            parts=moments,
            middle=self._middle,
            scatter=self._scatter,
            M=self.rows,
            chunks=chunks,
            I=numbers,
            BI=size,
        )

    def _with_weights(self, which: str) -> Tensor:
        """What the norm sums over the pixels of x or rx."""
        parts = self._parts(1)
        self.run.emit(
            patch_statistics,
            self.run.tasks * blocks(self.cols, self._columns),
            bias=self.run.operand(self.run.theta, self._conv, 1),
            scatter=self._scatter,
            parts=parts,
            scattered=self._weighted(which),
            **self._weights(which == "rx"),
            **self._tile_of_patches(),
        )
        return parts

    # ---- arguments

    @property
    def _conv(self) -> Node:
        return self.node.recomputes  # type: ignore[return-value]

    @property
    def _numbers(self) -> int:
        """Of a patch."""
        taps = window(self._conv)
        return taps.KH * taps.KW * self.run.values[self._conv.inputs[0]].cols

    @property
    def _patch(self) -> int:
        """The tile that holds them; of float64, the one that products have."""
        return power(self._numbers, 32 if self.run.wide else 16, MOST)

    @property
    def _columns(self) -> int:
        """Channels of a tile."""
        return power(self.cols, 16, 32 if self.run.wide else 64)

    @property
    def _middle(self) -> Tensor:
        return self.run.keep(self.node, "middle", self.run.tasks, self._patch, dtype=torch.float64)

    @property
    def _scatter(self) -> Tensor:
        return self.run.keep(
            self.node, "scatter", self.run.tasks, self._patch, self._patch, dtype=torch.float64
        )

    @property
    def _index(self) -> torch.dtype:
        # Triton 3.6 stops at a product of float64 numbers that are picked by narrower integers
        return torch.int32 if self.run.wide else torch.int16

    def _weighted(self, which: str) -> Tensor:
        """[T, I, O]: the sums over pixels of patches times x, dy, rx or rdy."""
        shape = (self.run.tasks, self._numbers, self.cols)
        if which in ("x", "dy"):
            return self.run.keep(self.node, f"patches_{which}", *shape)
        # between the tangent and its backward pass other layers like this one come by
        name = f"patches_rx{self.node.index}" if which == "rx" else "patches_rdy"
        return self.run.scratch(name, shape[0] * shape[1] * shape[2])

    def _weights(self, tangent: bool) -> dict[str, Any]:
        run = self.run
        w, _ = run.weights(run.theta, self._conv)
        return {"w": w, "v": run.operand(run.v, self._conv, 0) if tangent else None}

    def _tile_of_patches(self) -> dict[str, Any]:
        return {"O": self.cols, "I": self._numbers, "BI": self._patch, "BO": self._columns}

    def _geometry(self, pooled: bool) -> dict[str, Any]:
        x = self.run.values[self._conv.inputs[0]]
        y = self.run.values[self.node.output if pooled else self.node.inputs[0]]
        return {
            "x": self.run.x[self._conv.inputs[0]],
            "size": image_sizes(x, y),
            "C": x.cols,
            "WINDOW": window(self._conv),
            "POOL": self._pool if pooled else Pool(1, 1),
            "BI": self._patch,
        }
