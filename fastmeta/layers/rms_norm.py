"""The layer kind `rms_norm`: divided by the root mean square of the last dimensions.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Value, number
from fastmeta.cases.case import Case
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind, tanh_around
from fastmeta.layers.norms import affine, last_dimensions


def rms_norm(build: Builder, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Value:
    """[N, ..., *normalized_shape] with a weight of that shape -> the same shape."""
    shape = last_dimensions(input, normalized_shape)
    epsilon = torch.finfo(build.dtype).eps if eps is None else number(eps)
    names = affine(weight, None, shape)[:1]
    constants = (float(prod(shape)), epsilon)
    return build.layer("rms_norm", (input,), input.shape, names, constants=constants)


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ..., *normalized_shape] -> the same shape."""
    size, eps = int(layer.constants[0]), layer.constants[1]
    weight = params[layer.params[0]].reshape(-1) if layer.params[0] else None
    return F.rms_norm(x.reshape(-1, size), (size,), weight, eps).reshape(x.shape)


def network() -> nn.Module:
    """Norms of rows and of whole examples between linear layers."""
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.RMSNorm(5),
        nn.Tanh(),
        nn.RMSNorm((3, 5), elementwise_affine=False),
        nn.Linear(5, 2),
    )


def cases() -> Iterator[Case]:
    """Norms of rows, of several rows, of the input, in all modes of memory."""
    rows = partial(Case, "rms_rows", network, (3, 4), lr=0.05)
    yield rows()
    yield rows(memory="recompute", steps=3, rates="element_step_task", momentum=0.9, weight_decay=0.05)
    yield rows(order="first", weighted="sqt", per_task="some")
    first = partial(nn.RMSNorm, 5, eps=1e-3)
    yield Case("rms_input", lambda: nn.Sequential(first(), nn.SiLU(), nn.Linear(5, 3)), (5,))


KIND = LayerKind(
    name="rms_norm",
    family="norm",
    forward=forward,
    params=("weight",),
    constants=(2, 2),
    order="rows",
    modules={nn.RMSNorm: (rms_norm, ("normalized_shape", "weight", "eps"))},
    functions={F.rms_norm: rms_norm, torch.rms_norm: rms_norm},
    epilogue=True,
    groups=lambda constants, size: size // int(constants[0]),
    examples=(
        Example("rows", partial(nn.RMSNorm, 13), ((13,),)),
        Example("no weight", partial(nn.RMSNorm, 5, elementwise_affine=False, eps=0.1), ((3, 5),)),
        Example("several rows", partial(nn.RMSNorm, (3, 5)), ((2, 3, 5),)),
        Example("between functions", partial(tanh_around, partial(nn.RMSNorm, 7)), ((2, 7),)),
    ),
    cases=cases,
)
