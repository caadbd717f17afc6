"""A network in plain JAX: by hand where it is written so, else its captured layer program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmeta.benchmark.peers import jax_modules
from fastmeta.benchmark.peers.jax_modules import Forward
from fastmeta.capture.capture import captured
from fastmeta.errors import BackendUnavailable
from fastmeta.graph.program import Layer
from fastmeta.layers.registry import kind_of


def forward(net: nn.Module, input_shape: tuple[int, ...]) -> Forward:
    """The network as a function (parameters by name, x [N, *input_shape]) -> output.

    Raises:
        BackendUnavailable: the network has no layer program and is not written by hand.
        ValueError: it has a layer that is not written here.
    """
    by_hand = jax_modules.written(net)
    if by_hand is not None:
        return by_hand
    program, refused = captured(net, input_shape, torch.float32)
    if program is None:
        raise BackendUnavailable(f"the JAX peers cannot run this network: {refused}")
    unknown = sorted({_name(layer) for layer in program.layers} - set(_LAYERS))
    if unknown:
        raise ValueError(f"benchmark: the JAX peers have no {', '.join(unknown)}")

    def run(params: dict[str, Any], x: Any) -> Any:
        values = [x]
        for layer in program.layers:
            own = [None if name is None else params.get(name) for name in layer.params]
            inputs = [values[i] for i in layer.inputs]
            values.append(_LAYERS[_name(layer)](layer, own, *inputs).reshape(x.shape[0], *layer.shape))
        return values[program.output]

    return run


def _name(layer: Layer) -> str:
    return layer.function if kind_of(layer).family == "pointwise" else layer.kind


def _linear(layer: Layer, params: list[Any], x: Any) -> Any:
    weight, bias = params
    return x @ weight.T if bias is None else x @ weight.T + bias


def _conv2d(layer: Layer, params: list[Any], x: Any) -> Any:
    from jax import lax

    _, _, sh, sw, ph, pw = map(int, layer.constants)
    weight, bias = params
    out = lax.conv_general_dilated(
        x, weight, (sh, sw), ((ph, ph), (pw, pw)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return out if bias is None else out + bias[:, None, None]


def _batch_norm(layer: Layer, params: list[Any], x: Any) -> Any:
    from jax import lax
    from jax import numpy as jnp

    weight, bias, *statistics = params
    if any(value is not None for value in statistics) or (weight is None) != (bias is None):
        raise ValueError("benchmark: of the batch norms the JAX peers have those over the task's own batch")
    axes = (0, *range(2, x.ndim))
    shape = (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdims=True)
    out = centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + layer.constants[0])
    return out if weight is None else out * weight.reshape(shape) + bias.reshape(shape)


def _max_pool2d(layer: Layer, params: list[Any], x: Any) -> Any:
    from jax import lax
    from jax import numpy as jnp

    kh, kw, sh, sw, ph, pw = map(int, layer.constants)
    padding = ((0, 0), (0, 0), (ph, ph), (pw, pw))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, kh, kw), (1, 1, sh, sw), padding)


def _mean(layer: Layer, params: list[Any], x: Any) -> Any:
    if layer.function != "adaptive" or any(size != 1 for size in layer.shape[1:]):
        raise ValueError("benchmark: of the average pools the JAX peers have the mean over an image alone")
    return x.mean((2, 3))


def _relu(layer: Layer, params: list[Any], x: Any) -> Any:
    import jax

    return jax.nn.relu(x)


def _sin(layer: Layer, params: list[Any], x: Any) -> Any:
    from jax import numpy as jnp

    return jnp.sin(x)


_LAYERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _mean,
    "relu": _relu,
    "sin": _sin,
    "affine": lambda layer, params, x: layer.constants[0] * x + layer.constants[1],
    "reshape": lambda layer, params, x: x,
    "add": lambda layer, params, a, b: a + b,
}
