"""Tasks of different sizes: example weights that are a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastmeta.backends._inputs import one_task
from fastmeta.backends._random_state import preserved
from fastmeta.graph.cost import batch_readers
from fastmeta.losses import Loss
from fastmeta.network.functional import normalises_by_batch, norms_by_batch
from fastmeta.ops.checks import Tensors
from fastmeta.ops.options import Options, argument
from fastmeta.ordinary import check_ordinary
from fastmeta.problem import Problem

_FIELDS = ("support_weights", "query_weights")


def masked(tensors: Tensors) -> list[str]:
    """The example weights that are masks."""
    return [field for field in _FIELDS if getattr(getattr(tensors, field), "dtype", None) is torch.bool]


def without_masks(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    loss: Loss | None,
    query_loss: Loss | None,
) -> tuple[Tensors, Loss | None, Loss | None]:
    """The same call with weights of 0 and 1, and the mean over those of 1.

    Raises:
        ValueError: a layer would normalise by masked examples too, or a mask leaves nothing of a
            task; reads the masks.
    """
    for field in masked(tensors):
        mask, target = getattr(tensors, field), f"{field.partition('_')[0]}_y"
        for name, tensor in ((field, mask), (target, getattr(tensors, target))):
            if isinstance(tensor, Tensor):  # both are read here
                check_ordinary(argument(options.who, name), tensor)
        for layer in norms_by_batch(net, options.batch_stats) if isinstance(net, nn.Module) else ():
            _refuse(options.who, field, layer)
        if mask.dim() and not (some := mask.any(-1)).all():
            tasks = sorted({place[0] for place in (~some).nonzero().tolist()}) if some.dim() else []
            raise ValueError(
                f"{argument(options.who, field)} leaves no example of tasks {tasks}; floating-point weights "
                "of zero with weight_norm='sum' may"
            )
        first = next(iter(params.values()), mask) if isinstance(params, Mapping) else mask
        if isinstance(first, Tensor) and first.is_floating_point():
            tensors = tensors._replace(**{field: mask.to(first.dtype)})
        used = loss if field == "support_weights" else query_loss
        if used is None:
            continue
        tensors = tensors._replace(**{target: _in_range(used, getattr(tensors, target), mask)})
        used = replace(used, weight_norm="sum")
        loss, query_loss = (used, query_loss) if field == "support_weights" else (loss, used)
    return tensors, loss, query_loss


def _in_range(loss: Loss, target: Tensor | None, mask: Tensor) -> Tensor | None:
    """`target`; class indices that are masked become 0, which every network has."""
    if not isinstance(target, Tensor) or not loss.needs_class_indices(target):
        return target
    if target.shape[: mask.dim()] != mask.shape or target.device != mask.device:
        return target  # which the checks will refuse
    return target.masked_fill(~mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim())), 0)


def check_layers(options: Options, fields: Sequence[str], problem: Problem) -> None:
    """Refuse masks where a network normalises by the batch without a module for it; one that is not
    captured is run.

    Raises:
        ValueError: it does.
    """
    if not fields or options.batch_stats == "running":
        return
    if problem.program is not None:
        refused = next((layer.kind for layer in batch_readers(problem.program)), "")
    else:
        batch = problem.support if problem.steps else problem.query
        if batch is None:
            return
        params = {
            name: value[0] if name in problem.per_task else value for name, value in problem.params.items()
        }
        with preserved(problem.device, problem.net):
            called = normalises_by_batch(problem.net, params, one_task(batch), options.batch_stats)
        refused = "batch_norm" if called else ""
    if refused:
        _refuse(options.who, fields[0], refused)


def _refuse(who: str, field: str, layer: str) -> None:
    raise ValueError(
        f"{argument(who, field)} is a mask, but {layer} normalises by the whole batch, masked examples "
        "included; use another norm, batch_stats='running', or batch_stats='module' and .eval() on it"
    )
