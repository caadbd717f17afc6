"""The layer kind `linear`: y = x W^T + b on the last dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Parameter, Refused, Value, batched, described
from fastmeta.cases.case import Case
from fastmeta.cases.networks import Tied, mlp
from fastmeta.graph.program import Layer
from fastmeta.layers.kind import Example, LayerKind


def linear(build: Builder, input: Value, weight: Parameter, bias: Parameter | None = None) -> Value:
    """[N, ..., I] with weight [O, I] and bias [O] -> [N, ..., O]."""
    if not isinstance(input, Value):
        raise Refused(f"the input must be a traced tensor, got {described(input)}")
    if not isinstance(weight, Parameter):
        raise Refused(f"the weight must be a parameter, got {described(weight)}")
    if len(weight.shape) != 2:
        raise Refused(f"the weight `{weight.name}` must be [O, I], got {list(weight.shape)}")
    outputs, inputs = weight.shape
    if bias is not None and not isinstance(bias, Parameter):
        raise Refused(f"the bias must be a parameter, got {described(bias)}")
    if bias is not None and bias.shape != (outputs,):
        raise Refused(f"the bias `{bias.name}` must be [{outputs}], got {list(bias.shape)}")
    if not input.shape or input.shape[-1] != inputs:
        raise Refused(f"it takes [N, ..., {inputs}], got {batched(input.shape)}")
    names = (weight.name, bias.name if bias else None)
    return build.layer("linear", (input,), (*input.shape[:-1], outputs), names)


def forward(layer: Layer, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[N, ..., I] -> [N, ..., O]."""
    weight, bias = (params[name] if name else None for name in layer.params)
    return F.linear(x, weight, bias)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """With and without a bias, alone, with a weight in two places, of rows."""
    yield Case("no_bias", partial(mlp, (4, 13, 6, 3), "tanh", bias=False), (4,))
    yield Case("tied", partial(Tied, 3, 13, 2), (3,))
    yield Case("tied", partial(Tied, 3, 9, 2), (3,), memory="recompute", steps=3)
    yield Case("rows", partial(mlp, (3, 13, 2), "tanh"), (4, 3))
    yield Case("rows", partial(mlp, (3, 13, 2), "gelu"), (2, 2, 3), steps=1)
    yield Case("linear", partial(nn.Linear, 6, 3), (6,))


KIND = LayerKind(
    name="linear",
    family="bilinear",
    forward=forward,
    params=("weight", "bias"),
    required=1,
    matrix=True,
    order="rows",
    modules={nn.Linear: (linear, ("weight", "bias"))},
    functions={F.linear: linear},
    epilogue=True,
    prologue=True,
    examples=(
        Example("bias", partial(nn.Linear, 13, 7), ((13,),)),
        Example("rows, no bias", partial(nn.Linear, 5, 3, bias=False), ((2, 3, 5),)),
        Example("to one", partial(nn.Linear, 7, 1), ((7,),)),
        Example("wide", partial(nn.Linear, 33, 70), ((33,),), extra=True),
    ),
    cases=cases,
)
