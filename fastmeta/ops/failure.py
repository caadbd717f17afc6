"""What the user did wrong, worked out after something has failed: it costs nothing while all is
well."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from math import prod
from traceback import walk_tb
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fastmeta.backends._random_state import preserved
from fastmeta.inputs import Tree, arguments, described, mapped
from fastmeta.losses import Loss
from fastmeta.network.functional import NotTensorsError, call
from fastmeta.network.swap import Exchange
from fastmeta.ops.checks import Shapes, Tensors, leaves_named
from fastmeta.ops.options import Options, argument
from fastmeta.ops.rates import Rates, check_finite, check_ordinary_rates
from fastmeta.ordinary import check_ordinary
from fastmeta.undisturbed import asynchronous


def check_examples(
    options: Options, net: nn.Module, params: Mapping[str, Tensor], tensors: Tensors, shapes: Shapes
) -> None:
    """Check that the examples of both sets have one shape and one dtype, where they are one tensor.

    Args:
        options, net, params, tensors, shapes: of the call.

    Raises:
        TypeError, ValueError: names the set that the network cannot take, or the query set if that
            does not tell.
    """
    support, query = tensors.support_x, tensors.query_x
    if not isinstance(support, Tensor) or not isinstance(query, Tensor):
        return
    shape = tuple(query.shape[2:])
    if shape == shapes.input and query.dtype == support.dtype:
        return
    _forward(options, net, params, tensors, shapes, "support")
    _forward(options, net, params, tensors, shapes, "query")
    what, other = argument(options.who, "query_x"), argument(options.who, "support_x")
    if shape != shapes.input:
        raise ValueError(
            f"{what} must hold examples of shape {shapes.input}, as {other}, got {tuple(query.shape)}"
        )
    raise TypeError(f"{what} must be {support.dtype}, as {other}, got {query.dtype}")


def diagnose(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    shapes: Shapes,
    losses: tuple[Loss | None, Loss | None],
    lr: Rates,
    hyper: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Look for the learning rate, the input or the target that the network or the loss cannot take.

    Args:
        options, net, params, tensors, shapes: of the call that failed.
        losses: of the support and of the query set.
        lr, hyper: as given.

    Raises:
        ValueError, TypeError: names the argument. Returns if nothing is found: the backend's own
            error then stands.
    """
    # a plan is found by classes, shapes, dtypes and devices alone; nothing is read before all have
    # memory
    for name, value in params.items():
        check_ordinary(f"{argument(options.who, 'params')}[{name!r}]", value)
    for field, tree in zip(tensors._fields, tensors, strict=True):
        for name, tensor in leaves_named(options.who, field, tree):
            check_ordinary(name, tensor)
    check_ordinary_rates(options.who, lr)
    for name, value in hyper.items():
        check_ordinary(f"{argument(options.who, 'update_rule')}: {name}", value)
    for loss in losses:
        if loss is not None:
            loss.check_tensors()
    for name, buffer in net.named_buffers():
        if type(buffer) is Tensor and buffer.layout == torch.strided:
            check_ordinary(f"{argument(options.who, 'net')}: the buffer {name!r}", buffer)
    if options.steps:
        check_finite(options.who, lr)
        for name, value in hyper.items():
            if not value.isfinite().all():
                what = f"{argument(options.who, 'update_rule')}: {name}"
                bad = value[~value.isfinite()][0].item()
                raise ValueError(f"{what} must hold finite numbers, got {bad}")
    for part, lead, loss in zip(("support", "query"), (shapes.support, shapes.query), losses, strict=True):
        if part == "support" and not options.steps:
            continue  # it is not run
        output = _forward(options, net, params, tensors, shapes, part)
        y, weights = getattr(tensors, f"{part}_y"), getattr(tensors, f"{part}_weights")
        if output is None or y is None or loss is None:
            continue
        loss.check_one(f"{argument(options.who, 'net')}: the network's output", output)
        if not isinstance(output, Tensor) or not isinstance(y, Tensor):
            continue  # a loss of the user's own
        label = argument(options.who, f"{part}_y")
        if not isinstance(getattr(tensors, f"{part}_x"), Tensor):  # the output has the examples
            lead = (*y.shape[: 2 if part == "support" and options.support_per_step else 1], *output.shape[:1])
            if weights is not None and tuple(weights.shape) != lead:
                what = argument(options.who, f"{part}_weights")
                raise ValueError(f"{what} must be {lead}, as the output, got {tuple(weights.shape)}")
        loss.check_target(label, y, lead, tuple(output.shape[1:]), output.dtype)
        if output.dim() > 1:
            loss.check_values(label, y, output.shape[1])


def _forward(
    options: Options,
    net: nn.Module,
    params: Mapping[str, Tensor],
    tensors: Tensors,
    shapes: Shapes,
    part: str,
) -> Tree:
    """The output of the first task, [N, *out]; None for a set that is not there or holds nothing.

    Raises:
        ValueError: the network raised.
    """
    x, lead = (tensors.support_x, shapes.support) if part == "support" else (tensors.query_x, shapes.query)
    if x is None or 0 in lead:
        return None
    own = {name: value[0] if name in shapes.per_task else value for name, value in params.items()}
    at = (0, 0) if part == "support" and options.support_per_step else (0,)
    example = mapped(lambda leaf: leaf.detach()[at], x)  # [N, *in]
    exchange = Exchange(net)  # refuses some networks by its own words
    try:
        with preserved(shapes.device, net), torch.no_grad():
            return call(exchange, own, example, batch_stats=options.batch_stats)
    except Exception as error:
        if asynchronous(error):
            raise
        _check_call(options.who, net, example, error)
        what = argument(options.who, f"{part}_x")
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{what}: the network raised {type(error).__name__}: {error}; given were {described(x)}"
            ) from error
        got = tuple(x.shape)
        dims = "[" + ", ".join(
            ("T", "N" if part == "support" else "M") if len(lead) == 2 else ("T", "K", "N")
        )
        linear, flattened = _first_layer(net)
        # another layer may have raised, or the user's own code
        if linear is not None and any(
            frame.f_locals.get("self") is linear for frame, _ in walk_tb(error.__traceback__)
        ):
            width = linear.in_features
            if flattened and prod(got[len(lead) :]) != width:
                raise ValueError(
                    f"{what} must be {dims}, ...] with {width} numbers an example (network input {width}), "
                    f"got {got}"
                ) from error
            if not flattened and got[-1] != width:
                raise ValueError(
                    f"{what} must be {dims}, {width}] (network input {width}), got {got}"
                ) from error
        raise ValueError(
            f"{what}: the network raised {type(error).__name__}: {error}; given were {got} {x.dtype}, "
            f"examples of shape {got[len(lead) :]}"
        ) from error


def _check_call(who: str, net: nn.Module, x: Tree, error: Exception) -> None:
    """Check that the network takes what it is given and returns tensors.

    Raises:
        TypeError: it does not; `error` is what its call raised.
    """
    what, name = argument(who, "net"), type(net).__name__
    if isinstance(error, NotTensorsError):
        raise TypeError(
            f"{what} must return a tensor, or a tuple, list or dict of tensors, {name} returned {error.got}: "
            "wrap it in a module that does"
        ) from error
    args, kwargs = arguments(x)
    try:
        signature(net.forward).bind(*args, **kwargs)
    except TypeError as unfit:
        given = "one tensor" if isinstance(x, Tensor) else f"what it is given, {_counted(args, kwargs)}"
        raise TypeError(
            f"{what} must take {given}, {name}.forward {unfit}: give several arguments as a tuple, or with "
            "their names as fastmeta.Inputs(...)"
        ) from error
    except ValueError:  # no signature
        return


def _counted(args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> str:
    """How many arguments there are, and the names of those that have one."""
    count = f"{len(args)} argument{'s' * (len(args) != 1)}"
    return ", ".join([count, *map(repr, kwargs)])


def _first_layer(net: nn.Module) -> tuple[nn.Linear | None, bool]:
    """The first layer with parameters if it is linear, and whether a flatten stands before it."""
    flattened = False
    for layer in net.modules():
        flattened = flattened or isinstance(layer, nn.Flatten)
        if any(True for _ in layer.parameters(recurse=False)):
            return (layer if isinstance(layer, nn.Linear) else None), flattened
    return None, False
