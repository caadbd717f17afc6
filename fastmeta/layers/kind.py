"""What a layer kind is: one record that says everything about it that is not a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fastmeta.capture.build import Functions, Methods, Modules
from fastmeta.graph.program import Layer

if TYPE_CHECKING:
    from fastmeta.cases import Case

#: How the four functions of a kind follow from its formula; see docs/adding-a-layer.md.
Family = Literal["linear_map", "bilinear", "pointwise", "norm", "free"]
#: How a kind reads its inputs: images [C, d...], channels-last in the kernels; rows of the last
#: dimension; or in whatever order they are.
Order = Literal["image", "rows", "either"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """One layer kind. Its name is the stem of its files everywhere.

    Attributes:
        name: as `Layer.kind` has it.
        family: from which its derivatives follow, or "free": all four functions are written out.
        forward: the layer in plain PyTorch, `forward(layer, params, *inputs)`; `params` maps the
            names in `layer.params` to tensors, inputs and result are [N, *shape]. It is the
            reference of this layer.
        inputs: how many values it reads.
        params: what `Layer.params` stand for, in order.
        required: so many of the first `params` must be there.
        buffers: so many of the last `params` are buffers, not parameters.
        matrix: the first parameter is a weight [O, I, *taps] that products read.
        constants: the least and the most numbers in `Layer.constants`.
        order: in which order it reads its inputs.
        modules, functions, methods: what is captured as this kind; see `fastmeta.capture.kinds`.
        epilogue: its kernels can apply the element-wise layer after it.
        prologue: its kernels can go on to the gradient of the element-wise layer before it.
        multiply_adds: of the forward pass of one example: `(layer, shapes of parameters)`.
        kinks: the distance of the nearest input from a point where a derivative jumps, of
            `kinks(layer, *inputs)`; None: the kind is smooth.
        refuses: why a layer cannot run on so many examples, "" if it can: `refuses(layer, examples)`.
        cases: small networks with this kind, for `fastmeta verify` and the tests.
    """

    name: str
    family: Family
    forward: Callable[..., Tensor]
    inputs: int = 1
    params: tuple[str, ...] = ()
    required: int = 0
    buffers: int = 0
    matrix: bool = False
    constants: tuple[int, int] = (0, 0)
    order: Order = "either"
    modules: Modules = field(default_factory=dict)
    functions: Functions = field(default_factory=dict)
    methods: Methods = field(default_factory=dict)
    epilogue: bool = False
    prologue: bool = False
    multiply_adds: Callable[[Layer, Mapping[str, tuple[int, ...]]], int] | None = None
    kinks: Callable[..., Tensor] | None = None
    refuses: Callable[[Layer, int], str] | None = None
    cases: Callable[[], Iterable[Case]] = tuple
