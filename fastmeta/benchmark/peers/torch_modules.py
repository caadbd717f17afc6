"""What `torch.func` cannot take as it is, in plain PyTorch: vmap has no rule for recurrent layers,
and second derivatives of affine layer norms are wrong under it. Parameters are called as in the
module."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.cases.modules import Recurrent
from fastmeta.inputs import Tree, arguments

Params = dict[str, Tensor]
Forward = Callable[[Params, Tree], Tensor]


def forward(net: nn.Module) -> Forward:
    """A network as a function (parameters by name, x [N, *in]) -> output that vmap takes."""
    if isinstance(net, Recurrent):
        return _recurrent(net)
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _LayerNorm(child))
    return lambda params, x: functional_call(plain, params, arguments(x)[0])


class _LayerNorm(nn.Module):
    """An affine layer norm of the last dimension, by elementary operators."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        if len(norm.normalized_shape) != 1 or norm.weight is None or norm.bias is None:
            raise ValueError("benchmark: of the layer norms the peers have affine ones of the last dimension")
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * scale * self.weight + self.bias


def _recurrent(net: Recurrent) -> Forward:
    long = isinstance(net.core, nn.LSTM)
    width = net.core.hidden_size

    def run(params: Params, x: Tensor) -> Tensor:
        weight, bias = params["core.weight_hh_l0"], params["core.bias_hh_l0"]
        h = c = x.new_zeros(len(x), width)
        # One product for the inputs of all time steps.
        inputs = F.linear(x, params["core.weight_ih_l0"], params["core.bias_ih_l0"])
        for step in inputs.unbind(1):
            if long:
                i, f, g, o = (step + F.linear(h, weight, bias)).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            else:
                xr, xz, xn = step.chunk(3, -1)
                hr, hz, hn = F.linear(h, weight, bias).chunk(3, -1)
                z = torch.sigmoid(xz + hz)
                n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
                h = (1 - z) * n + z * h
        return F.linear(h, params["head.weight"], params["head.bias"])

    return run
