"""The buffers of passes over the network: values, gradients and tangents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmeta.backends.triton.batch import StaticBatch
from fastmeta.kernels.passes import Pass


class PassMemory:
    """The buffers of one sort of pass: values and gradients of `copies` steps, tangents once."""

    def __init__(self, owner: Any, batch: StaticBatch | None, second: bool, copies: int) -> None:
        self.owner, self.batch, self.second = owner, batch, second
        if batch is None:
            return
        net, self.device = owner.net, owner.memory.device
        self.wants_input = "x" in batch.grads
        self.states: list[dict[tuple[int, str], Tensor]] = [{} for _ in range(copies)]
        needs_delta = bool(owner.wrt) or batch is owner.support
        makes = {net.root[node.output] for node in net.nodes}
        roots = sorted(makes | {0})

        def block(root: int) -> Tensor:
            return owner.memory.new(owner.tasks, batch.examples * net.values[root].size)

        def blocks_of(wanted: list[int]) -> list[Tensor | None]:
            own = {root: block(root) for root in wanted}
            return [own.get(root) for root in net.root]

        moving = {net.root[v] for v in range(len(net.values)) if net.from_params[v]}
        deltas = [
            root
            for root in roots
            if needs_delta and root not in net.no_delta and (root in moving or self.wants_input)
        ]
        values = [root for root in roots if root in makes and root not in net.no_value]
        self.x = [blocks_of(values) for _ in range(copies)]
        self.d = [blocks_of(deltas) for _ in range(copies)]
        curves = [root for root in net.curved if root in makes] if second else []
        self.curve = [blocks_of(curves) for _ in range(copies)]
        tangents = [root for root in roots if root in moving and root not in net.no_tangent]
        self.rx = blocks_of(tangents if second else [])
        self.rd = blocks_of(deltas if second else [])

    def at(self, copy: int, x: Tensor | None) -> Pass:
        """The pass that works on one copy, on these inputs."""
        owner, net = self.owner, self.owner.net
        values = list(self.x[copy])
        for value, root in enumerate(net.root):
            if root == 0:
                values[value] = x
        return Pass(
            owner.emit,
            net.nodes,
            net.values,
            owner.tasks,
            self.batch.examples,  # type: ignore[union-attr]
            owner.precision,
            self.second,
            net.from_params,
            self.wants_input,
            values,
            self.d[copy],
            self.rx,
            self.rd,
            self.curve[copy],
            self.states[copy],
            new_state=owner.memory.new,
            scratch=owner.memory.scratch,
        )
