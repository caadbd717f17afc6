"""The networks of the workloads that have no layer program, in plain JAX: recurrent layers by
`lax.scan`, the rest by products and einsum. Parameters are called as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastmeta.cases.modules import GraphNet, Lora, Melu, Recurrent
from fastmeta.cases.networks import Transformer

Params = dict[str, Any]
Forward = Callable[[Params, Any], Any]


def written(net: nn.Module) -> Forward | None:
    """A network as a function (parameters by name, x [N, *in] or a tuple of inputs) -> output; None
    if it is not written here."""
    make = _MODULES.get(type(net))
    return None if make is None else make(net)


def _linear(params: Params, name: str, x: Any) -> Any:
    out = x @ params[f"{name}.weight"].T
    bias = params.get(f"{name}.bias")
    return out if bias is None else out + bias


def _layer_norm(params: Params, name: str, x: Any, eps: float) -> Any:
    from jax import lax
    from jax import numpy as jnp

    centred = x - x.mean(-1, keepdims=True)
    normal = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def _recurrent(net: Recurrent) -> Forward:
    long = isinstance(net.core, nn.LSTM)
    width = net.core.hidden_size

    def run(params: Params, x: Any) -> Any:
        import jax
        from jax import lax
        from jax import numpy as jnp

        weight, bias = params["core.weight_hh_l0"].T, params["core.bias_hh_l0"]

        def lstm(state: Any, inputs: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(inputs + h @ weight + bias, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        def gru(state: Any, inputs: Any) -> Any:
            (h,) = state
            xr, xz, xn = jnp.split(inputs, 3, -1)
            hr, hz, hn = jnp.split(h @ weight + bias, 3, -1)
            z = jax.nn.sigmoid(xz + hz)
            n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            return ((1 - z) * n + z * h,), None

        # One product for the inputs of all time steps, outside of the scan.
        inputs = x @ params["core.weight_ih_l0"].T + params["core.bias_ih_l0"]
        start = (jnp.zeros((x.shape[0], width), x.dtype),) * (2 if long else 1)
        state, _ = lax.scan(lstm if long else gru, start, jnp.swapaxes(inputs, 0, 1))
        return _linear(params, "head", state[0])

    return run


def _transformer(net: Transformer) -> Forward:
    layers: Any = net.encoder.layers
    if any(layer.norm_first or layer.dropout.p for layer in layers):
        raise ValueError("benchmark: the JAX peers have norms after the sums and no dropout")
    heads = layers[0].self_attn.num_heads

    def attention(params: Params, name: str, x: Any) -> Any:
        import jax
        from jax import numpy as jnp

        n, tokens, width = x.shape
        both = x @ params[f"{name}.in_proj_weight"].T + params[f"{name}.in_proj_bias"]
        query, key, value = jnp.moveaxis(both.reshape(n, tokens, 3, heads, width // heads), 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (width // heads) ** 0.5
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, -1), value)
        return _linear(params, f"{name}.out_proj", mixed.reshape(n, tokens, width))

    def run(params: Params, x: Any) -> Any:
        import jax

        x = _linear(params, "embed", x) + params["position"]
        for i, layer in enumerate(layers):
            name = f"encoder.layers.{i}"
            x = x + attention(params, f"{name}.self_attn", x)
            x = _layer_norm(params, f"{name}.norm1", x, layer.norm1.eps)
            wide = jax.nn.gelu(_linear(params, f"{name}.linear1", x), approximate=False)
            x = x + _linear(params, f"{name}.linear2", wide)
            x = _layer_norm(params, f"{name}.norm2", x, layer.norm2.eps)
        return _linear(params, "head", x.mean(1))

    return run


def _graph(net: GraphNet) -> Forward:
    def run(params: Params, graph: Any) -> Any:
        import jax

        x, adjacency = graph
        h = jax.nn.relu(_linear(params, "embed", x))
        for i in range(len(net.own)):
            message = adjacency @ _linear(params, f"message.{i}", h) / x.shape[-2]
            h = jax.nn.relu(_linear(params, f"own.{i}", h) + message)
        return _linear(params, "head", h.mean(1))

    return run


def _lora(net: Lora) -> Forward:
    def layer(params: Params, name: str, x: Any) -> Any:
        return x @ (params[f"{name}.weight"] + params[f"{name}.a"] @ params[f"{name}.b"]).T

    def run(params: Params, x: Any) -> Any:
        from jax import numpy as jnp

        return layer(params, "second", jnp.tanh(layer(params, "first", x)))

    return run


def _melu(net: Melu) -> Forward:
    def run(params: Params, ids: Any) -> Any:
        import jax
        from jax import numpy as jnp

        fields = range(len(net.embeddings))
        rows = [jnp.take(params[f"embeddings.{i}.weight"], ids[:, i], 0, mode="clip") for i in fields]
        return _linear(params, "rating", jax.nn.relu(_linear(params, "hidden", jnp.concatenate(rows, -1))))

    return run


_MODULES: dict[type[nn.Module], Callable[[Any], Forward]] = {
    Recurrent: _recurrent,
    Transformer: _transformer,
    GraphNet: _graph,
    Lora: _lora,
    Melu: _melu,
}
