"""The static tensors of one plan: what a call copies in, what it computes with, what it copies
out."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from fastmeta.backends._rates import rate_form
from fastmeta.backends.triton.network import engine_shape
from fastmeta.graph.nodes import Graph
from fastmeta.kernels.passes import Operand
from fastmeta.problem import Problem

#: Parameters begin at multiples of this many elements.
_ALIGNED = 16


@dataclass(slots=True)
class Memory:
    """Allocates, counts, and fills with NaN if asked to."""

    device: torch.device
    dtype: torch.dtype
    poison: bool = False
    bytes: int = 0
    made: list[Tensor] = field(default_factory=list)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of undefined contents."""
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.bytes += tensor.numel() * tensor.element_size()
        self.made.append(tensor)
        return tensor

    def scratch(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that one layer at a time uses, by what for; the next one may get the same."""
        if name not in self.shared or self.shared[name].numel() < size:
            self.shared[name] = self.new(size, dtype=dtype)
        return self.shared[name][:size]

    def spoil(self) -> None:
        """Fill everything that kernels work with with NaN, for tests."""
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


class ParameterLayout:
    """Where each parameter stands in a set [P], and where its rate in a row [L]."""

    def __init__(self, net: Graph, problem: Problem, count: int) -> None:
        convolved = {node.params[0] for node in net.every() if node.kind == "conv2d"}
        self.names, self.shapes = net.params[:count], net.shapes[:count]
        self.engine_shapes = [
            engine_shape(shape, "conv2d" if p in convolved else "") for p, shape in enumerate(self.shapes)
        ]
        self.convolved = convolved
        self.offsets, self.size = [], 0
        for shape in self.shapes:
            self.offsets.append(self.size)
            self.size += -(-prod(shape) // _ALIGNED) * _ALIGNED
        self.size = max(self.size, _ALIGNED)
        self.adapted = [name in problem.rates for name in self.names]
        self.slots, self.row = [-1] * len(self.names), 0
        self.elementwise = [False] * len(self.names)
        for p, name in enumerate(self.names):
            form = rate_form(problem, name, self.shapes[p])
            if form is None:
                continue
            self.elementwise[p] = form.element
            self.slots[p] = self.row
            self.row += prod(self.shapes[p]) if self.elementwise[p] else 1

    def view(self, rows: Tensor, p: int) -> Tensor:
        """Parameter p of sets [..., P], in PyTorch's layout."""
        shape, offset = self.engine_shapes[p], self.offsets[p]
        part = rows[..., offset : offset + prod(shape)].unflatten(-1, shape) if shape else rows[..., offset]
        return self._torch_order(part, p)

    def rate_view(self, rows: Tensor, p: int) -> Tensor:
        """The rates of parameter p in rows [..., L]: its shape in PyTorch's layout, or as many
        ones."""
        slot, shape = self.slots[p], self.shapes[p]
        if not self.elementwise[p]:
            return rows[..., slot].reshape(*rows.shape[:-1], *(1,) * len(shape))
        own = self.engine_shapes[p]
        return self._torch_order(rows[..., slot : slot + prod(own)].unflatten(-1, own), p)

    def _torch_order(self, part: Tensor, p: int) -> Tensor:
        return part.movedim(-1, part.dim() - len(self.shapes[p]) + 1) if p in self.convolved else part

    def index(self) -> Tensor:
        """[P] int32: the place of each element's rate in a row, -1 where there is none."""
        found = torch.full((self.size,), -1, dtype=torch.int32, device="cpu")
        for p, slot in enumerate(self.slots):
            if slot < 0:
                continue
            size, start = prod(self.shapes[p]), self.offsets[p]
            found[start : start + size] = slot + torch.arange(size, device="cpu") * self.elementwise[p]
        return found

    def table(self) -> Tensor:
        """[4, adapted]: start, size, slot, one rate an element; see `kernels.sgd`."""
        rows = [
            (self.offsets[p], prod(self.shapes[p]), slot, int(self.elementwise[p]))
            for p, slot in enumerate(self.slots)
            if slot >= 0
        ]
        return torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 4).t().contiguous()

    def operand(self, rows: Tensor, p: int) -> Operand:
        """Parameter p of sets [T, P], or of a set [P] that all tasks share."""
        begin = self.offsets[p]
        return Operand(rows[..., begin : begin + prod(self.shapes[p])], self.size if rows.dim() > 1 else 0)
