"""A support or query set as the kernels read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.backends.triton.memory import Memory
from fastmeta.graph.nodes import Graph
from fastmeta.kernels import cross_entropy, elementwise_losses
from fastmeta.kernels.launch import Recorder, tiny
from fastmeta.kernels.losses import Reduction, Results
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Gradients

PARTS = ("x", "y", "weights")


class StaticBatch:
    """Dense tensors [T, N, ...], images channels-last, and targets like the output that they are
    compared with; with a set for each step, [K, T, N, ...]."""

    def __init__(
        self,
        memory: Memory,
        net: Graph,
        batch: Batch,
        loss: Loss | None,
        wrt: frozenset[str],
        role: str,
        output_shape: tuple[int, ...],
    ) -> None:
        self.role, self.loss, self.per_step = role, loss, batch.per_step
        self.tasks, self.examples = batch.x.shape[0], batch.x.shape[2 if batch.per_step else 1]
        self.lead = 3 if batch.per_step else 2
        self.channels = {
            "x": net.values[0].channels and batch.x.dim() > self.lead,
            "y": net.values[net.output].channels and batch.y is not None and batch.y.is_floating_point(),
            "weights": False,
        }
        self.channels_last = net.values[net.output].channels
        self.tensors: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        given = {"x": batch.x, "y": batch.y if loss is not None else None, "weights": batch.weights}
        for part, tensor in given.items():
            if tensor is None:
                continue
            self.tensors[part] = self._like(memory, tensor, part)
            if f"{role}_{part}" in wrt and tensor.is_floating_point():
                self.grads[part] = self._like(memory, tensor, part)
        self.output_shape = output_shape  # of one example
        self.constants = {name: memory.new(*value.shape) for name, value in self._constants(loss).items()}
        self.fresh: set[tuple[str, int]] = set()  # (part, step) of the gradients that have been written

    def _like(self, memory: Memory, tensor: Tensor, part: str) -> Tensor:
        shape = list(tensor.shape)
        if self.per_step:
            shape[0], shape[1] = shape[1], shape[0]
        if self.channels[part]:
            shape.append(shape.pop(self.lead))
        return memory.new(*shape, dtype=tensor.dtype)

    def user_view(self, tensor: Tensor, part: str) -> Tensor:
        """A static tensor in the order of the user's own."""
        if self.channels[part]:
            tensor = tensor.movedim(-1, self.lead)
        return tensor.transpose(0, 1) if self.per_step else tensor

    def targets(self) -> list[Tensor]:
        """The static tensors, in the order of the user's own."""
        return [self.user_view(tensor, part) for part, tensor in self.tensors.items()] + [
            *self.constants.values()
        ]

    def sources(self, batch: Batch, loss: Loss | None) -> list[Tensor]:
        """What to copy to `targets`; losses of one plan may differ in the values of their
        tensors."""
        own = self._constants(loss)
        return [getattr(batch, part) for part in self.tensors] + [own[name] for name in self.constants]

    def deliver(self, grads: Gradients) -> None:
        """Fresh copies of the gradients; zero where nothing depends on the tensor."""
        for part, tensor in self.grads.items():
            copy = self.user_view(tensor, part).clone(memory_format=torch.contiguous_format)
            setattr(grads, f"{self.role}_{part}", copy)

    def step(self, part: str, k: int, source: str = "tensors") -> Tensor | None:
        """[T, N, ...] of step k."""
        tensor = getattr(self, source).get(part)
        return tensor if tensor is None or not self.per_step else tensor[k]

    def gradient(self, part: str, k: int) -> tuple[Tensor | None, bool]:
        """Where the gradient at step k goes, and whether it adds to what is there."""
        tensor = self.step(part, k, "grads")
        key = (part, k if self.per_step else 0)
        again = key in self.fresh
        if tensor is not None:
            self.fresh.add(key)
        return tensor, again

    def unwritten(self) -> list[Tensor]:
        """Gradients that no launch has written, in part or as a whole."""
        parts = {part for part, _ in self.fresh}
        return [tensor for part, tensor in self.grads.items() if part not in parts]

    def _constants(self, loss: Loss | None) -> dict[str, Tensor]:
        """The loss's own tensors by their names in its kernel: class weights [C]; numbers of an
        output's elements."""
        if loss is None:
            return {}
        if loss.kind == "cross_entropy":
            return {} if loss.weight is None else {"class_weights": loss.weight}
        given = {"factors": loss.weight, "pos_weight": loss.pos_weight}
        found = {name: value.expand(self.output_shape) for name, value in given.items() if value is not None}
        return {
            n: (value.movedim(0, -1) if self.channels_last else value).reshape(-1)
            for n, value in found.items()
        }

    def emit_loss(
        self,
        record: Recorder,
        net: Graph,
        k: int,
        z: Tensor,
        *,
        rz: Tensor | None = None,
        dz: Tensor | None,
        value: Tensor | None = None,
        add_value: bool = False,
        step: float = 1.0,
        scale: float = 1.0,
        task_weights: Tensor | None = None,
        gradients: bool = False,
    ) -> None:
        """One launch: values, gradients (with `gradients`, those of targets and weights too), or
        tangents."""
        loss = self.loss
        if loss is None:
            raise ValueError("a set without a loss has no loss to launch")
        dy, add_y = self.gradient("y", k) if gradients else (None, False)
        dweights, add_weights = self.gradient("weights", k) if gradients else (None, False)
        out = net.values[net.output]
        common: dict[str, Any] = {
            "z": z,
            "y": self.step("y", k),
            "rz": rz,
            "weights": self.step("weights", k),
            "task_weights": task_weights,
            "results": Results(value, dz, dy, dweights),
            "HOW": Reduction(
                sum=loss.reduction == "sum",
                by_weights=loss.weight_norm == "sum",
                step=float(step),
                scale=float(scale),
                add_value=add_value,
                add=add_y or add_weights,
                tiny=tiny(z),
            ),
        }
        if loss.kind == "cross_entropy":
            target = self.tensors["y"]
            cross_entropy.emit(
                record,
                self.tasks,
                self.examples,
                out.rows,
                out.cols,
                class_weights=self.constants.get("class_weights"),
                TARGET=cross_entropy.Target(
                    not target.is_floating_point(), float(loss.label_smoothing), loss.ignore_index
                ),
                **common,
            )
        else:
            elementwise_losses.emit(
                record,
                self.tasks,
                self.examples,
                out.size,
                pos_weight=self.constants.get("pos_weight"),
                factors=self.constants.get("factors"),
                KIND=loss.kind,
                BETA=float(loss.beta),
                **common,
            )
