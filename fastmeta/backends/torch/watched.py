"""`tasks.evaluate`, and what the network and the loss read past their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastmeta.backends._captured import Captured, Watch
from fastmeta.backends.torch import tasks
from fastmeta.backends.torch.features import Features
from fastmeta.losses import Loss
from fastmeta.problem import Batch, Problem


def evaluate(
    problem: Problem,
    params: Mapping[str, Tensor],
    stacked: frozenset[str],
    batch: Batch,
    loss: Loss | None,
    vectorised: bool,
    captured: Captured,
    features: Features | None = None,
    values: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Watch]:
    """(losses [T], output [T, N, *out], what was read); arguments as of `tasks.evaluate`,
    `captured` takes note."""
    given = problem, params, stacked, batch, loss, vectorised, features, values
    ours = [*params.values(), batch.x, batch.y, batch.weights, *values]
    return captured.evaluated(lambda: tasks.evaluate(*given), ours)
