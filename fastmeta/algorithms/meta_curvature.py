"""Meta-Curvature: inner gradients are transformed by learned matrices along each of their
dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.stepwise import Stepwise, StepwiseMachinery, support_of
from fastmeta.network.swap import locked
from fastmeta.ops.checks import Tensors
from fastmeta.ops.options import Options, argument
from fastmeta.ops.rates import Rates, at_step
from fastmeta.ops.task_gradient import gradient
from fastmeta.update_rules import SGD

_DIMENSIONS = ("out", "in", "taps")


class MetaCurvature(Stepwise):
    """Meta-Curvature: theta' = theta - alpha MC(grad L(theta)), MC learned together with theta.

        maml = fm.MetaCurvature(net, loss="cross_entropy", inner_lr=0.1, inner_steps=5)
        maml(support_x, support_y, query_x, query_y).loss.backward()

    The gradient G of a parameter, as a tensor of outputs, inputs and taps [O, I, D], goes to G x_3
    M_f x_2 M_i x_1 M_o: of a linear layer's weight M_o G M_i^T, of a bias M_o g. The matrices are
    the same for all tasks and inner steps and start as the identity, from where Meta-Curvature is
    MAML. They are in `extra`, under the parameter's name with `.` replaced by `__` and `__out`,
    `__in` or `__taps` after it.

    Each inner step is a gradient of the engine, and a Hessian-vector product of it on the way back;
    the matrices are applied in PyTorch.

    Args:
        net, loss, query_loss, inner_lr, inner_steps, order, adapt, learn_lr, lr_per_step,
        step_weights, weight_norm,
            memory, batch_stats, backend, on_divergence: as in `fastmeta.MAML`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Park, Oliva, "Meta-Curvature" (2019), section 3.
    """

    who = "MetaCurvature"

    @locked
    def __init__(
        self, net: nn.Module, *, loss: object, inner_lr: Rates, inner_steps: int, **options: Any
    ) -> None:
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, **options)
        if self.update_rule != SGD():
            raise ValueError(f"{argument(self.who, 'update_rule')} must be plain SGD, got {self.update_rule}")
        params = dict(net.named_parameters())
        for name in self.names:
            value = params[name]
            for key, size in zip(_keys(name), _sizes(value.shape), strict=False):
                self.extra[key] = nn.Parameter(torch.eye(size, dtype=value.dtype, device=value.device))
        self._machinery = _Curved(self)


class _Curved(StepwiseMachinery):
    def path(
        self, options: Options, support: Tensors, steps: int, per_step: bool, tasks: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """As `StepwiseMachinery.path`."""
        params, rates = self.differentiable()
        lr = self.lr_of(rates, tasks)
        late = [name for name in self.names if f"extra.{_keys(name)[0]}" not in rates]
        if late:
            raise ValueError(
                f"{self.who}: {late[0]!r} was frozen when this was made, there are no matrices for it"
            )
        theta = {**params}
        yield theta
        for k in range(steps):
            g = gradient(
                options, self.net, theta, support_of(support, k, per_step), self.loss, self.aliases()
            )
            alpha = at_step(lr, k)
            moved = {}
            for name, value in g.items():
                matrices = [rates[f"extra.{key}"] for key in _keys(name) if f"extra.{key}" in rates]
                curved = transformed(value.detach() if options.order == "first" else value, matrices)
                rate = alpha[name] if isinstance(alpha, Mapping) else alpha
                # a rate of full rank has one row, this step's, before what belongs to tasks
                rate = rate[0] if isinstance(rate, Tensor) and rate.dim() else rate
                moved[name] = theta[name] - rate * curved
            theta = {**theta, **moved}
            yield theta


def transformed(g: Tensor, matrices: list[Tensor]) -> Tensor:
    """MC(G) for all tasks.

    Args:
        g: [T, O], [T, O, I] or [T, O, I, *taps]; scalars [T] are [T, 1].
        matrices: one for each dimension of `_sizes`, [size, size].
    """
    sizes = [len(matrix) for matrix in matrices]
    curved = g.reshape(len(g), *sizes)
    for dimension, matrix in enumerate(matrices, 1):
        curved = torch.tensordot(curved, matrix, ([dimension], [1])).movedim(-1, dimension)
    return curved.reshape(g.shape)


def _keys(name: str) -> list[str]:
    return [f"{name.replace('.', '__')}__{dimension}" for dimension in _DIMENSIONS]


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """[O], [O, I] or [O, I, D]."""
    if len(shape) <= 2:
        return tuple(shape) or (1,)
    return (shape[0], shape[1], prod(shape[2:]))
