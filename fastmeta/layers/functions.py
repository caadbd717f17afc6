"""The functions of the layer kind `elementwise`: one row a function, with its forward.

A row says everything in Python about a function; the formulas of its value and of its first two
derivatives are in csrc/shared/functions.inl and kernels/functions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.capture.build import Builder, Functions, Methods, Modules, Refused, Rule, Value, number
from fastmeta.graph.program import Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """One function of every element by itself.

    Attributes:
        name: as `Layer.function` has it.
        forward: in plain PyTorch, `forward(x, *constants)`.
        constants: what `Layer.constants` stand for, in order: their names as PyTorch calls them,
            and its defaults.
        piecewise_linear: the second derivative is zero wherever it exists.
        from_output: whether both derivatives follow from the value alone, for all constants or for
            those of which it is true: `from_output(*constants)`.
        reads_argument: the formula in csrc/shared/functions.inl reads x even so.
        kinks: where the first or the second derivative jumps.
        modules: types of modules that are captured as it, with the constants as attributes.
        functions: what is captured as it, called with (input, *constants, inplace=False).
        inplace: the same, writing over their input.
        methods: names of methods of tensors; with an underscore after them they work in place.
        tested: sets of constants to test; () stands for the defaults.
        make: a module that is it, for small networks; None: the first of `modules`, with the first
            of `tested`.
    """

    name: str
    forward: Callable[..., Tensor]
    constants: Mapping[str, float] = field(default_factory=dict)
    piecewise_linear: bool = False
    from_output: bool | Callable[..., bool] = False
    reads_argument: bool = False
    kinks: tuple[float, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    inplace: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    tested: tuple[tuple[float, ...], ...] = ((),)
    make: Callable[[], nn.Module] | None = None

    def told_by_output(self, constants: tuple[float, ...]) -> bool:
        """Whether both derivatives follow from the value alone; more constants may be given than it
        has."""
        own = constants[: len(self.constants)]
        return self.from_output(*own) if callable(self.from_output) else self.from_output

    def module(self) -> nn.Module:
        """A module that is this function, with constants that are not the defaults."""
        return self.make() if self.make is not None else self.modules[0](*self.tested[0])


class Sine(nn.Module):
    """sin(w0 * x), the activation of SIREN."""

    def __init__(self, w0: float) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, ...]."""
        return torch.sin(self.w0 * x)


_ROWS = (
    Function(
        name="relu",
        forward=torch.relu,
        piecewise_linear=True,
        from_output=True,
        kinks=(0.0,),
        modules=(nn.ReLU,),
        functions=(F.relu, torch.relu),
        inplace=(torch.relu_,),
        methods=("relu",),
    ),
    Function(
        name="leaky_relu",
        forward=F.leaky_relu,
        constants={"negative_slope": 0.01},
        piecewise_linear=True,
        # a negative slope maps both signs to one
        from_output=lambda slope: slope >= 0,
        kinks=(0.0,),
        modules=(nn.LeakyReLU,),
        functions=(F.leaky_relu,),
        inplace=(F.leaky_relu_,),
        tested=((0.2,), (0.0,), (-0.5,)),
    ),
    Function(
        name="elu",
        forward=F.elu,
        constants={"alpha": 1.0},
        from_output=lambda alpha: alpha >= 0,
        reads_argument=True,
        kinks=(0.0,),
        modules=(nn.ELU,),
        functions=(F.elu,),
        inplace=(F.elu_,),
        tested=((1.3,), (0.0,), (-0.7,)),
    ),
    # which of the two `approximate` says: fastmeta/layers/elementwise.py
    Function(name="gelu", forward=F.gelu, make=nn.GELU),
    Function(
        name="gelu_tanh",
        forward=partial(F.gelu, approximate="tanh"),
        make=partial(nn.GELU, approximate="tanh"),
    ),
    Function(name="silu", forward=F.silu, modules=(nn.SiLU,), functions=(F.silu,)),
    Function(name="mish", forward=F.mish, modules=(nn.Mish,), functions=(F.mish,)),
    Function(
        name="tanh",
        forward=torch.tanh,
        from_output=True,
        modules=(nn.Tanh,),
        functions=(torch.tanh,),
        inplace=(torch.tanh_,),
        methods=("tanh",),
    ),
    Function(
        name="sigmoid",
        forward=torch.sigmoid,
        from_output=True,
        modules=(nn.Sigmoid,),
        functions=(torch.sigmoid,),
        inplace=(torch.sigmoid_,),
        methods=("sigmoid",),
    ),
    Function(
        name="softplus",
        forward=F.softplus,
        constants={"beta": 1.0, "threshold": 20.0},
        modules=(nn.Softplus,),
        functions=(F.softplus,),
        tested=((1.5, 20.0), (30.0, 20.0)),
    ),
    Function(
        name="sin",
        forward=torch.sin,
        functions=(torch.sin,),
        inplace=(torch.sin_,),
        methods=("sin",),
        make=partial(Sine, 2.0),
    ),
    # sums and products with numbers: fastmeta/layers/elementwise.py
    Function(
        name="affine",
        forward=lambda x, scale, shift: scale * x + shift,
        constants={"scale": 1.0, "shift": 0.0},
        piecewise_linear=True,
        from_output=True,
        tested=((-1.5, 0.7), (0.0, 0.3)),
    ),
)
#: Name -> row.
FUNCTIONS: dict[str, Function] = {row.name: row for row in _ROWS}


def function_of(layer: Layer) -> Function:
    """The row of an element-wise layer's function.

    Raises:
        ValueError: there is no such function.
    """
    try:
        return FUNCTIONS[layer.function]
    except KeyError:
        known = ", ".join(FUNCTIONS)
        raise ValueError(f"no function is called {layer.function!r}; there are {known}") from None


def bound(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `function` by name: `input`, the constants, `inplace`.

    Raises:
        Refused: they are not what it takes.
    """
    defaults = {**function.constants, "inplace": False}
    names = [Parameter("input", Parameter.POSITIONAL_OR_KEYWORD)]
    names += [Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=v) for n, v in defaults.items()]
    try:
        found = Signature(names).bind(*args, **kwargs)
    except TypeError as error:
        raise Refused(str(error)) from None
    found.apply_defaults()
    return found.arguments


def added(build: Builder, function: str, input: Any, constants: tuple[Any, ...], inplace: bool) -> Value:
    """The output of another element-wise layer."""
    shape = input.shape if isinstance(input, Value) else ()
    numbers = tuple(map(number, constants))
    return build.layer("elementwise", (input,), shape, (), function, numbers, inplace=inplace)


def rule(function: Function, inplace: bool = False) -> Rule:
    """How calls of a function are captured."""

    def captured(build: Builder, *args: Any, **kwargs: Any) -> Value:
        given = bound(function, args, kwargs)
        constants = tuple(given[name] for name in function.constants)
        return added(build, function.name, given["input"], constants, inplace or given["inplace"])

    return captured


def tables(function: Function) -> tuple[Modules, Functions, Methods]:
    """What is captured as a function: modules, functions and methods, each with its rule."""
    plain, inplace = rule(function), rule(function, inplace=True)
    modules: Modules = {}
    for module in function.modules:
        names = signature(module).parameters
        modules[module] = (plain, tuple(name for name in (*function.constants, "inplace") if name in names))
    functions = dict.fromkeys(function.functions, plain) | dict.fromkeys(function.inplace, inplace)
    methods = dict.fromkeys(function.methods, plain)
    return modules, functions, methods | {f"{name}_": inplace for name in methods}
