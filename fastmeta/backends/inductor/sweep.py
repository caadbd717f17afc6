"""The meta-step of the `inductor` backend: the pieces of the sweep are compiled functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmeta.backends._sweep import Sweep
from fastmeta.backends.inductor.pieces import Pieces
from fastmeta.problem import Problem


class CompiledSweep(Sweep[dict[str, Tensor]]):
    """Solves one problem, once; reads no value on the host.

    Every step is run again on the way back, inside the Hessian-vector product: nothing is kept of
    it but its parameters.

    Args:
        p: the problem, its tensors detached and its step weights written out.
        wrt: the gradients wanted.
        pieces: of problems like this one.
        buffers: of the module, by name.
    """

    def __init__(
        self, p: Problem, wrt: frozenset[str], pieces: Pieces, buffers: Mapping[str, Tensor]
    ) -> None:
        super().__init__(p, wrt)
        self.pieces, self.buffers = pieces, buffers

    def support_gradient(self, theta: dict[str, Tensor], k: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """g_k; theta_k is all that is kept."""
        piece = self.pieces.support
        if piece is None:
            raise ValueError("there are no inner steps")
        given = piece.given.tensors(self.p, self.buffers, theta, k)
        return [*piece.gradient.run(*given)], theta

    def hessian_product(self, kept: dict[str, Tensor], v: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The step once more, and its derivative along v."""
        piece = self.pieces.support
        if piece is None or piece.product is None:
            raise ValueError("there is no second order")
        given = piece.given.tensors(self.p, self.buffers, kept, k)
        found = [*piece.product.run(*given, *(v[name].contiguous() for name in self.names))]
        self.add(piece.others, found[len(self.names) :], k)
        return dict(zip(self.names, found, strict=False))

    def query(self, theta: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """By the compiled pass, whose losses and outputs get their cotangents."""
        p, piece = self.p, self.pieces.query
        zeros = {name: torch.zeros_like(value) for name, value in theta.items()}
        if piece is None:
            return zeros
        given = piece.given.tensors(p, self.buffers, theta, k)
        found = [*piece.run.run(*given, self._seed(k), *self._cotangents(k))]
        losses, outputs, found = found[0], found[1 : 1 + piece.outputs], found[1 + piece.outputs :]
        self.note(losses, piece.form.build(outputs), k)
        adapted = len(self.names) if piece.adapted else 0
        self.add(piece.others, found[adapted:], k)
        return dict(zip(self.names, found[:adapted], strict=True)) if adapted else zeros

    def _seed(self, k: int) -> Tensor:
        """dJ by the query losses of step k: c_t s_k, [T]."""
        p, first = self.p, next(iter(self.p.params.values()))
        weight = self.step_weights[k] / p.tasks if p.query_loss is not None else 0.0
        return first.new_full((p.tasks,), weight) if p.task_weights is None else p.task_weights * weight

    def _cotangents(self, k: int) -> list[Tensor]:
        """Those of the output, which count after the last step alone."""
        p, piece = self.p, self.pieces.query
        if piece is None or not piece.seeded:
            return []
        given = piece.form.match(p.output_grad)
        found = [given[at].contiguous() for at in piece.seeded]
        return found if k == p.steps else [torch.zeros_like(cotangent) for cotangent in found]
