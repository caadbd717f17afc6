"""What batch norm and group norm share: docs/norms.md as sums over rows and linear combinations of
rows.

Values are [blocks, R rows, C channels]. A block is what is normalised together along rows: of batch
norm a task's whole batch, of group norm an example. A group is so many of its channels; of batch
norm, one. Sums go over chunks of rows that the shapes alone fix (`channel_sums`). A small kernel
turns them into coefficients (`channel_coefficients`), and one pass combines the rows
(`channel_combine`). A max-pool over windows side by side is done on the way: what is not pooled is
never written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.kernels.channel_coefficients import (
    Groups,
    backward_coefficients,
    forward_coefficients,
    tangent_backward_coefficients,
    tangent_coefficients,
)
from fastmeta.kernels.channel_combine import combine, pooled
from fastmeta.kernels.channel_sums import merged, statistics, sums
from fastmeta.kernels.conv2d import tile_partials
from fastmeta.kernels.elementwise import End, Epilogue, Finish, forward_end, tangent_end
from fastmeta.kernels.launch import REGISTERS, blocks, power
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks, Target, target
from fastmeta.kernels.tile_choice import FULL
from fastmeta.kernels.windows import Images, Pool, image_sizes

#: Tiles of rows and channels.
_BR, _BC = 64, 32
#: Rows of a tile that is summed: more would not fit into registers with all the sums.
_BR_SUMS = 32
#: Channels whose coefficients one program makes, but for larger groups.
_COEFFICIENTS = 128
#: Rows of a chunk, at least, tiles of a chunk where a convolution has summed them, and chunks, at
#: most.
_CHUNK, _TILES, _CHUNKS = 256, 32, 16


@dataclass(slots=True)
class ChannelNorm:
    """One norm layer in one pass.

    Args:
        per_task: blocks of a task.
        rows: of a block, in the input.
        groups: of a block's channels.
        eps: beside the variance.
    """

    run: Pass
    node: Node
    per_task: int
    rows: int
    groups: int
    eps: float

    @property
    def fixed(self) -> bool:
        """Whether running statistics are what is normalised by."""
        return len(self.node.params) > 2 and self.node.params[2] is not None

    @property
    def cols(self) -> int:
        """Channels."""
        return self.run.values[self.node.inputs[0]].cols

    @property
    def blocks(self) -> int:
        """Of all tasks."""
        return self.run.tasks * self.per_task

    @property
    def out_rows(self) -> int:
        """Rows of a block in the output: windows, where there is a pool."""
        return self.run.rows(self.node.output) // self.per_task

    def forward(self) -> None:
        """y = w x^ + b, pooled."""
        run, node = self.run, self.node
        parts, chunk, chunks = (None, 1, 1) if self.fixed else self._statistics()
        running_mean = run.operand(run.theta, node, 2) if self.fixed else None
        running_var = run.operand(run.theta, node, 3) if self.fixed else None
        run.emit(
            forward_coefficients,
            self._programs(),
            parts=parts,
            w=run.operand(run.theta, node, 0),
            b=run.operand(run.theta, node, 1),
            running_mean=None if running_mean is None else running_mean.at,
            running_var=None if running_var is None else running_var.at,
            mean=self._state("mean"),
            rstd=self._state("rstd"),
            chunks=chunks,
            CHUNK=chunk,
            EPS=self.eps,
            **self._common(),
        )
        self._combine(forward_end(run, node), None, None, None)

    def backward(self, sinks: Sinks | None) -> None:
        """dx = r (g - <g> - x^ <g x^>), dw, db."""
        run, node = self.run, self.node
        if sinks is None and not run.wants_delta(node.inputs[0]):
            return
        dy = run.d[node.output]
        chunks, parts = self._products(dy, None)
        weight_target, bias_target = self._targets(sinks, node)
        run.emit(
            backward_coefficients,
            self._programs(),
            parts=parts,
            w=run.operand(run.theta, node, 0),
            rstd=self._state("rstd"),
            sum_dy=self._state("sum_dy"),
            sum_dy_x=self._state("sum_dy_x"),
            weight_target=weight_target,
            bias_target=bias_target,
            chunks=chunks,
            FIXED=self.fixed,
            **self._common(),
        )
        self._input_gradient(sinks, dy, None)

    def tangent(self) -> None:
        """ry = w rx^ + rw x^ + rb."""
        run, node = self.run, self.node
        parts, chunks = None, 1
        if self._moves and not self.fixed:
            parts, chunks = self._tangent_sums()
        run.emit(
            tangent_coefficients,
            self._programs(),
            parts=parts,
            w=run.operand(run.theta, node, 0),
            vw=run.operand(run.v, node, 0),
            vb=run.operand(run.v, node, 1),
            rstd=self._state("rstd"),
            mean_rx=self._state("mean_rx"),
            mean_rx_x=self._state("mean_rx_x"),
            chunks=chunks,
            **self._common(),
        )
        self._combine(tangent_end(run, node), None, None, self._rx)

    def tangent_backward(self, sinks: Sinks) -> None:
        """The tangents of dx, dw and db."""
        run, node = self.run, self.node
        dy, rdy = run.d[node.output], run.rd[node.output]
        chunks, parts = self._products(rdy, dy if self._moves else None)
        weight_target, bias_target = self._targets(sinks, node)
        run.emit(
            tangent_backward_coefficients,
            self._programs(),
            parts=parts,
            w=run.operand(run.theta, node, 0),
            vw=run.operand(run.v, node, 0),
            rstd=self._state("rstd"),
            sum_dy=self._state("sum_dy"),
            sum_dy_x=self._state("sum_dy_x"),
            mean_rx=self._state("mean_rx") if self._moves else None,
            mean_rx_x=self._state("mean_rx_x") if self._moves else None,
            weight_target=weight_target,
            bias_target=bias_target,
            chunks=chunks,
            FIXED=self.fixed,
            **self._common(),
        )
        self._input_gradient(sinks, dy, rdy)

    # ---- launches

    def _statistics(self) -> tuple[Tensor, int, int]:
        """(mean and centred squares of chunks of x, rows of a chunk, chunks)."""
        if self.node.sums_from is not None:
            return self._from_tiles(self.node.sums_from, moments=True)
        chunk, chunks = self._chunks(self.rows)
        parts = self._parts(chunks)
        self._by_chunks(statistics, chunk, chunks, x=self._x, parts=parts, R=self.rows, C=self.cols)
        return parts, chunk, chunks

    def _tangent_sums(self) -> tuple[Tensor, int]:
        """(sums of chunks of rx and of rx (x - mean), chunks)."""
        if self.node.sums_from is not None:
            parts, _, chunks = self._from_tiles(self.node.sums_from, moments=False)
            return parts, chunks
        chunk, chunks = self._chunks(self.rows)
        parts = self._parts(chunks)
        self._column_sums(chunk, chunks, self._rx, None, parts, self.rows, pooled=False)
        return parts, chunks

    def _from_tiles(self, conv: Node, moments: bool) -> tuple[Tensor, int, int]:
        """(sums of chunks, rows of a chunk, chunks) from those of the convolution's tiles."""
        partials, tile = tile_partials(self.run, conv)
        tiles = blocks(self.rows, tile)
        if tiles <= _CHUNKS:
            return partials, tile, tiles
        per = blocks(tiles, min(_CHUNKS, blocks(tiles, _TILES)))
        chunks = blocks(tiles, per)
        parts, bc = self._parts(chunks), self._tile()[1]
        self.run.emit(
            merged,
            self.blocks * chunks * blocks(self.cols, bc),
            partials=partials,
            parts=parts,
            R=self.rows,
            C=self.cols,
            TILE=tile,
            PER=per,
            tiles=tiles,
            chunks=chunks,
            MOMENTS=moments,
            BR=_BR_SUMS,
            BC=bc,
        )
        return parts, per * tile, chunks

    def _products(self, a: Buffer, b: Buffer) -> tuple[int, Tensor]:
        """(chunks, the sums over them) of a, a (x - mean) and b rx, all taken where the output
        is."""
        chunk, chunks = self._chunks(self.out_rows)
        parts = self._parts(chunks)
        self._column_sums(chunk, chunks, a, b, parts, self.out_rows, pooled=self.node.pool is not None)
        return chunks, parts

    def _column_sums(
        self,
        chunk: int,
        chunks: int,
        a: Buffer,
        b: Buffer,
        parts: Tensor,
        rows: int,
        pooled: bool,
    ) -> None:
        self._by_chunks(
            sums,
            chunk,
            chunks,
            a=a,
            x=self._x,
            center=self._state("mean"),
            b=b,
            rx=self._rx if b is not None else None,
            positions=self._positions if pooled else None,
            parts=parts,
            R=rows,
            C=self.cols,
            IN=self.rows,
            size=self._image_sizes,
            POOL=self._pool,
        )

    def _by_chunks(self, kernel: Any, chunk: int, chunks: int, **arguments: Any) -> None:
        br, bc = self._tile()
        programs = self.blocks * chunks * blocks(self.cols, bc)
        self.run.emit(kernel, programs, CHUNK=chunk, chunks=chunks, BR=min(br, _BR_SUMS), BC=bc, **arguments)

    def _input_gradient(self, sinks: Sinks | None, dy: Buffer, rdy: Buffer) -> None:
        """dx, or with `rdy` its tangent."""
        if self.run.wants_delta(self.node.inputs[0]):
            deltas, rx = (self.run.d, None) if rdy is None else (self.run.rd, self._rx)
            self._combine(self._gradient_end(deltas), dy, rdy, rx)

    def _combine(self, epilogue: Epilogue, dy: Buffer, rdy: Buffer, rx: Buffer) -> None:
        br, bc = self._tile()
        common: dict[str, Any] = {
            "x": self._x,
            "center": self._state("mean"),
            "rx": rx,
            "positions": self._positions,
            "coefficients": self._coefficients(),
            "C": self.cols,
            "size": self._image_sizes,
            "POOL": self._pool,
            "BR": br,
            "BC": bc,
            **epilogue._asdict(),
        }
        if self.node.pool is not None and epilogue.FINISH.mode in ("forward", "tangent"):
            programs = self.blocks * blocks(self.out_rows, br) * blocks(self.cols, bc)
            self.run.emit(pooled, programs, R=self.out_rows, IN=self.rows, **common)
            return
        programs = self.blocks * blocks(self.rows, br) * blocks(self.cols, bc)
        self.run.emit(combine, programs, R=self.rows, dy=dy, rdy=rdy, **common)

    # ---- arguments

    @property
    def _x(self) -> Buffer:
        return self.run.x[self.node.inputs[0]]

    @property
    def _moves(self) -> bool:
        return self.run.has_tangent(self.node.inputs[0])

    @property
    def _rx(self) -> Buffer:
        return self.run.rx[self.node.inputs[0]] if self._moves else None

    @property
    def _positions(self) -> Buffer:
        if self.node.pool is None:
            return None
        return self.run.keep(self.node, "positions", self.blocks, self.out_rows, self.cols, dtype=self._index)

    @property
    def _index(self) -> torch.dtype:
        """Of a position in a window."""
        return torch.int16

    def _gradient_end(self, deltas: list[Buffer]) -> Epilogue:
        end = End(deltas[self.node.inputs[0]], None, None, None, None)
        return Epilogue(end, Finish("backward", self.node.adds[0]))

    def _state(self, name: str) -> Tensor:
        """[blocks, C], kept."""
        return self.run.keep(self.node, name, self.blocks, self.cols)

    def _coefficients(self) -> Tensor:
        return self.run.scratch("coefficients", self.blocks * 5 * self.cols)

    def _parts(self, chunks: int) -> Tensor:
        return self.run.scratch("parts", self.blocks * chunks * 3 * self.cols)

    def _targets(self, sinks: Sinks | None, layer: Node) -> tuple[Target, Target]:
        """Where the gradients of a layer's weight and bias go."""
        weight, bias = (None if sinks is None or p is None else sinks[p] for p in layer.params[:2])
        return target(weight), target(bias)

    def _groups_of_program(self) -> tuple[int, int]:
        """(groups, channels of each) that one program makes the coefficients of, as powers of
        two."""
        channels = power(self.cols // self.groups, 1, 1 << 20)
        return power(self.groups, 1, max(1, _COEFFICIENTS // channels)), channels

    def _programs(self) -> int:
        """Of the coefficients' kernels."""
        return self.run.tasks * blocks(self.groups, self._groups_of_program()[0])

    def _common(self) -> dict[str, Any]:
        """What all coefficients' kernels take."""
        bg, bj = self._groups_of_program()
        return {
            "coefficients": self._coefficients(),
            "per_task": self.per_task,
            "R": self.rows,
            "groups": Groups(self.cols, self.groups, self.cols // self.groups),
            "BG": bg,
            "BJ": bj,
            "warps": 1 if bg * bj <= 64 else 4 if bg * bj <= 256 else 8,
            "registers": REGISTERS,
        }

    @property
    def _image_sizes(self) -> Images:
        return image_sizes(self.run.values[self.node.inputs[0]], self.run.values[self.node.output])

    @property
    def _pool(self) -> Pool:
        return Pool(*(self.node.pool or (1, 1)))

    def _tile(self) -> tuple[int, int]:
        return power(self.rows, 8, _BR), power(self.cols, 8, _BC)

    def _chunks(self, rows: int) -> tuple[int, int]:
        """(rows of a chunk, how many): enough programs for a large GPU, and chunks that are worth
        one."""
        return cut(rows, self.blocks * blocks(self.cols, _BC), _CHUNKS)


def cut(rows: int, programs: int, most: int) -> tuple[int, int]:
    """(rows of a chunk, how many chunks, `most` at most), where each takes so many programs."""
    count = max(1, min(blocks(8 * FULL, programs), rows // _CHUNK, most))
    chunk = blocks(blocks(rows, count), _BR) * _BR
    return chunk, blocks(rows, chunk)
