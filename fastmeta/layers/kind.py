"""What a layer kind is: one record that says everything about it that is not a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fastmeta.capture.build import Functions, Methods, Modules
from fastmeta.graph.program import Layer

if TYPE_CHECKING:
    from fastmeta.cases.case import Case

#: How the four functions of a kind follow from its formula; see docs/adding-a-layer.md.
Family = Literal["linear_map", "bilinear", "pointwise", "norm", "free"]
#: How a kind reads its inputs: images [C, d...], channels-last in the kernels; rows of the last
#: dimension; or in whatever order they are.
Order = Literal["image", "rows", "either"]


@dataclass(frozen=True, slots=True)
class Example:
    """One layer to test and to read alone.

    Attributes:
        label: what is special about it.
        make: the layer as a module that is called with one tensor for each of its inputs.
        shapes: of the inputs, of one example each, without the batch dimension.
        extra: others reach the same kernels: left out where a backend is slow to test.
    """

    label: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    extra: bool = False


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
        matrix: the first parameter is a weight [O, I, *taps], and each element of the output is a
            product of one of its rows.
        constants: the least and the most numbers in `Layer.constants`.
        order: in which order it reads its inputs; of some layers their shapes decide it:
            `order(layer, *shapes)`.
        modules, functions, methods: what is captured as this kind; see `fastmeta.capture.kinds`.
        epilogue: its kernels can apply the element-wise layer after it.
        prologue: its kernels can go on to the gradient of the element-wise layer before it.
        groups: of a norm, how many groups of values it makes of each example: `groups(constants,
            size)`, the size in elements; None: a group for each channel, of the whole batch.
        reads_batch: whether what a layer makes of an example depends on the others of its batch:
            `reads_batch(layer)`; None: it never does.
        kinks: the distance of the nearest input from a point where a derivative jumps, of
            `kinks(layer, *inputs)`; None: the kind is smooth.
        refuses: why a layer cannot run on so many examples, "" if it can: `refuses(layer, count)`.
        examples: layers to test alone, each against `forward`: every option, and nothing round.
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
    order: Order | Callable[..., Order] = "either"
    modules: Modules = field(default_factory=dict)
    functions: Functions = field(default_factory=dict)
    methods: Methods = field(default_factory=dict)
    epilogue: bool = False
    prologue: bool = False
    groups: Callable[[tuple[float, ...], int], int] | None = None
    reads_batch: Callable[[Layer], bool] | None = None
    kinks: Callable[..., Tensor] | None = None
    refuses: Callable[[Layer, int], str] | None = None
    examples: tuple[Example, ...] = ()
    cases: Callable[[], Iterable[Case]] = tuple

    def order_of(self, layer: Layer, *shapes: tuple[int, ...]) -> Order:
        """In which order a layer reads inputs of these shapes, of one example each."""
        return self.order(layer, *shapes) if callable(self.order) else self.order


class Apply(nn.Module):
    """A function as a module, for examples: it is called with the inputs."""

    def __init__(self, function: Callable[..., Tensor], *constants: Any) -> None:
        super().__init__()
        self.function, self.constants = function, constants

    def forward(self, *inputs: Tensor) -> Tensor:
        """The function of the inputs, and of the constants after them."""
        return self.function(*inputs, *self.constants)


def tanh_around(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer between two functions, for examples of kinds whose kernels take them over."""
    return nn.Sequential(nn.Tanh(), make(), nn.Tanh())
