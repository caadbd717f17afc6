"""One function on all tasks: by vmap, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def each_task(
    one_task: Callable[..., tuple[Tensor, ...]],
    params: Mapping[str, Tensor],
    stacked: frozenset[str],
    data: Sequence[Tensor],
    vectorised: bool,
) -> tuple[Tensor, ...]:
    """What a function returns for every task: [T, ...] each.

    Args:
        one_task: of one task's parameters and of its part of `data`.
        params, stacked, vectorised: as of `fastmeta.backends.torch.evaluation.Evaluation`.
        data: [T, ...] each.
    """
    if vectorised:
        dims = {name: 0 if name in stacked else None for name in params}
        in_dims = (dims, *[0] * len(data))
        return torch.func.vmap(one_task, in_dims=in_dims, randomness="different")(dict(params), *data)
    # unbind once: the backward of one select a task would write all of [T, *shape] T times
    columns = {name: value.unbind() for name, value in params.items() if name in stacked}
    answers = [
        one_task({**params, **{name: column[task] for name, column in columns.items()}}, *entry)
        for task, entry in enumerate(zip(*[tensor.unbind() for tensor in data], strict=True))
    ]
    return tuple(map(torch.stack, zip(*answers, strict=True)))
