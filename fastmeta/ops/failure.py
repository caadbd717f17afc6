"""What the user did wrong, worked out after a backend has raised: it costs nothing while all is well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from fastmeta.losses import Loss
from fastmeta.network.functional import call
from fastmeta.ops.checks import Shapes, Tensors
from fastmeta.ops.options import Options, argument
from fastmeta.ops.rates import Rates, check_finite


def diagnose(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    shapes: Shapes,
    losses: tuple[Loss | None, Loss | None],
    lr: Rates,
) -> None:
    """Look for the learning rate, the input or the target that the network or the loss cannot take.

    Args:
        options, net, params, tensors, shapes: of the call that failed.
        losses: of the support and of the query set.
        lr: as given.

    Raises:
        ValueError, TypeError: names the argument. Returns if nothing is found: the backend's own error then stands.
    """
    if options.steps:
        check_finite(options.who, lr)
    own = {name: value[0] if name in shapes.per_task else value for name, value in params.items()}
    for part, lead, loss in zip(("support", "query"), (shapes.support, shapes.query), losses, strict=True):
        x, y = getattr(tensors, f"{part}_x"), getattr(tensors, f"{part}_y")
        if x is None or 0 in lead:
            continue
        what = argument(options.who, f"{part}_x")
        dims = "[" + ", ".join(("T", "N" if part == "support" else "M") if len(lead) == 2 else ("T", "K", "N"))
        example = x.detach()[(0,) * (len(lead) - 1)]  # [N, *in]
        output = _forward(what, dims, net, partial(call, net, own, example, batch_stats=options.batch_stats), x)
        if y is not None and loss is not None:
            label = argument(options.who, f"{part}_y")
            loss.check_target(label, y, lead, tuple(output.shape[1:]), output.dtype)
            if output.dim() > 1:
                loss.check_values(label, y, output.shape[1])


def _forward(what: str, dims: str, net: nn.Module, forward: Callable[[], Tensor], x: Tensor) -> Tensor:
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
            return forward()
    except Exception as error:
        lead = dims.count(",") + 1
        linear, flattened = _first_layer(net)
        if linear is not None and flattened and prod(x.shape[lead:]) != linear.in_features:
            expected = f"{dims}, ...] with {linear.in_features} numbers an example (network input {linear.in_features})"
        elif linear is not None and x.shape[-1] != linear.in_features and not flattened:
            expected = f"{dims}, {linear.in_features}] (network input {linear.in_features})"
        else:
            raise ValueError(
                f"{what}: the network does not take {tuple(x.shape)} {x.dtype}, examples of shape "
                f"{tuple(x.shape[lead:])}: {error}"
            ) from error
        raise ValueError(f"{what} must be {expected}, got {tuple(x.shape)}") from error


def _first_layer(net: nn.Module) -> tuple[nn.Linear | None, bool]:
    """The first layer with parameters if it is linear, and whether a flatten stands before it."""
    flattened = False
    for layer in net.modules():
        flattened = flattened or isinstance(layer, nn.Flatten)
        if any(True for _ in layer.parameters(recurse=False)):
            return (layer if isinstance(layer, nn.Linear) else None), flattened
    return None, False
